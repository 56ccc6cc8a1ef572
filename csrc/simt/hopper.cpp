// The functions behind kernels/cuda/hopper.cuh.
#include "csrc/simt/model.h"

namespace gptcore::simt {

#define GPTCORE_PC module_offset(__builtin_return_address(0))

bool elect(Site site) {
  Block& block = *running;
  block.synchronise(Op::elect, 0, site, GPTCORE_PC);
  return block.lane().out[0];
}

void named_barrier(int id, int threads, bool waits, Site site) {
  const uint32_t pc = GPTCORE_PC;
  Block& block = *running;
  block.synchronise(waits ? Op::named_sync : Op::named_arrive, id << 16 | (threads & 0xffff), site, pc);
  if (waits) block.wait_named(id, pc);
}

void set_max_registers(int count, bool increase, Site site) {
  const uint32_t pc = GPTCORE_PC;
  running->synchronise(Op::registers, count << 1 | increase, site, pc);
  if (increase) running->take_registers(count, pc);
}

void mbarrier_init(const void* barrier, int count) { running->mbarrier_init(barrier, count, GPTCORE_PC); }
void mbarrier_arrive(const void* barrier, int64_t bytes) { running->mbarrier_arrive(barrier, bytes, GPTCORE_PC); }
bool mbarrier_try_wait(const void* barrier, int parity) {
  return running->mbarrier_try_wait(barrier, parity, GPTCORE_PC);
}
void proxy_fence(bool only_mbarriers) { running->proxy_fence(only_mbarriers); }

void wgmma_fence(Site site) { running->synchronise(Op::register_fence, 0, site, GPTCORE_PC); }
void wgmma_commit(Site site) { running->synchronise(Op::wgmma_commit, 0, site, GPTCORE_PC); }
void wgmma_wait(int groups, Site site) { running->wgmma_wait(groups, site, GPTCORE_PC); }
void wgmma(Mma kind, int n, float* d, const uint32_t* a_registers, uint64_t a, uint64_t b, bool a_transposed,
           bool b_transposed, bool accumulate, Site site) {
  const Product product{kind, n, a, b, !a_registers, a_transposed, b_transposed, accumulate};
  running->async_lane().fragments = {product, d, a_registers};
  running->synchronise(Op::wgmma, n, site, GPTCORE_PC);
}

void bulk_load(void* to, const void* map, const void* mbarrier, int x, int y, int z, int w) {
  running->bulk_load(map, to, mbarrier, {x, y, z, w}, GPTCORE_PC);
}
void bulk_store(const void* map, const void* from, int x, int y, int z, int w) {
  running->bulk_store(map, from, {x, y, z, w}, GPTCORE_PC);
}
void bulk_commit() { running->bulk_commit(); }
void bulk_wait(int groups, bool only_read) { running->bulk_wait(groups, only_read); }

}  // namespace gptcore::simt
