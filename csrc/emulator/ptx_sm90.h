// The functions of cuda/common/ptx_sm90.cuh, written after the PTX ISA's descriptions of the
// instructions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "block_state.h"
#include "bulk_copy.h"
#include "mbarrier.h"
#include "ptx.h"
#include "simt.h"
#include "wgmma.h"

namespace deeplab_fast::ptx {

constexpr bool kIsSm90a = true;

// Clusters.

inline int cluster_ctarank() { return emulator::cluster_rank(); }

inline void cluster_arrive_relaxed(Site site = Site::here()) {
  emulator::cluster_barrier_arrive("cluster_arrive_relaxed", site);
}

inline void cluster_wait(Site site = Site::here()) {
  emulator::cluster_barrier_wait("cluster_wait", site);
}

struct StoreMatrix {
  uint32_t values[4];
  uint16_t row[8];  // result: the row that this lane points to
};

inline void stmatrix_x4(void* row, const uint32_t (&values)[4], Site site = Site::here()) {
  StoreMatrix operands;
  memcpy(operands.values, values, sizeof(values));
  emulator::check_shared("stmatrix_x4", row, sizeof(operands.row), site);
  emulator::warp_collective(
      "stmatrix_x4", kFullWarp, &operands,
      [](void* const* lanes) {
        for (int lane = 0; lane < 32; ++lane) {
          for (int x = 0; x < 8; ++x) {
            const auto* source = static_cast<const StoreMatrix*>(lanes[lane % 8 * 4 + x / 2]);
            static_cast<StoreMatrix*>(lanes[lane])->row[x] =
                static_cast<uint16_t>(source->values[lane / 8] >> x % 2 * 16);
          }
        }
      },
      false, site);
  memcpy(row, operands.row, sizeof(operands.row));
}

// Elects the same lane throughout a launch, which depends on the seed.
inline bool elect_sync(Site site = Site::here()) {
  emulator::warp_collective("elect_sync", kFullWarp, nullptr, [](void* const*) {}, false, site);
  return emulator::lane() == static_cast<int>(emulator::options.seed * 5 % 32);
}

// Registers.

// Waits until the warps of the block have no more registers together than at launch.
inline void set_registers(const char* function, int count, bool increases, Site site) {
  using namespace emulator;
  if (count % 8 != 0 || count < 24 || count > 256)
    fail(function, site, "%d is no multiple of 8 from 24 to 256", count);
  warp_collective(function, kFullWarp, nullptr, [](void* const*) {}, false, site);
  const IgnoreAccesses ignore;
  BlockState& state = block_state();
  const int threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  const int at_launch = std::min(255, 65536 / threads) / 8 * 8;  // as __launch_bounds__ allows
  const auto registers = [&](int warp) {
    const int set = state.warps[warp].registers;
    return set == 0 ? at_launch : set;
  };
  const auto total = [&] {
    int sum = 0;
    for (int warp = 0; warp < threads / 32; ++warp) sum += 32 * registers(warp);
    return sum;
  };
  const int warp = thread_number() / 32;
  if (increases ? count < registers(warp) : count > registers(warp))
    fail(function, site, "from %d registers to %d", registers(warp), count);
  state.warps[warp].registers = count;
  wake(&state);
  while (total() > at_launch * threads) wait_on(&state, function, site);
}

template <int kCount>
void setmaxnreg_inc(Site site = Site::here()) {
  set_registers("setmaxnreg_inc", kCount, true, site);
}

template <int kCount>
void setmaxnreg_dec(Site site = Site::here()) {
  set_registers("setmaxnreg_dec", kCount, false, site);
}

}  // namespace deeplab_fast::ptx
