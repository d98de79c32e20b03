// Non-temporal stores, for outputs too large to stay in the caches: they overwrite a whole line
// without reading it first. Another thread may read the line after a stream_fence().
#pragma once

#include <cstdint>
#include <cstring>

#include "target_clones.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace deeplab_fast::cpu {

constexpr int kLineBytes = 64;

// Copies kLineBytes. dst is aligned to kLineBytes.
ALWAYS_INLINE void stream_line(void* dst, const void* src) {
#ifdef __SSE2__
  for (int i = 0; i < kLineBytes / 16; ++i) {
    _mm_stream_si128(static_cast<__m128i*>(dst) + i,
                     _mm_loadu_si128(static_cast<const __m128i*>(src) + i));
  }
#else
  std::memcpy(dst, src, kLineBytes);
#endif
}

ALWAYS_INLINE void stream_fence() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

}  // namespace deeplab_fast::cpu
