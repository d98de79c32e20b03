// labels[n, y, x] = argmax_c bilinear(logits[n, c])(y, x), interpolated in fp32.
// logits [N, C, H, W] in any strides, labels [N, out_H, out_W] contiguous.
//
// The output pixels between the same four source pixels form a cell. Each source row is converted
// to fp32 [C, W] once, and the winning class of each of its pixels is computed. If the same class
// wins at all corners of a cell, by the margin of bilinear.h, the cell is filled with it. Other
// cells are joined into tiles: the classes that can win there are interpolated along x, once per
// source row, then along y for every output row. A band is the output rows between the same two
// source rows. Each thread computes runs of bands.

#include <omp.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <exception>
#include <memory>
#include <vector>

#include "api.h"
#include "common/bilinear.h"
#include "common/half.h"
#include "stream.h"
#include "target_clones.h"

namespace deeplab_fast::cpu {
namespace {

// Innermost loops run over multiples of kLanes, the width of the widest vector. Loops along the
// pixels of a cell run over multiples of kCellLanes.
constexpr int kLanes = 16;
constexpr int kCellLanes = 8;
constexpr int kTileColumns = 64;  // output pixels
constexpr int kTilePitch = kTileColumns + kLanes;
constexpr int kTileRows = 16;
constexpr int kTileClasses = 32;  // interpolated along x at a time, to fit the L1 cache
constexpr int kUnroll = 4;        // classes compared per load and store of the running maximum
constexpr int kMaxRivals = 4;     // tiles with more corner winners are not worth pruning
constexpr size_t kMinStreamedBytes = 1 << 20;  // labels of this size do not stay in the caches
constexpr int64_t kPixelsPerThread = 16384;    // fewer pixels do not pay for waking a thread

// Marks of source pixels at which no class wins by the margin of bilinear.h.
constexpr int32_t kContested = -1;
constexpr int32_t kNotFinite = -2;  // some class is NaN or infinite

ALWAYS_INLINE int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Output coordinates [begin, end) between the source pixels lo and hi.
struct Span {
  int64_t begin, end, lo, hi;
};

struct Axis {
  std::vector<Span> spans;
  std::vector<float> w0, w1;  // [out_size + kLanes] weights; loops read past the last coordinate
};

Axis make_axis(int64_t out_size, int64_t size, float scale, bool align_corners, int max_span) {
  Axis axis;
  axis.w0.resize(out_size + kLanes);
  axis.w1.resize(out_size + kLanes);
  for (int64_t dst = 0; dst < out_size; ++dst) {
    const SourcePair pair = source_pair(dst, size, scale, align_corners);
    axis.w0[dst] = pair.w0;
    axis.w1[dst] = pair.w1;
    if (axis.spans.empty() || axis.spans.back().lo != pair.lo ||
        dst - axis.spans.back().begin == max_span) {
      axis.spans.push_back({dst, dst, pair.lo, pair.hi});
    }
    axis.spans.back().end = dst + 1;
  }
  return axis;
}

// Source columns that any span reads, in order. Replaces lo and hi by indices into this list.
std::vector<int64_t> take_used_columns(std::vector<Span>& spans) {
  std::vector<int64_t> columns;
  const auto index_of = [&columns](int64_t column) {
    if (columns.empty() || columns.back() < column) columns.push_back(column);
    const int64_t last = static_cast<int64_t>(columns.size()) - 1;
    return columns[last] == column ? last : last - 1;
  };
  for (Span& span : spans) {
    span.lo = index_of(span.lo);
    span.hi = index_of(span.hi);
  }
  return columns;
}

struct Plan {
  UpsampleShape shape;
  Axis rows, columns;
  std::vector<int64_t> source_columns;
  int64_t width, pitch;  // used and allocated elements of a source row in scratch
  int64_t label_pitch;   // elements of an output row in scratch; tiles write past their last column

