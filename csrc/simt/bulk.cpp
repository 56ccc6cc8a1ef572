// Bulk copies of boxes of a tensor between global and shared memory (TMA), and their tensor maps.
#include <algorithm>
#include <cstring>

#include "csrc/simt/model.h"
#include "csrc/tensor_map.h"

namespace gptcore {

// The words of a tensor map are the driver's secret: here they are those of a Box.
std::optional<TensorMap> encode_tensor_map(const TensorMapArgs& args) {
  check_tensor_map(args);
  const int swizzle = args.swizzle_bytes ? args.swizzle_bytes / 16 : 1;
  const simt::Box box{static_cast<char*>(const_cast<void*>(args.data)), args.rank, args.sizes, args.strides, args.box,
                      swizzle};
  TensorMap map{};
  static_assert(sizeof box <= sizeof map);
  std::memcpy(&map, &box, sizeof box);
  return map;
}

namespace simt {
namespace {

uint32_t swizzled(uint32_t offset, int chunks) { return offset ^ (offset >> 7) % chunks * 16; }

// Calls body(row, global address, first element, end) for each row of the box, where elements [first, end) of it exist.
template <class Body>
void for_each_row(const Transfer& transfer, Body body) {
  const Box& box = transfer.box;
  for (int row = 0; row < box.rows(); ++row) {
    int64_t address = reinterpret_cast<int64_t>(box.data) + transfer.at[0] * int64_t{2};
    bool exists = true;
    for (int dim = 1, rest = row; dim < box.rank; rest /= box.box[dim++]) {
      const int64_t index = transfer.at[dim] + rest % box.box[dim];
      exists &= index >= 0 && index < box.sizes[dim];
      address += index * box.strides[dim - 1];
    }
    const int64_t first = std::clamp<int64_t>(-transfer.at[0], 0, box.box[0]);
    const int64_t end = std::clamp<int64_t>(box.sizes[0] - transfer.at[0], first, box.box[0]);
    body(row, address, static_cast<int>(first), static_cast<int>(exists ? end : first));
  }
}

}  // namespace

void Block::start(Transfer transfer, const void* shared, const Actor& in_shared, const Actor& in_global) {
  std::memcpy(&transfer.box, transfer.map, sizeof transfer.box);
  const Box& box = transfer.box;
  const bool is_load = transfer.mbarrier >= 0;
  if (box.rank < 1 || box.rank > 5 || !box.data)
    fail("tensor map", transfer.pc, [] { return "the map was not made by encode_tensor_map"; });
  const uintptr_t address = reinterpret_cast<uintptr_t>(shared);
  if (address % 128)
    fail("misaligned", transfer.pc, [=, name = describe_address(address)] {
      return "a bulk copy's " + name + " is not at a multiple of 128 bytes";
    });
  transfer.offset = static_cast<uint32_t>(address - reinterpret_cast<uintptr_t>(shared_));
  const int bytes = box.rows() * box.row_bytes();
  count.bulk_bytes += bytes;
  actor_ = &in_shared;
  for (int i = 0; i < bytes; i += 16) shared_access(address + i, 16, is_load ? Kind::write : Kind::read, transfer.pc);
  actor_ = &in_global;
  for_each_row(transfer, [&](int, int64_t row, int first, int end) {
    if (first < end) global_access(row + first * 2, (end - first) * 2, !is_load, transfer.pc);
  });
  actor_ = nullptr;
  if (is_load) std::memset(shared_ + transfer.offset, 0xff, bytes);
  const Order order = state_->options.order;
  if (order == Order::forward || (order == Order::random && random(2))) perform(transfer);
  else async_.transfers.push_back(transfer);
}

void Block::perform(const Transfer& transfer) {
  const Box& box = transfer.box;
  for_each_row(transfer, [&](int row, int64_t global, int first, int end) {
    for (int i = 0; i < box.box[0]; ++i) {
      const uint32_t offset = transfer.offset + row * box.row_bytes() + i * 2;
      char* const in_shared = shared_ + swizzled(offset, box.swizzle);
      char* const in_global = reinterpret_cast<char*>(global) + i * 2;
      const bool exists = i >= first && i < end;
      if (transfer.mbarrier < 0 && exists) std::memcpy(in_global, in_shared, 2);
      else if (transfer.mbarrier >= 0 && exists) std::memcpy(in_shared, in_global, 2);
      else if (transfer.mbarrier >= 0) std::memset(in_shared, 0, 2);
    }
  });
  if (transfer.mbarrier >= 0)
    complete_tx(async_.mbarriers[transfer.mbarrier], box.rows() * box.row_bytes(), transfer.pc);
}

// Elements outside of the tensor become zeros, and count as bytes that are copied.
void Block::bulk_load(const void* map, void* to, const void* mbarrier, std::array<int, 5> at, uint32_t pc) {
  become_precise();
  Mbarrier& barrier = find_mbarrier(mbarrier, true, pc);
  barrier.copies_stamp = ++stamp_;
  const uint16_t code = static_cast<uint16_t>(kAgent + barrier.entry - threads_);
  const Actor actor{code, stamp_, &clocks_.seen(thread_), "a bulk copy"};
  const int index = static_cast<int>(&barrier - async_.mbarriers.data());
  start({{}, map, at, 0, index, thread_, stamp_, pc}, to, actor, actor);
}

void Block::bulk_store(const void* map, const void* from, std::array<int, 5> at, uint32_t pc) {
  become_precise();
  AsyncLane& lane = async_lane();
  if (lane.store_entry < 0) lane.store_entry = clocks_.new_agent(), lane.visible_entry = clocks_.new_agent();
  lane.store_stamp = ++stamp_, lane.store_pc = pc;
  const auto actor = [&](int entry) {
    const uint16_t code = static_cast<uint16_t>(kAgent + entry - threads_);
    return Actor{code, stamp_, &clocks_.seen(thread_), "a bulk store"};
  };
  start({{}, map, at, 0, -1, thread_, stamp_, pc}, from, actor(lane.store_entry), actor(lane.visible_entry));
}

void Block::bulk_commit() {
  become_precise();
  async_lane().store_groups.push_back(async_lane().store_stamp);
}

// Waits until at most `groups` of this thread's groups have not read their source, or written their destination.
void Block::bulk_wait(int groups, bool only_read) {
  become_precise();
  AsyncLane& lane = async_lane();
  const int done = static_cast<int>(lane.store_groups.size()) - groups;
  if (done <= 0 || lane.store_entry < 0) return;
  const uint32_t stamp = lane.store_groups[done - 1];
  std::vector<Transfer>& transfers = async_.transfers;
  for (size_t i = 0; i < transfers.size();) {
    if (transfers[i].thread != thread_ || transfers[i].mbarrier >= 0 || transfers[i].stamp > stamp) {
      ++i;
      continue;
    }
    perform(transfers[i]);
    transfers.erase(transfers.begin() + static_cast<std::ptrdiff_t>(i));
  }
  lane.stores_read = std::max(lane.stores_read, stamp);
  clocks_.acquire(thread_, lane.store_entry, stamp + 1);
  if (!only_read) clocks_.acquire(thread_, lane.visible_entry, stamp + 1);
}

}  // namespace simt
}  // namespace gptcore
