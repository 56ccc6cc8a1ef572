#include "csrc/simt/tensors.h"

#include <algorithm>
#include <new>

namespace gptcore::simt {
namespace {
thread_local Tensors* current_tensors = nullptr;
}

Tensor::Tensor(std::string name, const void* data, int item, std::vector<int64_t> shape, std::vector<int64_t> strides,
               bool written)
    : name(std::move(name)), begin(reinterpret_cast<uintptr_t>(data)), end(begin), item(item), shape(std::move(shape)),
      strides(std::move(strides)), written(written), run_(item) {
  int64_t last = 0;
  for (size_t i = 0; i < this->shape.size(); ++i) {
    if (this->shape[i] == 0) return;
    last += (this->shape[i] - 1) * this->strides[i] * item;
    if (this->shape[i] > 1 && this->strides[i] > 0) dims_.push_back({this->shape[i], this->strides[i] * item});
  }
  end = begin + last + item;
  std::sort(dims_.begin(), dims_.end(), [](const Dim& a, const Dim& b) { return a.stride > b.stride; });
  while (!dims_.empty() && dims_.back().stride == run_) {
    run_ *= dims_.back().size;
    dims_.pop_back();
  }
}

bool Tensor::contains(uintptr_t address, int64_t bytes) const {
  if (address < begin || address + bytes > end) return false;
  int64_t rest = static_cast<int64_t>(address - begin);
  for (const Dim& dim : dims_) rest -= std::min(rest / dim.stride, dim.size - 1) * dim.stride;
  return rest + bytes <= run_;
}

std::string Tensor::element(uintptr_t address) const {
  std::vector<size_t> axes;
  for (size_t i = 0; i < shape.size(); ++i)
    if (strides[i] > 0) axes.push_back(i);
  std::sort(axes.begin(), axes.end(), [&](size_t a, size_t b) { return strides[a] > strides[b]; });
  std::vector<int64_t> index(shape.size(), 0);
  int64_t rest = static_cast<int64_t>(address - begin) / item;
  for (size_t axis : axes) {
    index[axis] = std::min(rest / strides[axis], shape[axis] - 1);  // between two elements: the former
    rest -= index[axis] * strides[axis];
  }
  std::string text = name + "[";
  for (size_t i = 0; i < index.size(); ++i) text += (i ? ", " : "") + std::to_string(index[i]);
  return text + "]";
}

Tensors::Tensors(std::vector<Tensor> tensors) : tensors_(std::move(tensors)), previous_(current_tensors) {
  std::vector<const Tensor*> sorted;
  for (const Tensor& t : tensors_)
    if (t.begin < t.end) sorted.push_back(&t);
  std::sort(sorted.begin(), sorted.end(), [](const Tensor* a, const Tensor* b) { return a->begin < b->begin; });
  for (const Tensor* t : sorted) {
    if (regions_.empty() || t->begin >= regions_.back().end) {
      regions_.emplace_back();
      regions_.back().begin = t->begin, regions_.back().end = t->end, regions_.back().granule = 4;
    }
    Region& region = regions_.back();
    region.end = std::max(region.end, t->end);
    region.tensors.push_back(t);
    region.granule = std::min(region.granule, t->item == 1 ? 2 : t->item);
  }
  for (Region& region : regions_) {
    const auto written = [](const Tensor* t) { return t->written; };
    if (std::none_of(region.tensors.begin(), region.tensors.end(), written)) continue;
    region.begin &= ~uintptr_t{3};
    region.cells.reset(static_cast<Cell*>(std::calloc((region.end - region.begin) / region.granule + 1, sizeof(Cell))));
    if (!region.cells) throw std::bad_alloc();
  }
  current_tensors = this;
}

Tensors::~Tensors() { current_tensors = previous_; }

Tensors* Tensors::current() { return current_tensors; }

Region* Tensors::find(uintptr_t address) const {
  for (Region& region : regions_)
    if (address >= region.begin && address < region.end) return &region;
  return nullptr;
}

void Tensors::forget_touched() const {
  for (Region& region : regions_)
    region.touched = std::vector<std::atomic<uint8_t>>(region.end / 4 - region.begin / 4 + 1);
}

int64_t Tensors::touched_bytes(uint8_t how) const {
  int64_t words = 0;
  for (const Region& region : regions_)
    words += std::count_if(region.touched.begin(), region.touched.end(), [how](uint8_t word) { return word & how; });
  return 4 * words;
}

std::string Tensors::describe_outside(uintptr_t address) const {
  const Tensor* nearest = nullptr;
  int64_t distance = INT64_MAX;
  for (const Tensor& t : tensors_) {
    const int64_t away = address < t.begin ? t.begin - address : address >= t.end ? address - t.end + 1 : 0;
    if (t.begin < t.end && away < distance) nearest = &t, distance = away;
  }
  if (!nearest) return "no tensor is registered";
  std::string text = nearest->name + " of shape (";
  for (size_t i = 0; i < nearest->shape.size(); ++i) text += (i ? ", " : "") + std::to_string(nearest->shape[i]);
  text += ")";
  if (address < nearest->begin) return std::to_string(distance) + " bytes before the begin of " + text;
  if (address >= nearest->end) return std::to_string(distance - 1) + " bytes after the end of " + text;
  return "between the elements of " + text + ", after " + nearest->element(address);
}

}  // namespace gptcore::simt
