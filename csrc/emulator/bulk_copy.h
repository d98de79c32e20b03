// Bulk tensor copies, and the fence between the proxies.
//
// The asynchronous proxy has its own view of shared memory, which ordinary stores and cp.async do
// not reach before a fence. Every thread that multiplies has to know of that fence: products read
// both views and fail where they differ. A fence covers the cp.async that happen before it; the
// emulator does not see which thread makes an ordinary store, so a fence covers all stores so far.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "block_state.h"
#include "cuda.h"
#include "mbarrier.h"
#include "ptx.h"
#include "simt.h"

namespace deeplab_fast::ptx {

inline emulator::TensorMap decode(const char* function, const CUtensorMap* encoded, Site site) {
  emulator::TensorMap map;
  memcpy(&map, encoded, sizeof(map));
  if (map.magic != emulator::TensorMap::kMagic)
    emulator::fail(function, site, "this is no tensor map");
  return map;
}

inline void prefetch_tensormap(const CUtensorMap* map, Site site = Site::here()) {
  decode("prefetch_tensormap", map, site);
}

template <int kRank>
void cp_async_bulk_tensor_multicast(void* dst, const CUtensorMap* encoded, uint64_t* barrier,
                                    const int (&at)[kRank], uint32_t ranks,
                                    const char* function = "cp_async_bulk_tensor_multicast",
                                    Site site = Site::here()) {
  using namespace emulator;
  const TensorMap map = decode(function, encoded, site);
  if (map.rank != kRank) fail(function, site, "the tensor map is not of %d dimensions", kRank);
  if (ranks == 0 || ranks >> cluster_size() != 0)
    fail(function, site, "the cluster has no such blocks: %#x", ranks);
  check_shared(function, barrier, sizeof(*barrier), site);
  check_shared(function, dst, 128, site);
  check_waited_for_launches(function, site);
  int rows = 1;
  for (int i = 1; i < kRank; ++i) rows *= map.box[i];
  const int row_bytes = map.box[0] * static_cast<int>(map.element_bytes);
  const uint32_t first = shared_address(dst);
  if (first - kSharedBase + static_cast<size_t>(rows) * row_bytes > shared_bytes())
    fail(function, site, "the box of %d bytes does not fit", rows * row_bytes);
  if (map.swizzle != 0 && row_bytes != 16 << map.swizzle)
    fail(function, site, "a swizzled box is as wide as its swizzle");

  int64_t origin[kRank];
  for (int i = 0; i < kRank; ++i) origin[i] = at[i];
  std::vector<std::pair<int, uint64_t*>> targets;
  const IgnoreAccesses ignore;
  const size_t offset = first - kSharedBase, bytes = static_cast<size_t>(rows) * row_bytes;
  for (int rank = 0; rank < cluster_size(); ++rank) {
    if ((ranks >> rank & 1) == 0) continue;
    auto* their_barrier = static_cast<uint64_t*>(in_block(rank, barrier));
    check_shown(function, their_barrier, site);
    targets.emplace_back(rank, their_barrier);
    forget_copies(rank, shared_memory_of(rank) + offset, bytes);
    std::fill_n(&block_state(rank).fences[offset / 16], bytes / 16, 0);
    if (options.seed == 0) continue;
    memset(shared_memory_of(rank) + offset, 0xff, bytes);
    memset(&block_state(rank).async_view[offset], 0xff, bytes);
  }

  std::vector<unsigned char*> memories;
  std::vector<unsigned char*> views;
  for (const auto& [rank, p] : targets) {
    memories.push_back(shared_memory_of(rank));
    views.push_back(block_state(rank).async_view.data());
  }
  auto operation = std::make_shared<Operation>();
  operation->effect = [=] {
    std::vector<unsigned char> line(static_cast<size_t>(row_bytes));
    for (int row = 0; row < rows; ++row) {
      const unsigned char* source = reinterpret_cast<const unsigned char*>(map.address);
      bool is_inside = true;
      for (int i = 1, rest = row; i < kRank; rest /= map.box[i], ++i) {
        const int64_t coordinate = origin[i] + rest % map.box[i];
        is_inside &= coordinate >= 0 && coordinate < static_cast<int64_t>(map.dims[i]);
        source += coordinate * static_cast<int64_t>(map.strides[i]);
      }
      for (int x = 0; x < map.box[0]; ++x) {
        const int64_t coordinate = origin[0] + x;
        const auto size = map.element_bytes;
        if (is_inside && coordinate >= 0 && coordinate < static_cast<int64_t>(map.dims[0])) {
          memcpy(&line[x * size], source + coordinate * size, size);
        } else {
          memset(&line[x * size], 0, size);
        }
      }
      for (int byte = 0; byte < row_bytes; byte += 16) {
        const uint32_t address = first + static_cast<uint32_t>(row * row_bytes + byte);
        const uint32_t offset = swizzled(address, map.swizzle) - kSharedBase;
        for (size_t i = 0; i < memories.size(); ++i) {
          memcpy(memories[i] + offset, &line[byte], 16);
          memcpy(views[i] + offset, &line[byte], 16);
        }
      }
    }
    for (const auto& [rank, p] : targets) {
      if (has_exited(rank)) fail(function, site, "block %d of the cluster has exited", rank);
      Barrier64 state = Barrier64::load(p);
      state.bytes -= static_cast<int64_t>(rows) * row_bytes;
      if (state.pending == 0 && state.bytes < 0)
        fail(function, site, "brought more bytes than the mbarrier was told to expect");
      state.update(p);
    }
  };
  start(operation);
}

inline void cp_async_bulk_tensor(void* dst, const CUtensorMap* map, uint64_t* barrier,
                                 const int (&at)[4], Site site = Site::here()) {
  cp_async_bulk_tensor_multicast(dst, map, barrier, at, 1u << emulator::cluster_rank(),
                                 "cp_async_bulk_tensor", site);
}

// Copies the threads' view of shared memory to that of the asynchronous proxy. ThreadSanitizer
// knows no proxies.
inline void fence_proxy_async() {
  const emulator::IgnoreAccesses ignore;
  const int32_t fence = emulator::fence_proxies();
  const auto* memory = static_cast<const unsigned char*>(emulator::shared_memory());
  emulator::BlockState& state = emulator::block_state();
  std::vector<unsigned char>& view = state.async_view;
  constexpr size_t kPage = 1024;
  for (size_t page = 0; page < view.size(); page += kPage) {
    const size_t end = std::min(page + kPage, view.size());
    if (memcmp(&view[page], memory + page, end - page) == 0) continue;
    for (size_t at = page; at < end; at += 16) {
      const size_t bytes = std::min<size_t>(16, end - at);
      if (memcmp(&view[at], memory + at, bytes) == 0) continue;
      memcpy(&view[at], memory + at, bytes);
      state.fences[at / 16] = fence;
    }
  }
}

}  // namespace deeplab_fast::ptx
