// What each function of cuda/ptx_sm90.cuh means, after the PTX ISA's description of its
// instruction.
//
// The asynchronous proxy has a view of shared memory of its own, which ordinary stores and cp.async
// do not reach until a fence, and that fence must be known to all who multiply: products read both
// and fail where they differ. A fence counts for the cp.async that happen before it; of ordinary
// stores, whose thread the emulator does not see, for all so far. Products read their operands at
// some moment between issue and wait, and the sums are poison for as long.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#include "cuda.h"
#include "ptx.h"
#include "simt.h"

namespace deeplab_fast::emulator {

constexpr uint32_t kSharedBase = 1024;  // of the shared window; the first KiB is the system's
constexpr int kWarps = 32;              // of a block, at most

// A product of 64 x 16 by 16 x N, as one warp sees it: its 16 rows of the sums.
struct Product {
  int64_t group;
  std::shared_ptr<std::vector<float>> sums;  // [16, N]
  std::shared_ptr<Operation> operation;
};

// Where the sums of a warp are to go; they are kept from the first product under way to the wait.
struct Accumulators {
  float* of_lane[32];
  std::shared_ptr<std::vector<float>> sums;
};

struct WarpState {
  std::deque<Product> products;  // not waited for
  std::vector<Accumulators> accumulators;
  int64_t committed_groups = 0;
  bool is_fenced = false;  // no register was within reach since the last wgmma.fence
  int registers = 0;       // of a thread
};

struct BlockState {
  std::vector<unsigned char> async_view;  // of shared memory
  std::vector<int32_t> fences;            // that changed it, the last for each 16 bytes
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

// An mbarrier is its 64 bits: phase, arrivals expected and still pending, bytes that copies have to
// bring, and whether it was initialised and that fenced.
struct Barrier64 {
  enum Tag { kUninitialised, kInitialised, kFenced };
  static constexpr uint64_t kMaxCount = (1 << 20) - 1;
  bool phase;
  int64_t expected, pending, bytes;
  Tag tag;

  static Barrier64 load(const uint64_t* p) {
    const uint64_t word = *p;
    const auto bytes = static_cast<int64_t>(word << 2) >> 43;
    const auto tag = word >> 62 == 3 ? kUninitialised : static_cast<Tag>(word >> 62);
    return {(word & 1) != 0, static_cast<int64_t>(word >> 1 & kMaxCount),
            static_cast<int64_t>(word >> 21 & kMaxCount), bytes, tag};
  }

  void store(uint64_t* p) const {
    *p = static_cast<uint64_t>(phase) | static_cast<uint64_t>(expected) << 1 |
         static_cast<uint64_t>(pending) << 21 | (static_cast<uint64_t>(bytes) << 43) >> 2 |
         static_cast<uint64_t>(tag) << 62;
  }

  // Stores it, in the next phase if this one is complete.
  void update(uint64_t* p) {
    const bool completes = pending == 0 && bytes == 0;
    if (completes) {
      phase = !phase;
      pending = expected;
    }
    store(p);
    if (completes) wake(p);
  }
};

inline Barrier64 load_barrier(const char* function, const uint64_t* p, Site site) {
  const Barrier64 barrier = Barrier64::load(p);
  if (barrier.tag == Barrier64::kUninitialised)
    fail(function, site, "this is no mbarrier: it was not initialised, or written over");
  return barrier;
}

// To other blocks of the cluster and to copies.
inline void check_shown(const char* function, const uint64_t* p, Site site) {
  const IgnoreAccesses ignore;
  if (load_barrier(function, p, site).tag != Barrier64::kFenced)
    fail(function, site, "no fence.mbarrier_init since the mbarrier was initialised");
}

inline void count_arrival(const char* function, uint64_t* p, int64_t bytes, Site site) {
  const IgnoreAccesses ignore;
  Barrier64 barrier = load_barrier(function, p, site);
  if (barrier.pending == 0) fail(function, site, "more arrivals than the mbarrier expects");
  barrier.bytes += bytes;
  if (barrier.bytes > static_cast<int64_t>(Barrier64::kMaxCount))
    fail(function, site, "an mbarrier cannot expect %lld bytes",
         static_cast<long long>(barrier.bytes));
  --barrier.pending;
  barrier.update(p);
}

inline void arrive(const char* function, uint64_t* p, int64_t bytes, Site site) {
  release(p);
  count_arrival(function, p, bytes, site);
}

// The address that wgmma and cp.async.bulk see, with the bits of the row of 128 bytes that it is in
// exchanged for others: kSwizzle 1, 2 or 3 is 32, 64 or 128 bytes.
inline uint32_t swizzled(uint32_t address, uint32_t swizzle) {
  const uint32_t mask = (1u << swizzle) - 1;
  return address ^ (address >> 7 & mask) << 4;
}

// A matrix in shared memory as a wgmma descriptor says, 16-bit elements, swizzled in 128 bytes: PTX
// ISA, wgmma, "Canonical Layouts". Where k is contiguous the leading offset means nothing, and the
// stride offset leads from 8 rows to the next 8; else they lead from 64 rows to the next 64 and
// from 8 columns of k to the next 8.
struct Matrix {
  uint32_t start, leading, stride;
  bool k_major;

