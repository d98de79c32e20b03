// State of a block that the instructions of sm_90a need: the asynchronous proxy's view of shared
// memory, mbarriers that are not fenced yet, and the products and registers of each warp.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "simt.h"

namespace deeplab_fast::emulator {

constexpr uint32_t kSharedBase = 1024;  // start of the shared window; the system has the first KiB
constexpr int kWarps = 32;              // warps in a block, at most

// A product [64, 16] x [16, N] in flight: the part of one warp, 16 rows of the sums.
struct Product {
  int64_t group;
  std::shared_ptr<std::vector<float>> sums;  // [16, N]
  std::shared_ptr<Operation> operation;
};

// Sums of a warp, held here instead of in the registers while products are in flight.
struct Accumulators {
  float* of_lane[32];                        // the registers that they return to
  std::shared_ptr<std::vector<float>> sums;  // [16, N]
};

struct WarpState {
  std::deque<Product> products;  // that no wait has covered yet
  std::vector<Accumulators> accumulators;
  int64_t committed_groups = 0;
  bool is_fenced = false;  // threads could not access the registers since the last wgmma.fence
  int registers = 0;       // for each thread, as set by setmaxnreg; 0: as launched
};

struct BlockState {
  std::vector<unsigned char> async_view;  // shared memory as the asynchronous proxy sees it
  std::vector<int32_t> fences;            // number of the last fence that changed each 16 bytes
  std::vector<uint64_t*> unfenced_barriers[32 * kWarps];
  WarpState warps[kWarps];
};

inline BlockState& block_state(int rank) {
  std::shared_ptr<void>& slot = block_extension(rank);
  if (!slot) {
    auto state = std::make_shared<BlockState>();
    state->async_view.assign(shared_bytes(), 0xff);
    state->fences.resize(shared_bytes() / 16 + 1);
    slot = state;
  }
  return *static_cast<BlockState*>(slot.get());
}

inline BlockState& block_state() { return block_state(cluster_rank()); }
inline WarpState& warp_state() { return block_state().warps[thread_number() / 32]; }

inline unsigned char* shared_memory_of(int rank) {
  return static_cast<unsigned char*>(in_block(rank, shared_memory()));
}

// The swizzled address: its 16-byte column is XORed with the number of its 128-byte row. swizzle 1,
// 2 or 3 is the mode of 32, 64 or 128 bytes.
inline uint32_t swizzled(uint32_t address, uint32_t swizzle) {
  const uint32_t mask = (1u << swizzle) - 1;
  return address ^ (address >> 7 & mask) << 4;
}

}  // namespace deeplab_fast::emulator

namespace deeplab_fast::ptx {

inline uint32_t shared_address(const void* p) {
  const auto* start = static_cast<const unsigned char*>(emulator::shared_memory());
  return emulator::kSharedBase +
         static_cast<uint32_t>(static_cast<const unsigned char*>(p) - start);
}

}  // namespace deeplab_fast::ptx
