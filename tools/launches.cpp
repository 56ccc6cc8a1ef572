// Prints "name threads shared_bytes" for every kernel, with the maximum of its launches; tools/sass.py compiles it. A
// name is a prefix of the kernel's name, without namespaces. Kernels that are never launched do no harm.
#include <cstdio>

#include "kernels/cuda/attention_backward.cuh"
#include "kernels/cuda/attention_forward.cuh"
#include "kernels/cuda/gelu.cuh"
#include "kernels/cuda/layer_norm.cuh"

using namespace gptcore;
using namespace gptcore::GPTCORE_GPU;

template <class Math, int kWidth, Gradients kOf>
void attention_backward(const char* math) {
  using Shared = BackwardShared<Math, kWidth, kOf>;
  std::printf("attention_backward_kernel<%s, %d, Gradients%d %d %d\n", math, kWidth, int(kOf),
              Shared::kTile.threads(), Shared::kBytes);
}

template <class Math, int kWidth>
void attention(const char* math) {
  using Forward = ForwardShared<Math, kWidth, false>;
  using Decode = ForwardShared<Math, kWidth, true>;
  std::printf("attention_forward_kernel<%s, %d, false %d %d\n", math, kWidth, Forward::kThreads, Forward::kBytes);
  std::printf("attention_forward_kernel<%s, %d, true %d %d\n", math, kWidth, Decode::kThreads, Decode::kBytes);
  attention_backward<Math, kWidth, Gradients::query>(math);
  attention_backward<Math, kWidth, Gradients::key>(math);
  attention_backward<Math, kWidth, Gradients::value>(math);
  attention_backward<Math, kWidth, Gradients::key_value>(math);
}

template <class Math>
void widths(const char* math) {
  if constexpr (sizeof(Storage<Math>) == 2) {
    attention<Math, 32>(math);
    attention<Math, 96>(math);
  }
  attention<Math, 64>(math);
  attention<Math, 128>(math);
  attention<Math, 256>(math);
}

template <class T, int kWidth>
void bulk(const char* math) {
  using Forward = ForwardShared<Warpgroup<T>, kWidth, false>;
  std::printf("attention_forward_bulk<%s, %d %d %d\n", math, kWidth, Forward::kThreads, Forward::kBytes);
}

template <class T>
void warpgroups(const char* math) {
  attention<Warpgroup<T>, 32>(math);
  attention<Warpgroup<T>, 64>(math);
  attention<Warpgroup<T>, 96>(math);
  attention<Warpgroup<T>, 128>(math);
  bulk<T, 32>(math);
  bulk<T, 64>(math);
  bulk<T, 96>(math);
  bulk<T, 128>(math);
}

template <class T>
void layer_norm_backward(const char* type) {
  std::printf("layer_norm_backward_kernel<%s, %d %d\n", type, kBackwardThreads,
              int(sizeof(float)) * (kBackwardSums + kBackwardShared<T>));
}

int main() {
  widths<bfloat16>("bfloat16");
  widths<float16>("float16");
  warpgroups<bfloat16>("Warpgroup<bfloat16>");
  warpgroups<float16>("Warpgroup<float16>");
  widths<Tf32>("Tf32");
  widths<float>("float");
  layer_norm_backward<bfloat16>("bfloat16");
  layer_norm_backward<float16>("float16");
  layer_norm_backward<float>("float");
  std::printf("attention_delta %d 0\n", kDeltaThreads);
  std::printf("attention_combine %d %d\n", kCombineThreads, int(kCombineThreads / 32 * kMaxSplits * sizeof(float)));
  std::printf("layer_norm_forward_kernel %d %d\n", kForwardThreads, int(sizeof(float)) * (kForwardSums + kForwardShared));
  std::printf("layer_norm_forward_wide %d %d\n", kForwardThreads, int(sizeof(float)) * kForwardSums);
  std::printf("layer_norm_backward_wide %d %d\n", kBackwardThreads, int(sizeof(float)) * kBackwardSums);
  std::printf("gelu_forward %d 0\n", 32 * kGeluWarps);
  std::printf("gelu_backward %d %d\n", 32 * kGeluWarps, kGeluSharedBytes);
  std::printf("sum_partials %d %d\n", 32 * 8, int(32 * 8 * sizeof(float)));
}
