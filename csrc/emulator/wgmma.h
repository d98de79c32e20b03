// The wgmma functions of cuda/common/ptx_sm90.cuh. Products read their operands at some
// moment between issue and wait, and their sums are poison for as long.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "block_state.h"
#include "ptx.h"
#include "simt.h"

namespace deeplab_fast::emulator {

// A matrix of 16-bit elements in shared memory, as a wgmma descriptor defines it, with the swizzle
// of 128 bytes (PTX ISA, wgmma, "Canonical Layouts"). If k is contiguous, the stride offset leads
// from 8 rows to the next 8, and the leading offset is ignored. Otherwise the leading offset leads
// from 64 rows to the next 64, and the stride offset from 8 columns of k to the next 8.
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

  // Address of the 16 bytes with elements k .. k + 7 of row mn, or with mn .. mn + 7 of column k.
  uint32_t chunk(int mn, int k) const {
    if (k_major) return swizzled(start + mn / 8 * stride + mn % 8 * 128 + k * 2, 3);
    return swizzled(start + mn / 64 * leading + k / 8 * stride + k % 8 * 128 + mn % 64 * 2, 3);
  }
};

// Calls visit(mn, k, offset in shared memory) for each 16 bytes of num_mn rows of 16 elements, from
// row first_mn on.
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

// Calls put(mn, k, value) for each element of num_mn rows of 16, from row first_mn on. `fence` is
// the last fence between the proxies that the warp knows of.
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

// Index in [16, n] of sum j of a lane (PTX ISA, "WGMMA .m64nNk16 register fragment layout for D").
inline int sum_at(int lane, int j, int n) {
  return (lane / 4 + j / 2 % 2 * 8) * n + j / 4 * 8 + lane % 4 * 2 + j % 2;
}

// Returns sums to their registers once no product in flight adds to them.
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

// Operands of a lane.
struct ProductOperands {
  float* sums;
  uint64_t a, b;
  bool accumulate;
  Site site;
};

// Operands of a warp.
struct ProductMatrices {
  emulator::Matrix a, b;
  int first_row;  // the first of the warp's 16 rows of a
  int32_t fence;  // the last fence between the proxies that all lanes know of
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
  int finished;  // result: number of products
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
