// The functions of cuda/common/ptx.cuh, written after the PTX ISA's descriptions of the
// instructions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/half.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "simt.h"

namespace deeplab_fast::ptx {

using emulator::Site;

constexpr uint32_t kFullWarp = 0xffffffffu;

inline void cp_async(void* dst, const void* src, int src_bytes = 16, Site site = Site::here()) {
  constexpr int kBytes = 16;
  emulator::check_shared("cp_async", dst, kBytes, site);
  emulator::check_waited_for_launches("cp_async", site);
  if (src_bytes < 0 || src_bytes > kBytes)
    emulator::fail("cp_async", site, "src_bytes %d is not 0 to %d", src_bytes, kBytes);
  if (reinterpret_cast<uintptr_t>(src) % kBytes != 0)
    emulator::fail("cp_async", site, "source %p is not aligned to %d bytes", src, kBytes);
  emulator::copy_async(dst, src, kBytes, static_cast<size_t>(src_bytes));
}

inline void cp_async_commit_group() { emulator::commit_copies(); }

template <int kGroups>
void cp_async_wait_group() {
  emulator::wait_for_copies(kGroups);
}

inline void cp_async_wait_all() {
  emulator::commit_copies();
  emulator::wait_for_copies(0);
}

struct LoadMatrix {
  uint16_t row[8];     // that this lane points to
  uint32_t result[4];  // a pair of elements of each matrix
};

template <bool kTrans>
void load_matrices(const char* function, uint32_t (&r)[4], const void* row, Site site) {
  LoadMatrix operands{};
  emulator::check_shared(function, row, sizeof(operands.row), site);
  memcpy(operands.row, row, sizeof(operands.row));
  emulator::warp_collective(
      function, kFullWarp, &operands,
      [](void* const* lanes) {
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = 0; i < 4; ++i) {
            const auto element = [&](int y, int x) {
              return uint32_t{static_cast<LoadMatrix*>(lanes[8 * i + y])->row[x]};
            };
            const int g = lane / 4, t = lane % 4;
            static_cast<LoadMatrix*>(lanes[lane])->result[i] =
                kTrans ? element(2 * t, g) | element(2 * t + 1, g) << 16
                       : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
          }
        }
      },
      false, site);
  memcpy(r, operands.result, sizeof(r));
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, Site site = Site::here()) {
  load_matrices<false>("ldmatrix_x4", r, row, site);
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, Site site = Site::here()) {
  load_matrices<true>("ldmatrix_x4_trans", r, row, site);
}

// The operands of one lane, and those of the whole warp as matrices.
struct Mma {
  float d[4];
  uint32_t a[4], b[2];
};

template <int K>
struct MmaMatrices {
  float a[16][K], b[K][8];

  // d += a b. Products are exact in fp32; hardware adds them in an order and precision of its own.
  void multiply(void* const* lanes) const {
    for (int row = 0; row < 16; ++row) {
      float sum[8];
      for (int col = 0; col < 8; ++col) sum[col] = d(lanes, row, col);
      for (int k = 0; k < K; ++k)
        for (int col = 0; col < 8; ++col) sum[col] += a[row][k] * b[k][col];
      for (int col = 0; col < 8; ++col) d(lanes, row, col) = sum[col];
    }
  }

  static float& d(void* const* lanes, int row, int col) {
    const int lane = row % 8 * 4 + col / 2;
    return static_cast<Mma*>(lanes[lane])->d[row / 8 * 2 + col % 2];
  }
};

inline float to_float(__half, uint16_t bits) { return __half2float({bits}); }
inline float to_float(__nv_bfloat16, uint16_t bits) { return __bfloat162float({bits}); }

inline void run_mma(const char* function, float (&d)[4], const uint32_t (&a)[4],
                    const uint32_t (&b)[2], emulator::Evaluate evaluate, Site site) {
  Mma operands;
  memcpy(operands.d, d, sizeof(d));
  memcpy(operands.a, a, sizeof(a));
  memcpy(operands.b, b, sizeof(b));
  emulator::warp_collective(function, kFullWarp, &operands, evaluate, false, site);
  memcpy(d, operands.d, sizeof(d));
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  Site site = Site::here()) {
  const auto evaluate = [](void* const* lanes) {
    MmaMatrices<16> m;
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const auto* fragment = static_cast<const Mma*>(lanes[lane]);
      for (int half = 0; half < 2; ++half) {
        const auto value = [&](uint32_t pair) {
          return to_float(T{}, static_cast<uint16_t>(pair >> 16 * half));
        };
        for (int i = 0; i < 4; ++i)
          m.a[g + i % 2 * 8][2 * t + i / 2 * 8 + half] = value(fragment->a[i]);
        for (int i = 0; i < 2; ++i) m.b[2 * t + 8 * i + half][g] = value(fragment->b[i]);
      }
    }
    m.multiply(lanes);
  };
  run_mma("mma_m16n8k16", d, a, b, evaluate, site);
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             Site site = Site::here()) {
  const auto evaluate = [](void* const* lanes) {
    const auto value = [](uint32_t bits) { return bits_to_float(bits & ~0x1fffu); };
    MmaMatrices<8> m;
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const auto* fragment = static_cast<const Mma*>(lanes[lane]);
      for (int i = 0; i < 4; ++i) m.a[g + i % 2 * 8][t + i / 2 * 4] = value(fragment->a[i]);
      for (int i = 0; i < 2; ++i) m.b[t + 4 * i][g] = value(fragment->b[i]);
    }
    m.multiply(lanes);
  };
  run_mma("mma_m16n8k8_tf32", d, a, b, evaluate, site);
}

// Rounds to nearest, ties away from zero. Infinity and NaN are truncated, as in the code that ptxas
// 13.0 generates for sm_80, sm_90 and sm_100: a NaN whose payload has only low bits becomes
// infinity.
inline uint32_t cvt_rna_tf32(float value) {
  const uint32_t bits = float_to_bits(value);
  const bool is_finite = (bits & 0x7f800000u) != 0x7f800000u;
  return (is_finite ? bits + 0x1000u : bits) & ~0x1fffu;
}

// 2^x, up to an ulp too large or too small depending on the bits of x, unless 2^x is a power of
// two.
inline float ex2_approx(float x) {
  const float result = std::fabs(x) < 0x1p-126f ? 1.0f : std::exp2(x);
  if (result < 0x1p-126f) return 0.0f;
  const uint32_t bits = float_to_bits(result);
  const bool exact = (bits & 0x7fffffu) == 0 || !(result <= 0x1.fffffcp127f);
  return exact ? result : bits_to_float(bits - 1u + (float_to_bits(x) * 0x9e3779b9u >> 16) % 3u);
}

inline void griddepcontrol_wait() { emulator::wait_for_launches_before(); }

inline void griddepcontrol_launch_dependents() {}

inline void bar_sync(int id, int threads, Site site = Site::here()) {
  emulator::named_barrier_sync("bar_sync", id, threads, site);
}

// 1 / x, rounded up or down depending on the bits of x, unless 1 / x is a float.
inline float rcp_approx(float x) {
  if (std::fabs(x) < 0x1p-126f) return std::copysign(INFINITY, x);
  const double exact = 1.0 / x;
  if (std::fabs(exact) < 0x1p-126) return std::copysign(0.0f, x);
  const float nearest = static_cast<float>(exact);
  const bool takes_other = float_to_bits(x) * 0x9e3779b9u >> 31 != 0 && nearest != exact;
  return takes_other ? std::nextafter(nearest, exact > nearest ? INFINITY : -INFINITY) : nearest;
}

}  // namespace deeplab_fast::ptx
