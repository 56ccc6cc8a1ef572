#include "csrc/device_tensors.h"

#include "csrc/simt/tensors.h"

namespace gptcore {

DeviceTensors::DeviceTensors(std::initializer_list<DeviceTensor> tensors) {
  std::vector<simt::Tensor> list;
  for (const DeviceTensor& t : tensors) {
    if (!t.view) continue;
    const TensorView& v = *t.view;
    list.emplace_back(t.name, v.data, static_cast<int>(item_size(v.dtype)),
                      std::vector<int64_t>(v.shape, v.shape + v.ndim),
                      std::vector<int64_t>(v.strides, v.strides + v.ndim), t.access == Access::write);
  }
  tensors_ = std::make_unique<simt::Tensors>(std::move(list));
}

DeviceTensors::~DeviceTensors() = default;

}  // namespace gptcore
