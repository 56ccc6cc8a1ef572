// The kernels that this module has for a GPU (or for its model), and what a GPU must be for them.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace gptcore {
namespace GPTCORE_GPU {

extern const Kernels kernels;

size_t attention_forward_workspace(const AttentionArgs& args);
void attention_forward(const AttentionArgs& args);
size_t attention_backward_workspace(const AttentionArgs& args);
void attention_backward(const AttentionArgs& args);
void layer_norm_forward(const LayerNormArgs& args);
size_t layer_norm_backward_workspace(const LayerNormArgs& args);
void layer_norm_backward(const LayerNormArgs& args);
void gelu_forward(const GeluArgs& args);
size_t gelu_backward_workspace(const GeluArgs& args);
void gelu_backward(const GeluArgs& args);

}  // namespace GPTCORE_GPU

// Why no kernel can run on this machine; empty if one can. Needs no driver.
std::string cuda_problem();

}  // namespace gptcore