  explicit Plan(const UpsampleShape& s)
      : shape(s),
        rows(make_axis(s.out_H, s.H, s.scale_H, s.align_corners, kTileRows)),
        columns(make_axis(s.out_W, s.W, s.scale_W, s.align_corners, kTileColumns)),
        source_columns(take_used_columns(columns.spans)),
        width(static_cast<int64_t>(source_columns.size())),
        pitch(round_up(width + kLanes, kLanes)),
        label_pitch(s.out_W + kTilePitch) {}
};

// Uninitialised array. Zeroing the large ones would take a tenth of the time of a small call.
template <typename T>
struct Buffer {
  explicit Buffer(int64_t size) : values(new T[size]) {}
  T* data() const { return values.get(); }
  T& operator[](int64_t i) const { return values[i]; }
  std::unique_ptr<T[]> values;
};

struct SourceRow {
  explicit SourceRow(const Plan& plan)
      : logits(plan.shape.C * plan.pitch), winner(plan.pitch), sure(plan.pitch) {}
  int64_t index = -1;      // n * H + y
  Buffer<float> logits;    // [C, pitch]
  Buffer<int32_t> winner;  // [pitch] class with the greatest logit
  Buffer<int32_t> sure;    // [pitch] winner if it wins by the margin, else a mark
};

// Memory of one thread.
struct Scratch {
  explicit Scratch(const Plan& plan)
      : rows{SourceRow(plan), SourceRow(plan)},
        best(plan.pitch),
        second(plan.pitch),
        magnitude(plan.pitch),
        bounds(2 * plan.pitch),
        candidates(plan.shape.C + kUnroll),
        labels(kTileRows * plan.label_pitch) {}
  SourceRow rows[2];
  Buffer<float> best, second;  // [pitch] greatest two logits of the row that is being loaded
  Buffer<uint32_t> magnitude;  // [pitch] bits of the greatest |logit|
  Buffer<float> bounds;        // [2, pitch] losing bounds along a tile's two source rows
  Buffer<int32_t> candidates;  // [C + kUnroll]
  Buffer<int32_t> labels;      // [kTileRows, label_pitch] labels of a band
  // Candidates of a tile, interpolated along x in its two source rows, and the greatest value so
  // far. They are zeroed because whole vectors are computed, and leftover denormals would be slow.
  alignas(64) float top[kTileClasses][kTilePitch] = {};
  alignas(64) float bottom[kTileClasses][kTilePitch] = {};
  alignas(64) float value[kTileRows][kTileColumns];
};

// Converts pixels whose classes are contiguous, kPixels at a time, from column `x` on. Returns the
// first column that was not converted.
template <int kPixels, typename Logit>
ALWAYS_INLINE int64_t transpose_from(int64_t x, float* __restrict__ dst,
                                     const Logit* __restrict__ src, const Plan& plan) {
  for (; x + kPixels <= plan.width; x += kPixels) {
    const Logit* pixels[kPixels];
    for (int i = 0; i < kPixels; ++i) {
      pixels[i] = src + plan.source_columns[x + i] * plan.shape.stride_W;
    }
    for (int64_t c = 0; c < plan.shape.C; ++c) {
      for (int i = 0; i < kPixels; ++i) dst[c * plan.pitch + x + i] = to_float(pixels[i][c]);
    }
  }
  return x;
}

template <typename Logit>
ALWAYS_INLINE void convert_row(float* __restrict__ dst, const Logit* __restrict__ src,
                               const Plan& plan) {
  const int64_t C = plan.shape.C, width = plan.width, pitch = plan.pitch;
  const int64_t stride_C = plan.shape.stride_C, stride_W = plan.shape.stride_W;
  const int64_t* columns = plan.source_columns.data();
  if (stride_C == 1) {
    const int64_t rest = transpose_from<4>(0, dst, src, plan);
    transpose_from<1>(rest, dst, src, plan);
  } else if (stride_W == 1 && width == plan.shape.W) {
    for (int64_t c = 0; c < C; ++c) {
      for (int64_t x = 0; x < width; ++x) dst[c * pitch + x] = to_float(src[c * stride_C + x]);
    }
  } else {
    for (int64_t c = 0; c < C; ++c) {
      for (int64_t x = 0; x < width; ++x) {
        dst[c * pitch + x] = to_float(src[c * stride_C + columns[x] * stride_W]);
      }
    }
  }
}

// Updates the running best and second best of a row with the kClasses classes from `first` on.
template <int kClasses>
ALWAYS_INLINE void rank_classes(float* __restrict__ best, float* __restrict__ second,
                                int32_t* __restrict__ winner, uint32_t* __restrict__ magnitude,
                                const float* __restrict__ logits, int32_t first, int64_t pitch) {
  for (int64_t x = 0; x < pitch; ++x) {
    float b = best[x], s = second[x];
    int32_t k = winner[x];
    uint32_t m = magnitude[x];
    for (int j = 0; j < kClasses; ++j) {
      const float value = logits[j * pitch + x];
      const uint32_t bits = float_to_bits(value) & 0x7fffffffu;
      m = bits > m ? bits : m;
      const float loser = value < b ? value : b;
      s = s < loser ? loser : s;
      k = b < value ? first + j : k;
      b = b < value ? value : b;
    }
    best[x] = b;
    second[x] = s;
    winner[x] = k;
    magnitude[x] = m;
  }
}

template <int kClasses>
ALWAYS_INLINE int32_t rank_from(int32_t c, SourceRow& row, Scratch& scratch, const Plan& plan) {
  for (; c + kClasses <= plan.shape.C; c += kClasses) {
    rank_classes<kClasses>(scratch.best.data(), scratch.second.data(), row.winner.data(),
                           scratch.magnitude.data(), row.logits.data() + c * plan.pitch, c,
                           plan.pitch);
  }
  return c;
}

ALWAYS_INLINE void find_winners(SourceRow& row, Scratch& scratch, const Plan& plan) {
  std::fill_n(scratch.best.data(), plan.pitch, -FLT_MAX);
  std::fill_n(scratch.second.data(), plan.pitch, -FLT_MAX);
  std::fill_n(scratch.magnitude.data(), plan.pitch, 0u);
  std::fill_n(row.winner.data(), plan.pitch, 0);
  const int32_t rest = rank_from<kUnroll>(0, row, scratch, plan);
  rank_from<1>(rest, row, scratch, plan);

  const uint32_t infinity = float_to_bits(INFINITY);
  for (int64_t x = 0; x < plan.pitch; ++x) {
    const bool safe = scratch.second[x] <= losing_bound(scratch.best[x]);
    row.sure[x] = scratch.magnitude[x] >= infinity ? kNotFinite : safe ? row.winner[x] : kContested;
  }
}

template <typename Logit>
ALWAYS_INLINE void load_row_typed(SourceRow& row, Scratch& scratch, const Logit* src,
                                  const Plan& plan) {
  convert_row(row.logits.data(), src, plan);
  find_winners(row, scratch, plan);
}

// Overloads instead of a template, because Clang does not clone templates.
TARGET_CLONES void load_row(SourceRow& row, Scratch& scratch, const float* src, const Plan& plan) {
  load_row_typed(row, scratch, src, plan);
}
TARGET_CLONES void load_row(SourceRow& row, Scratch& scratch, const Half* src, const Plan& plan) {
  load_row_typed(row, scratch, src, plan);
}
TARGET_CLONES void load_row(SourceRow& row, Scratch& scratch, const BFloat16* src,
                            const Plan& plan) {
  load_row_typed(row, scratch, src, plan);
}

// Adjacent cells of one band.
struct Tile {
  const SourceRow *top, *bottom;
  const Span *begin, *end;  // cells
  int64_t first_column() const { return begin->lo; }
  int64_t last_column() const { return end[-1].hi; }
};

// Class that wins the whole cell, or a negative mark.
ALWAYS_INLINE int32_t common_winner(const SourceRow& top, const SourceRow& bottom,
                                    const Span& cell) {
  const int32_t k = top.sure[cell.lo];
  const bool agree =
      top.sure[cell.hi] == k && bottom.sure[cell.lo] == k && bottom.sure[cell.hi] == k;
  return agree ? k : kContested;
}

ALWAYS_INLINE bool all_finite(const Tile& tile) {
  bool finite = true;
  for (int64_t x = tile.first_column(); x <= tile.last_column(); ++x) {
    finite &= tile.top->sure[x] != kNotFinite && tile.bottom->sure[x] != kNotFinite;
  }
  return finite;
}

// Finds the distinct winners at the corners of a tile's cells. Returns their number, or 0 if there
// are more than kMaxRivals.
ALWAYS_INLINE int find_rivals(int32_t* rivals, const Tile& tile) {
  int count = 0;
  for (const SourceRow* row : {tile.top, tile.bottom}) {
    for (int64_t x = tile.first_column(); x <= tile.last_column(); ++x) {
      const int32_t k = row->winner[x];
      if (std::find(rivals, rivals + count, k) != rivals + count) continue;
      if (count == kMaxRivals) return 0;
      rivals[count++] = k;
    }
  }
  return count;
}

// Drops the candidates that class k beats at every corner of the tile. Returns the number left.
ALWAYS_INLINE int64_t drop_beaten(Scratch& scratch, int64_t count, const Tile& tile, int32_t k,
                                  int64_t pitch) {
  const int64_t first = tile.first_column();
  const int64_t columns = tile.last_column() - first + 1;
  const float* top = tile.top->logits.data() + first;
  const float* bottom = tile.bottom->logits.data() + first;
  float* top_bound = scratch.bounds.data();
  float* bottom_bound = top_bound + pitch;
  const int64_t padded = round_up(columns, kLanes);
  for (int64_t x = 0; x < padded; ++x) {
    top_bound[x] = x < columns ? losing_bound(top[k * pitch + x]) : INFINITY;
    bottom_bound[x] = x < columns ? losing_bound(bottom[k * pitch + x]) : INFINITY;
  }
  int32_t* candidates = scratch.candidates.data();
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t c = candidates[i];
    int32_t stays = 0;
    for (int64_t x = 0; x < padded; ++x) {
      stays |= top[c * pitch + x] > top_bound[x];
      stays |= bottom[c * pitch + x] > bottom_bound[x];
    }
    candidates[kept] = static_cast<int32_t>(c);
    kept += stays;
  }
  return kept;
}

// Interpolates `classes` candidates of a source row along x, at the output columns of the tile.
ALWAYS_INLINE void interpolate_columns(float (*dst)[kTilePitch], const SourceRow& row,
                                       const int32_t* __restrict__ candidates, int64_t classes,
                                       const Tile& tile, const Plan& plan) {
  for (const Span* cell = tile.begin; cell != tile.end; ++cell) {
    const float* a = row.logits.data() + cell->lo;
    const float* b = row.logits.data() + cell->hi;
    // Whole vectors are written. The next cell overwrites the elements that reach into it.
    for (int64_t x0 = cell->begin; x0 < cell->end; x0 += kCellLanes) {
      float w0[kCellLanes], w1[kCellLanes];
      for (int x = 0; x < kCellLanes; ++x) {
        w0[x] = plan.columns.w0[x0 + x];
        w1[x] = plan.columns.w1[x0 + x];
      }
      for (int64_t i = 0; i < classes; ++i) {
        const float left = a[candidates[i] * plan.pitch], right = b[candidates[i] * plan.pitch];
        float* out = dst[i] + (x0 - tile.begin->begin);
        for (int x = 0; x < kCellLanes; ++x) out[x] = interpolate(left, right, w0[x], w1[x]);
      }
    }
  }
}

// Updates the running maximum along an output row with kUnroll candidates.
template <bool kFinite>
ALWAYS_INLINE void take_candidates(float* __restrict__ value, int32_t* __restrict__ label,
                                   const float (*__restrict__ top)[kTilePitch],
                                   const float (*__restrict__ bottom)[kTilePitch],
                                   const int32_t* __restrict__ candidates, int64_t width, float h0,
                                   float h1) {
  for (int64_t x = 0; x < width; ++x) {
    float best = value[x];
    int32_t k = label[x];
    for (int j = 0; j < kUnroll; ++j) {
      const int32_t candidate = candidates[j];
      const float next = interpolate(top[j][x], bottom[j][x], h0, h1);
      const bool wins = kFinite ? next > best : replaces_best(next, best);
      best = wins ? next : best;
      k = wins ? candidate : k;
    }
    value[x] = best;
    label[x] = k;
  }
}

template <bool kFinite>
ALWAYS_INLINE void compare_candidates(Scratch& scratch, int64_t count, const Tile& tile,
                                      const Span& band, const Plan& plan) {
  const int64_t width = round_up(tile.end[-1].end - tile.begin->begin, kLanes);
  int32_t* candidates = scratch.candidates.data();
  int32_t* labels = scratch.labels.data() + tile.begin->begin;  // the next tile overwrites the rest
  std::fill_n(candidates + count, kUnroll, candidates[count - 1]);  // repeats do not change labels
  for (int64_t y = 0; y < band.end - band.begin; ++y) {
    std::fill_n(scratch.value[y], width, -INFINITY);
    std::fill_n(labels + y * plan.label_pitch, width, candidates[0]);
  }
  for (int64_t first = 0; first < count; first += kTileClasses) {
    const int64_t classes = round_up(std::min<int64_t>(count - first, kTileClasses), kUnroll);
    interpolate_columns(scratch.top, *tile.top, candidates + first, classes, tile, plan);
    interpolate_columns(scratch.bottom, *tile.bottom, candidates + first, classes, tile, plan);
    for (int64_t y = 0; y < band.end - band.begin; ++y) {
      const float h0 = plan.rows.w0[band.begin + y], h1 = plan.rows.w1[band.begin + y];
      for (int64_t i = 0; i < classes; i += kUnroll) {
        take_candidates<kFinite>(scratch.value[y], labels + y * plan.label_pitch, scratch.top + i,
                                 scratch.bottom + i, candidates + first + i, width, h0, h1);
      }
    }
  }
}

ALWAYS_INLINE void find_labels(Scratch& scratch, const Tile& tile, const Span& band,
                               const Plan& plan) {
  int64_t count = plan.shape.C;
  for (int64_t c = 0; c < count; ++c) scratch.candidates[c] = static_cast<int32_t>(c);
  if (!all_finite(tile)) return compare_candidates<false>(scratch, count, tile, band, plan);

  int32_t rivals[kMaxRivals];
  const int num_rivals = find_rivals(rivals, tile);
  for (int i = 0; i < num_rivals; ++i) {
    count = drop_beaten(scratch, count, tile, rivals[i], plan.pitch);
  }
  compare_candidates<true>(scratch, count, tile, band, plan);
}

// Computes the labels of a band, in scratch.
TARGET_CLONES void label_band(Scratch& scratch, const SourceRow& top, const SourceRow& bottom,
                              const Span& band, const Plan& plan) {
  const Span* end = plan.columns.spans.data() + plan.columns.spans.size();
  for (const Span* cell = plan.columns.spans.data(); cell != end;) {
    const int32_t winner = common_winner(top, bottom, *cell);
    const Span* next = cell + 1;
    if (winner >= 0) {
      while (next != end && common_winner(top, bottom, *next) == winner) ++next;
      for (int64_t y = 0; y < band.end - band.begin; ++y) {
        std::fill(scratch.labels.data() + y * plan.label_pitch + cell->begin,
                  scratch.labels.data() + y * plan.label_pitch + next[-1].end, winner);
      }
    } else {
      while (next != end && common_winner(top, bottom, *next) < 0 &&
             next->end - cell->begin <= kTileColumns) {
        ++next;
      }
      find_labels(scratch, {&top, &bottom, cell, next}, band, plan);
    }
    cell = next;
  }
}

// Stores the labels of a band. dst: labels [out_H, out_W] of the image.
template <typename Label>
ALWAYS_INLINE void store_band_typed(Label* __restrict__ dst, const Scratch& scratch,
                                    const Span& band, const Plan& plan) {
  constexpr int kLine = kLineBytes / sizeof(Label);
  const int64_t out_W = plan.shape.out_W;
  const bool stream = plan.shape.N * plan.shape.out_H * out_W * sizeof(Label) >= kMinStreamedBytes;
  for (int64_t y = band.begin; y < band.end; ++y) {
    const int32_t* __restrict__ src = scratch.labels.data() + (y - band.begin) * plan.label_pitch;
    Label* __restrict__ row = dst + y * out_W;
    int64_t x = 0;
    if (stream) {
      const auto misaligned = reinterpret_cast<uintptr_t>(row) % kLineBytes / sizeof(Label);
      const int64_t head = std::min<int64_t>((kLine - misaligned) % kLine, out_W);
      for (; x < head; ++x) row[x] = static_cast<Label>(src[x]);
      for (; x + kLine <= out_W; x += kLine) {
        Label line[kLine];
        for (int i = 0; i < kLine; ++i) line[i] = static_cast<Label>(src[x + i]);
        stream_line(row + x, line);
      }
    }
    for (; x < out_W; ++x) row[x] = static_cast<Label>(src[x]);
  }
}

TARGET_CLONES void store_band(int64_t* dst, const Scratch& scratch, const Span& band,
                              const Plan& plan) {
  store_band_typed(dst, scratch, band, plan);
}
TARGET_CLONES void store_band(int32_t* dst, const Scratch& scratch, const Span& band,
                              const Plan& plan) {
  store_band_typed(dst, scratch, band, plan);
}
TARGET_CLONES void store_band(uint8_t* dst, const Scratch& scratch, const Span& band,
                              const Plan& plan) {
  store_band_typed(dst, scratch, band, plan);
}

template <typename Label, typename Logit>
void run(Label* labels, const Logit* logits, const UpsampleShape& shape, int num_threads) {
  const Plan plan(shape);
  const auto bands_per_image = static_cast<int64_t>(plan.rows.spans.size());
  const int64_t num_bands = shape.N * bands_per_image;
  const int64_t pixels = shape.N * shape.out_H * shape.out_W;
  const auto threads = static_cast<int>(
      std::max<int64_t>(std::min<int64_t>({num_threads, num_bands, pixels / kPixelsPerThread}), 1));
  // Neighbouring bands share a source row, so a thread computes several at a time.
  const int64_t run_length = std::max<int64_t>(num_bands / (threads * 4), 1);
  std::vector<Scratch> scratch;
  scratch.reserve(threads);
  for (int i = 0; i < threads; ++i) scratch.emplace_back(plan);

#pragma omp parallel num_threads(threads)
  {
    Scratch& mine = scratch[omp_get_thread_num()];
#pragma omp for schedule(dynamic, run_length) nowait
    for (int64_t i = 0; i < num_bands; ++i) {
      const int64_t n = i / bands_per_image;
      const Span& band = plan.rows.spans[i % bands_per_image];
      for (const int64_t y : {band.lo, band.hi}) {
        SourceRow& row = mine.rows[y & 1];
        if (row.index == n * shape.H + y) continue;
        row.index = n * shape.H + y;
        load_row(row, mine, logits + n * shape.stride_N + y * shape.stride_H, plan);
      }
      label_band(mine, mine.rows[band.lo & 1], mine.rows[band.hi & 1], band, plan);
      store_band(labels + n * shape.out_H * shape.out_W, mine, band, plan);
    }
    stream_fence();
  }
}

template <typename Label>
Status run_label(Label* labels, const void* logits, const UpsampleShape& shape, DType logit_dtype,
                 int num_threads) {
  switch (logit_dtype) {
    case DType::kFloat32:
      run(labels, static_cast<const float*>(logits), shape, num_threads);
      return {};
    case DType::kFloat16:
      run(labels, static_cast<const Half*>(logits), shape, num_threads);
      return {};
    case DType::kBFloat16:
      run(labels, static_cast<const BFloat16*>(logits), shape, num_threads);
      return {};
    default:
      return {"upsample_argmax_fwd", "logits must be float32, float16 or bfloat16"};
  }
}

}  // namespace

Status upsample_argmax_fwd(void* labels, const void* logits, const UpsampleShape& shape,
                           DType label_dtype, DType logit_dtype, int num_threads) try {
  switch (label_dtype) {
    case DType::kInt64:
      return run_label(static_cast<int64_t*>(labels), logits, shape, logit_dtype, num_threads);
    case DType::kInt32:
      return run_label(static_cast<int32_t*>(labels), logits, shape, logit_dtype, num_threads);
    case DType::kUInt8:
      return run_label(static_cast<uint8_t*>(labels), logits, shape, logit_dtype, num_threads);
    default:
      return {"upsample_argmax_fwd", "labels must be int64, int32 or uint8"};
  }
} catch (const std::exception&) {
  return {"upsample_argmax_fwd", "out of memory"};
}

}  // namespace deeplab_fast::cpu