  static Matrix decode(const char* function, uint64_t descriptor, bool k_major, Site site) {
    const auto field = [&](int shift) {
      return static_cast<uint32_t>(descriptor >> shift & 0x3fff) << 4;
    };
    if (descriptor >> 62 != 1) fail(function, site, "only the swizzle of 128 bytes is emulated");
    if ((descriptor >> 49 & 7) != 0 || (field(0) >> 7 & 7) != 0)
      fail(function, site, "the matrix does not start at a multiple of 1024 bytes");
    return {field(0), field(16), field(32), k_major};
  }

  // Of the 16 bytes with elements k .. k + 7 of row mn, or with mn .. mn + 7 of column k.
  uint32_t chunk(int mn, int k) const {
    if (k_major) return swizzled(start + mn / 8 * stride + mn % 8 * 128 + k * 2, 3);
    return swizzled(start + mn / 64 * leading + k / 8 * stride + k % 8 * 128 + mn % 64 * 2, 3);
  }
};

// Calls visit(mn, k, offset in shared memory) for each 16 bytes of rows first_mn .. first_mn +
// num_mn of 16 elements.
template <typename Visit>
void visit_chunks(const Matrix& matrix, int first_mn, int num_mn, Visit visit) {
  const int mn_step = matrix.k_major ? 1 : 8, k_step = matrix.k_major ? 8 : 1;
  for (int mn = first_mn; mn < first_mn + num_mn; mn += mn_step)
    for (int k = 0; k < 16; k += k_step) visit(mn, k, matrix.chunk(mn, k) - kSharedBase);
}

// Fails unless the warp may read these rows. PTX does not say which of its threads reads what, so
// each must have a fence.proxy.async, its own or one it has acquired, between the copies and this.
inline void check_operand(const Matrix& matrix, int first_mn, int num_mn, Site site) {
  const auto* memory = static_cast<const unsigned char*>(shared_memory());
  visit_chunks(matrix, first_mn, num_mn, [&](int, int, uint32_t offset) {
    if (offset + 16 > shared_bytes())
      fail("wgmma", site, "the matrix reaches offset %u of %zu bytes of shared memory", offset,
           shared_bytes());
    const int copier = unfenced_copy(memory + offset);
    if (copier >= 0)
      fail("wgmma", site,
           "after the copy by thread %d to offset %u in shared memory not every lane has seen a "
           "fence.proxy.async",
           copier, offset);
  });
}

// Calls put(mn, k, value) for rows first_mn .. first_mn + num_mn of 16 elements. fence: the last
// that the warp knows of.
template <typename T, typename Put>
void read_matrix(const Matrix& matrix, int block, int first_mn, int num_mn, int32_t fence,
                 Site site, Put put) {
  const unsigned char* memory = shared_memory_of(block);
  const BlockState& state = block_state(block);
  visit_chunks(matrix, first_mn, num_mn, [&](int mn, int k, uint32_t offset) {
    if (memcmp(memory + offset, &state.async_view[offset], 16) != 0)
      fail("wgmma", site, "offset %u in shared memory was written since the last fence.proxy.async",
           offset);
    if (state.fences[offset / 16] > fence)
      fail(
          "wgmma", site,
          "offset %u in shared memory was written since the last fence.proxy.async that every lane "
          "has seen",
          offset);
    uint16_t elements[8];
    memcpy(elements, memory + offset, 16);
    for (int i = 0; i < 8; ++i)
      put(mn + (matrix.k_major ? 0 : i), k + (matrix.k_major ? i : 0),
          ptx::to_float(T{}, elements[i]));
  });
}

// Where sum j of a lane is in [16, n], PTX ISA, "WGMMA .m64nNk16 register fragment layout for D".
inline int sum_at(int lane, int j, int n) {
  return (lane / 4 + j / 2 % 2 * 8) * n + j / 4 * 8 + lane % 4 * 2 + j % 2;
}

// Puts sums that no product under way will add to into their registers.
inline void hand_back(WarpState& warp, Site site) {
  auto& all = warp.accumulators;
  for (size_t i = 0; i < all.size();) {
    const auto& sums = all[i].sums;
    const auto adds = [&](const Product& product) { return product.sums == sums; };
    if (std::any_of(warp.products.begin(), warp.products.end(), adds)) {
      ++i;
      continue;
    }
    const int n = static_cast<int>(sums->size() / 16);
    for (int lane = 0; lane < 32; ++lane) {
      for (int j = 0; j < n / 2; ++j) {
        float& sum = all[i].of_lane[lane][j];
        if (float_to_bits(sum) != 0xffffffffu)
          fail("wgmma", site, "sum %d of lane %d was written before the wait", j, lane);
        sum = (*sums)[sum_at(lane, j, n)];
      }
    }
    all.erase(all.begin() + static_cast<std::ptrdiff_t>(i));
    warp.is_fenced = false;
  }
}

}  // namespace deeplab_fast::emulator

namespace deeplab_fast::ptx {

constexpr bool kIsSm90a = true;

inline uint32_t shared_address(const void* p) {
  const auto* start = static_cast<const unsigned char*>(emulator::shared_memory());
  return emulator::kSharedBase +
         static_cast<uint32_t>(static_cast<const unsigned char*>(p) - start);
}

// Clusters.

inline int cluster_ctarank() { return emulator::cluster_rank(); }

inline void cluster_arrive_relaxed(Site site = Site::here()) {
  emulator::cluster_barrier_arrive("cluster_arrive_relaxed", site);
}

inline void cluster_wait(Site site = Site::here()) {
  emulator::cluster_barrier_wait("cluster_wait", site);
}

// mbarrier.

inline void mbarrier_init(uint64_t* barrier, int count, Site site = Site::here()) {
  using emulator::Barrier64;
  emulator::check_shared("mbarrier_init", barrier, sizeof(*barrier), site);
  if (count < 1 || count > static_cast<int>(Barrier64::kMaxCount))
    emulator::fail("mbarrier_init", site, "count %d is not 1 to 2^20 - 1", count);
  const emulator::IgnoreAccesses ignore;
  Barrier64{false, count, count, 0, Barrier64::kInitialised}.store(barrier);
  emulator::block_state().unfenced_barriers[emulator::thread_number()].push_back(barrier);
}

inline void fence_mbarrier_init() {
  using emulator::Barrier64;
  const emulator::IgnoreAccesses ignore;
  auto& barriers = emulator::block_state().unfenced_barriers[emulator::thread_number()];
  for (uint64_t* p : barriers) {
    Barrier64 barrier = Barrier64::load(p);
    barrier.tag = Barrier64::kFenced;
    barrier.store(p);
  }
  barriers.clear();
}

inline void mbarrier_arrive(uint64_t* barrier, Site site = Site::here()) {
  emulator::check_shared("mbarrier_arrive", barrier, sizeof(*barrier), site);
  emulator::arrive("mbarrier_arrive", barrier, 0, site);
}

inline void mbarrier_arrive_cluster(uint64_t* barrier, int rank, Site site = Site::here()) {
  using namespace emulator;
  constexpr const char* kName = "mbarrier_arrive_cluster";
  check_shared(kName, barrier, sizeof(*barrier), site);
  if (rank < 0 || rank >= cluster_size()) fail(kName, site, "no block %d in the cluster", rank);
  if (rank == cluster_rank()) return arrive(kName, barrier, 0, site);
  if (has_exited(rank)) fail(kName, site, "block %d of the cluster has exited", rank);
  auto* p = static_cast<uint64_t*>(in_block(rank, barrier));
  check_shown(kName, p, site);
  release(p);
  const IgnoreAccesses ignore;
  auto operation = std::make_shared<Operation>();
  operation->effect = [=] {
    if (has_exited(rank)) fail(kName, site, "block %d of the cluster has exited", rank);
    count_arrival(kName, p, 0, site);
  };
  start(operation);
}

inline void mbarrier_arrive_expect_tx(uint64_t* barrier, int bytes, Site site = Site::here()) {
  emulator::check_shared("mbarrier_arrive_expect_tx", barrier, sizeof(*barrier), site);
  emulator::arrive("mbarrier_arrive_expect_tx", barrier, bytes, site);
}

inline void cp_async_mbarrier_arrive_noinc(uint64_t* barrier, Site site = Site::here()) {
  constexpr const char* kName = "cp_async_mbarrier_arrive_noinc";
  emulator::check_shared(kName, barrier, sizeof(*barrier), site);
  const emulator::IgnoreAccesses ignore;
  emulator::load_barrier(kName, barrier, site);
  const int block = emulator::cluster_rank();
  emulator::after_copies(barrier, [=] {
    if (emulator::has_exited(block)) emulator::fail(kName, site, "the block has exited");
    emulator::count_arrival(kName, barrier, 0, site);
  });
}

// Now and then its time is over before the phase is.
inline bool mbarrier_try_wait_parity(uint64_t* barrier, int parity, Site site = Site::here()) {
  constexpr const char* kName = "mbarrier_try_wait_parity";
  emulator::check_shared(kName, barrier, sizeof(*barrier), site);
  const auto is_complete = [&] {
    const emulator::IgnoreAccesses ignore;
    return emulator::load_barrier(kName, barrier, site).phase != (parity != 0);
  };
  if (emulator::options.seed > 0 && emulator::random(8) == 0) {
    emulator::yield(kName, site);
    return false;
  }
  if (!is_complete()) emulator::wait_on(barrier, kName, site);
  if (!is_complete()) return false;
  emulator::acquire(barrier);
  return true;
}

// Bulk tensor copies.

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

// TSan knows no proxies: what is ordered for the threads is ordered.
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

// row: where this lane points to, and what comes there.
struct StoreMatrix {
  uint32_t values[4];
  uint16_t row[8];
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

// Always the same lane of a launch, but not always the first.
inline bool elect_sync(Site site = Site::here()) {
  emulator::warp_collective("elect_sync", kFullWarp, nullptr, [](void* const*) {}, false, site);
  return emulator::lane() == static_cast<int>(emulator::options.seed * 5 % 32);
}

// Registers.

inline void set_registers(const char* function, int count, bool increases, Site site) {
  using namespace emulator;
  if (count % 8 != 0 || count < 24 || count > 256)
    fail(function, site, "%d is no multiple of 8 from 24 to 256", count);
  warp_collective(function, kFullWarp, nullptr, [](void* const*) {}, false, site);
  const IgnoreAccesses ignore;
  BlockState& state = block_state();
  const int threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  const int at_launch = std::min(255, 65536 / threads) / 8 * 8;  // by __launch_bounds__
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

// wgmma.

struct ProductOperands {
  float* sums;
  uint64_t a, b;
  bool accumulate;
  Site site;
};

// Of a warp.
struct ProductMatrices {
  emulator::Matrix a, b;
  int first_row;  // of a
  int32_t fence;  // the last that all lanes know of
  bool accumulate;
  Site site;
};

template <typename T, int N>
void multiply(std::vector<float>& sums, const ProductMatrices& matrices, int block) {
  const auto [a_matrix, b_matrix, first_row, fence, accumulate, site] = matrices;
  float a[16][16], b[16][N];
  emulator::read_matrix<T>(a_matrix, block, first_row, 16, fence, site,
                           [&, first = first_row](int m, int k, float x) { a[m - first][k] = x; });
  emulator::read_matrix<T>(b_matrix, block, 0, N, fence, site,
                           [&](int n, int k, float x) { b[k][n] = x; });
  for (int row = 0; row < 16; ++row) {
    float* sum = sums.data() + row * N;
    if (!accumulate) std::fill(sum, sum + N, 0.0f);
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < N; ++n) sum[n] += a[row][k] * b[k][n];
  }
}

inline void wgmma_fence(Site site = Site::here()) {
  emulator::warp_collective(
      "wgmma_fence", kFullWarp, nullptr,
      [](void* const*) { emulator::warp_state().is_fenced = true; }, false, site);
}

template <typename T, int N, bool kTransA = false, bool kTransB = false>
void wgmma_m64k16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate,
                  Site site = Site::here()) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256, "wgmma has such N");
  ProductOperands operands{d, a, b, accumulate, site};
  emulator::warp_collective(
      "wgmma", kFullWarp, &operands,
      [](void* const* lanes) {
        using namespace emulator;
        const auto first = *static_cast<const ProductOperands*>(lanes[0]);
        const Site site = first.site;
        const ProductMatrices matrices{Matrix::decode("wgmma", first.a, !kTransA, site),
                                       Matrix::decode("wgmma", first.b, !kTransB, site),
                                       thread_number() / 32 % 4 * 16,
                                       last_fence_of_warp(),
                                       first.accumulate,
                                       site};
        check_operand(matrices.a, matrices.first_row, 16, site);
        check_operand(matrices.b, 0, N, site);
        Accumulators mine;
        for (int lane = 0; lane < 32; ++lane) {
          const auto& other = *static_cast<const ProductOperands*>(lanes[lane]);
          mine.of_lane[lane] = other.sums;
          if (other.a != first.a || other.b != first.b || other.accumulate != first.accumulate)
            fail("wgmma", site, "lanes differ in their operands");
        }
        WarpState& warp = warp_state();
        for (const Accumulators& other : warp.accumulators)
          if (other.of_lane[0] == mine.of_lane[0]) mine.sums = other.sums;
        if (!mine.sums) {
          if (!warp.is_fenced)
            fail("wgmma", site, "no wgmma.fence since the registers were last within reach");
          mine.sums = std::make_shared<std::vector<float>>(16 * N);
          for (int lane = 0; lane < 32; ++lane) {
            for (int j = 0; j < N / 2; ++j)
              (*mine.sums)[sum_at(lane, j, N)] = mine.of_lane[lane][j];
            memset(static_cast<void*>(mine.of_lane[lane]), 0xff, N / 2 * sizeof(float));
          }
          warp.accumulators.push_back(mine);
        }
        // Products of a warp land in order.
        auto operation = std::make_shared<Operation>();
        std::shared_ptr<Operation> previous;
        if (!warp.products.empty()) previous = warp.products.back().operation;
        const int block = cluster_rank();
        operation->effect = [=, sums = mine.sums] {
          if (previous) land(*previous);
          multiply<T, N>(*sums, matrices, block);
        };
        warp.products.push_back({warp.committed_groups, mine.sums, operation});
        start(operation);
      },
      false, site);
  emulator::add_unwaited(1);
}

inline void wgmma_commit_group(Site site = Site::here()) {
  emulator::warp_collective(
      "wgmma_commit_group", kFullWarp, nullptr,
      [](void* const*) { ++emulator::warp_state().committed_groups; }, false, site);
}

struct Wait {
  Site site;
  int finished;  // products
};

template <int kGroups>
void wgmma_wait_group(Site site = Site::here()) {
  Wait operands{site, 0};
  emulator::warp_collective(
      "wgmma_wait_group", kFullWarp, &operands,
      [](void* const* lanes) {
        using namespace emulator;
        WarpState& warp = warp_state();
        int finished = 0;
        for (; !warp.products.empty(); ++finished, warp.products.pop_front()) {
          const Product& oldest = warp.products.front();
          if (oldest.group + kGroups >= warp.committed_groups) break;
          land(*oldest.operation);
        }
        hand_back(warp, static_cast<Wait*>(lanes[0])->site);
        for (int lane = 0; lane < 32; ++lane) static_cast<Wait*>(lanes[lane])->finished = finished;
      },
      false, site);
  emulator::add_unwaited(-operands.finished);
}

}  // namespace deeplab_fast::ptx
