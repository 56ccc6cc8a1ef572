// The arguments of the kernels, and the one list of operations.
//
// Plain structs of pointers and sizes, without Python or PyTorch. Strides count elements. The caller (csrc/) has
// checked every shape, stride and range.
#pragma once

#include <stddef.h>
#include <stdint.h>

// The namespace of code that is compiled both for GPUs and for the GPU simulator, csrc/simt.
#ifdef GPTCORE_SIMT
#define GPTCORE_GPU simulated
#else
#define GPTCORE_GPU cuda
#endif

namespace gptcore {

enum class DType { float32, bfloat16, float16, int32, int64, uint8, other };

// One packed document, or one batch row: its queries attend to its keys only.
struct Segment {
  int64_t batch, query_begin, query_len, key_begin, key_len;
};

// A 4-D tensor (batch, heads, length, head_dim) whose head_dim is dense.
struct HeadsView {
  void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;
};

struct AttentionArgs {
  DType dtype;
  HeadsView query, key, value, out;
  float* lse;  // (batch, query_heads, query_len), natural log
  int64_t batch, query_heads, kv_heads, query_len, kv_len, head_dim;  // of the tensors; a segment may be shorter
  const Segment* segments;  // CPU
  int64_t num_segments;
  // GPU: in device memory, over batch x length, or over one row (used for all rows) if the last boundary is its length.
  // Null: every batch row is a segment.
  const int64_t *cu_seqlens_q, *cu_seqlens_k;
  int64_t num_boundaries;
  float scale;
  bool causal;
  int64_t window_left, window_right;  // negative: no limit
  double dropout_p;
  uint64_t seed;
  // Backward only.
  HeadsView grad_out, grad_query, grad_key, grad_value;
  const float* grad_lse;  // may be null
  char* workspace;        // attention_*_workspace bytes, aligned to 64
  int num_threads;        // CPU
  void* stream;           // GPU
  bool allow_tf32;        // GPU: float32 products may use TF32 tensor cores
};

struct LayerNormArgs {
  DType dtype;           // of x
  DType residual_dtype;  // of residual and residual_out: dtype or float32; without a residual dtype
  DType out_dtype;       // of out and grad_out: residual_dtype, or if that is float32, 16 bits: dtype, if it is one
  DType weight_dtype;    // of weight, bias and their gradients: residual_dtype or float32; on CPUs float32
  int64_t rows, width;
  const void *x, *residual;     // residual may be null
  const void *weight, *bias;    // bias may be null
  void *out, *residual_out;     // residual_out = x + residual; null without a residual
  float *mean, *rstd;           // (rows,)
  float eps;
  // Backward only. x is the normalised tensor: residual_out, if there was a residual. grad_x has its dtype, and is the
  // gradient both of x and of the residual; grad_narrow is the same in the dtype of a 16-bit grad_out, and may be null.
  const void *grad_out, *grad_residual_out;  // grad_residual_out may be null
  void *grad_x, *grad_narrow;
  void *grad_weight, *grad_bias;    // grad_bias may be null
  float* workspace;                 // layer_norm_backward_workspace bytes: partial sums over rows
  int num_threads;                  // CPU
  void* stream;                     // GPU
};

struct GeluArgs {
  DType dtype;
  bool tanh_form;
  int64_t rows, width;  // bias is (width,); without a bias, any factorisation of the number of elements
  const void* x;
  const float* bias;  // may be null
  void* out;
  // Backward only.
  const void* grad_out;
  void* grad_x;
  float* grad_bias;  // null without a bias
  float* workspace;  // gelu_backward_workspace bytes: partial sums over rows
  int num_threads;   // CPU
  void* stream;      // GPU
};

// (rows, columns) in any of the three float types; its rows are dense.
struct Matrix {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t stride = 0;  // from row to row
};

// x, weight and bias are each `dtype` or float32, their gradients likewise. A gradient with null data is not computed.
struct LinearArgs {
  DType dtype;  // of out and grad_out, and of the operands of the matrix products
  int64_t rows, in_features, out_features;
  Matrix x, weight, out, grad_out, grad_x, grad_weight;
  const void* bias;  // (out_features,), may be null
  void* grad_bias;
  DType bias_dtype;
  bool accumulate;  // grad_weight += scale * product, in float32, instead of grad_weight = product
  float scale;
  char* workspace;  // linear_workspace bytes, aligned to 64
  int num_threads;
};

// 16-bit numbers to float32, exactly.
struct WidenArgs {
  DType dtype;
  const void* from;
  float* to;
  int64_t size;
};

// Blocks of 32 weights in GGUF's layouts: a float16 scale and 32 x 8 bits, or 32 x 4 bits.
enum class BlockType { q8_0, q4_0 };

struct QuantizedLinearArgs {
  BlockType type;
  int64_t rows, in_features, out_features;  // in_features is a multiple of 32
  Matrix x, out;          // in any of the three float types
  const uint8_t* weight;  // (out_features, in_features / 32) blocks
  const void* bias;       // (out_features,), may be null
  DType bias_dtype;
  char* workspace;  // quantized_linear_workspace bytes, aligned to 64
  int num_threads;
};

struct CrossEntropyArgs {
  DType dtype;
  int64_t rows, vocab, row_stride;
  void* logits;            // (rows, vocab); becomes the gradient, softmax - onehot, if `gradient`
  const int64_t* targets;  // (rows,), each in [0, vocab)
  double* losses;          // (rows,)
  bool gradient;
  int num_threads;
};

// A contiguous range of one parameter tensor, with its gradient and optimizer state.
struct ParameterPiece {
  int64_t size;
  DType dtype;       // of grad and copy
  float* param;
  void* copy;        // the model's 16-bit copy of param, a float32 master weight; null if param is the model's own
  const void* grad;
  float *exp_avg, *exp_avg_sq;
  float step_size;   // learning rate / (1 - beta1^step)
  float inv_sqrt_bias_correction2;  // 1 / sqrt(1 - beta2^step)
};

struct AdamWArgs {
  const ParameterPiece* pieces;
  int64_t num_pieces;
  float one_minus_beta1, beta2, one_minus_beta2, eps;  // 1 - beta is subtracted in double
  float decay;                               // 1 - learning rate x weight decay
  float grad_scale;
  int num_threads;
};

struct GradNormArgs {
  const ParameterPiece* pieces;  // size, dtype and grad only
  int64_t num_pieces;
  double* sums;  // (num_pieces,): the sum of squares of each piece
  int num_threads;
};

// ---- the one list of operations --------------------------------------------------------------------------------------

// Each kernel function of an operation: KERNEL(result, name, arguments). *_workspace returns bytes.
#define GPTCORE_ATTENTION(KERNEL)                             \
  KERNEL(size_t, attention_forward_workspace, AttentionArgs)  \
  KERNEL(void, attention_forward, AttentionArgs)              \
  KERNEL(size_t, attention_backward_workspace, AttentionArgs) \
  KERNEL(void, attention_backward, AttentionArgs)
#define GPTCORE_LAYER_NORM(KERNEL)                             \
  KERNEL(void, layer_norm_forward, LayerNormArgs)              \
  KERNEL(size_t, layer_norm_backward_workspace, LayerNormArgs) \
  KERNEL(void, layer_norm_backward, LayerNormArgs)
#define GPTCORE_GELU(KERNEL)                        \
  KERNEL(void, gelu_forward, GeluArgs)              \
  KERNEL(size_t, gelu_backward_workspace, GeluArgs) \
  KERNEL(void, gelu_backward, GeluArgs)
#define GPTCORE_LINEAR(KERNEL)                 \
  KERNEL(size_t, linear_workspace, LinearArgs) \
  KERNEL(void, linear, LinearArgs)
#define GPTCORE_QUANTIZED_LINEAR(KERNEL)                         \
  KERNEL(size_t, quantized_linear_workspace, QuantizedLinearArgs) \
  KERNEL(void, quantized_linear, QuantizedLinearArgs)
#define GPTCORE_DECODE(KERNEL) KERNEL(void, widen, WidenArgs)
#define GPTCORE_CROSS_ENTROPY(KERNEL) KERNEL(void, cross_entropy, CrossEntropyArgs)
#define GPTCORE_ADAMW(KERNEL)     \
  KERNEL(void, adamw, AdamWArgs)  \
  KERNEL(void, grad_norm, GradNormArgs)

// Every operation: GPU(name, its kernels) if it has CUDA kernels, CPU(name, its kernels) if it has none.
// csrc/<name>.cpp checks and binds it. Declarations, dispatch tables, bindings and CMakeLists.txt follow from this list.
#define GPTCORE_OPERATIONS(GPU, CPU)              \
  GPU(attention, GPTCORE_ATTENTION)               \
  GPU(layer_norm, GPTCORE_LAYER_NORM)             \
  GPU(gelu, GPTCORE_GELU)                         \
  CPU(linear, GPTCORE_LINEAR)                     \
  CPU(quantized_linear, GPTCORE_QUANTIZED_LINEAR) \
  CPU(decode, GPTCORE_DECODE)                     \
  CPU(cross_entropy, GPTCORE_CROSS_ENTROPY)       \
  CPU(adamw, GPTCORE_ADAMW)

// What can be made of the list.
#define GPTCORE_SKIP(name, KERNELS)
#define GPTCORE_DECLARE_KERNEL(result, name, arguments) result name(const arguments&);
#define GPTCORE_DECLARE_KERNELS(name, KERNELS) KERNELS(GPTCORE_DECLARE_KERNEL)
#define GPTCORE_KERNEL_POINTER(result, name, arguments) result (*name)(const arguments&) = nullptr;
#define GPTCORE_KERNEL_POINTERS(name, KERNELS) KERNELS(GPTCORE_KERNEL_POINTER)
#define GPTCORE_SET_KERNEL(result, name, arguments) kernels.name = name;  // in a variable `kernels`
#define GPTCORE_SET_KERNELS(name, KERNELS) KERNELS(GPTCORE_SET_KERNEL)

// The kernels of one instruction set, or of a GPU, where those of the CPU alone are null.
struct Kernels {
  const char* name;  // of the CPU's instruction set, or "cuda" or "simt"
  GPTCORE_OPERATIONS(GPTCORE_KERNEL_POINTERS, GPTCORE_KERNEL_POINTERS)
};

}  // namespace gptcore
