// Cross entropy of bilinear(logits[n])(y, x) against target[n, y, x], and its gradient.
// logits [N, C, H, W] fp32 in any strides, per-pixel tensors [N, out_H, out_W].
//
// Output pixels between the same four source pixels form a cell. Each source row is centred once:
// the maximum over classes of each pixel is subtracted, and the logits are scaled by log2(e). The
// softmax does not depend on this shift, because interpolation is linear. Innermost loops run over
// kLanes neighbouring cells, so that corners are loaded without a gather. Down a column of a cell
// logits change linearly and their exponentials geometrically, so two exponentials serve up to
// kRows pixels. If a centred logit is below kTame, these products could underflow. Such "wild"
// blocks subtract each pixel's maximum and compute one exponential per pixel. The backward pass
// recomputes the exponentials of the forward pass bit for bit, and gathers: the gradient of a
// source row is the sum over the cell rows above and below it, in a fixed order.

#include <omp.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <exception>
#include <vector>

#include "api.h"
#include "common/bilinear.h"
#include "exp2_log2.h"
#include "target_clones.h"

namespace deeplab_fast::cpu {
namespace {

constexpr int kLanes = 16;
constexpr int kRows = 8;
constexpr float kTame = -80.0f;
constexpr float kLog2E = 0x1.715476p+0f;
constexpr float kLn2 = 0x1.62e43p-1f;
constexpr int64_t kPixelsPerThread = 4096;  // fewer pixels do not pay for waking a thread

// Zero-initialised array that starts on a cache line, so that no vector of kLanes floats straddles
// two lines.
class Buffer {
 public:
  explicit Buffer(int64_t size = 0) : lines_((size + kLanes - 1) / kLanes) {}
  float* data() { return lines_.data()->lane; }
  const float* data() const { return lines_.data()->lane; }
  void clear() { std::fill(lines_.begin(), lines_.end(), Line{}); }

 private:
  struct alignas(64) Line {
    float lane[kLanes] = {};
  };
  std::vector<Line> lines_;
};

// Cell v lies between source coordinates v - 1 and v, clamped. Cell 0 holds the outputs whose
// coordinate was clamped to 0, so that inside every cell the weights change evenly.
struct Axis {
  std::vector<int64_t> begin;  // [size + 2]; cell v has the outputs begin[v] to begin[v + 1] - 1
  std::vector<float> w0, w1;   // [out_size]

  Axis(int64_t out_size, int64_t size, float scale, bool align_corners)
      : begin(size + 2), w0(out_size), w1(out_size) {
    for (int64_t dst = 0; dst < out_size; ++dst) {
      const SourcePair pair = source_pair(dst, size, scale, align_corners);
      w0[dst] = pair.w0;
      w1[dst] = pair.w1;
      ++begin[pair.lo == 0 && pair.w1 == 0.0f ? 1 : pair.lo + 2];
    }
    for (int64_t v = 0; v <= size; ++v) begin[v + 1] += begin[v];
  }
};

// kLanes neighbouring cells. Slots [k * kLanes, (k + 1) * kLanes) hold the k-th pixel of each.
struct Block {
  int64_t cell;            // first cell
  int64_t x_begin, x_end;  // output columns
  int64_t depth;           // pixels of the widest cell
  int64_t slots;           // first slot of the block in Plan::w0 and w1
};

struct Plan {
  UpsampleShape shape;
  CrossEntropyParams params;
  float total_class_weight;
  Axis rows, columns;
  std::vector<Block> blocks;
  std::vector<int32_t> slot;  // [out_W] slot of an output column, within its block
  Buffer w0, w1;              // [slots] weights; 0 in the slots of narrower cells without a pixel
  int64_t max_slots = 0;
  int64_t pitch;  // elements of a source row; loops read one element past the last block

  Plan(const UpsampleShape& s, const CrossEntropyParams& t)
      : shape(s),
        params(t),
        rows(s.out_H, s.H, s.scale_H, s.align_corners),
        columns(s.out_W, s.W, s.scale_W, s.align_corners),
        slot(s.out_W),
        pitch(s.W / kLanes * kLanes + 2 * kLanes) {
    double total = 0.0;
    for (int64_t c = 0; c < s.C; ++c) total += smoothing_weight(c);
    total_class_weight = static_cast<float>(total);

    // Cell 0 lies between two copies of a source pixel. With weights of 1/2 an infinite pixel stays
    // infinite, where a weight of 0 would give NaN.
    std::fill_n(columns.w0.begin(), columns.begin[1], 0.5f);
    std::fill_n(columns.w1.begin(), columns.begin[1], 0.5f);

    int64_t slots = 0;
    for (int64_t cell = 0; cell <= s.W; cell += kLanes) {
      const int64_t end = std::min(cell + kLanes, s.W + 1);
      int64_t depth = 0;
      for (int64_t v = cell; v < end; ++v) {
        depth = std::max(depth, columns.begin[v + 1] - columns.begin[v]);
        for (int64_t x = columns.begin[v]; x < columns.begin[v + 1]; ++x) {
          slot[x] = static_cast<int32_t>((x - columns.begin[v]) * kLanes + v - cell);
        }
      }
      blocks.push_back({cell, columns.begin[cell], columns.begin[end], depth, slots});
      slots += depth * kLanes;
      max_slots = std::max(max_slots, depth * kLanes);
    }
    w0 = w1 = Buffer(slots);
    for (const Block& block : blocks) {
      for (int64_t x = block.x_begin; x < block.x_end; ++x) {
        w0.data()[block.slots + slot[x]] = columns.w0[x];
        w1.data()[block.slots + slot[x]] = columns.w1[x];
      }
    }
  }

  float class_weight(int64_t c) const { return params.weight ? params.weight[c] : 1.0f; }

  // The weight is 0 without smoothing: the infinite weight of an absent class would give 0 * inf.
  float smoothing_weight(int64_t c) const {
    return params.label_smoothing > 0.0f ? class_weight(c) : 0.0f;
  }
};

// A source row with its first and last pixel repeated: cell v lies between entries v and v + 1.
struct SourceRow {
  int64_t index = -1;  // n * H + y
  Buffer centred;      // [C + 1, pitch] centred logits, and their weighted sum over classes
  Buffer lowest;       // [pitch] lowest centred logit
};

// Output rows [y, y + count) of one cell row.
struct RowGroup {
  int64_t y, count;
  const float *h0, *h1;  // [count] weights of the rows
  float step;            // difference of h1 between two rows

  RowGroup(const Axis& axis, int64_t begin, int64_t end)
      : y(begin),
        count(std::min<int64_t>(end - begin, kRows)),
        h0(axis.w0.data() + begin),
        h1(axis.w1.data() + begin),
        step(count > 1 ? (h1[count - 1] - h1[0]) / static_cast<float>(count - 1) : 0.0f) {}
};

// Gradients of one class at the corners of a block's cells.
struct alignas(64) Corners {
  float top_left[kLanes], top_right[kLanes], bottom_left[kLanes], bottom_right[kLanes];
};

// Memory of one thread.
struct Scratch {
  SourceRow rows[2];
  Buffer best;                   // [pitch]
  Buffer sum, shift;             // [kRows, max_slots]
  Buffer top, bottom;            // [kRows, max_slots] coefficients of the softmax, backward
  Buffer carry;                  // [C + 1, pitch] gradients of a source row, backward
  std::vector<Corners> corners;  // [C + 1, blocks], backward

  Scratch(const Plan& plan, bool backward) {
    const int64_t classes = plan.shape.C + 1, slots = kRows * plan.max_slots;
    for (SourceRow& row : rows) row = {-1, Buffer(classes * plan.pitch), Buffer(plan.pitch)};
    best = Buffer(plan.pitch);
    sum = shift = Buffer(slots);
    if (!backward) return;
    top = bottom = Buffer(slots);
    carry = Buffer(classes * plan.pitch);
    corners.resize(classes * plan.blocks.size());
  }
};

TARGET_CLONES void load_row(SourceRow& row, Scratch& scratch, const float* __restrict__ src,
                            const Plan& plan) {
  const int64_t C = plan.shape.C, W = plan.shape.W, pitch = plan.pitch;
  const int64_t stride_C = plan.shape.stride_C, stride_W = plan.shape.stride_W;
  float* __restrict__ centred = row.centred.data();
  float* __restrict__ weighted = centred + C * pitch;
  float* __restrict__ lowest = row.lowest.data();
  float* __restrict__ best = scratch.best.data();

  if (stride_W == 1) {
    for (int64_t c = 0; c < C; ++c) {
      for (int64_t x = 0; x < W; ++x) centred[c * pitch + x + 1] = src[c * stride_C + x];
    }
  } else {
    for (int64_t x = 0; x < W; ++x) {
      for (int64_t c = 0; c < C; ++c) {
        centred[c * pitch + x + 1] = src[c * stride_C + x * stride_W];
      }
    }
  }

  std::fill(best + 1, best + W + 1, -INFINITY);
  std::fill(lowest + 1, lowest + W + 1, 0.0f);
  std::fill(weighted + 1, weighted + W + 1, 0.0f);
  for (int64_t c = 0; c < C; ++c) {
    const float* __restrict__ logit = centred + c * pitch;
    for (int64_t x = 1; x <= W; ++x) best[x] = logit[x] > best[x] ? logit[x] : best[x];
  }
  for (int64_t c = 0; c < C; ++c) {
    float* __restrict__ logit = centred + c * pitch;
    const float weight = plan.smoothing_weight(c);
    for (int64_t x = 1; x <= W; ++x) {
      float value = (logit[x] - best[x]) * kLog2E;
      // A finite logit stays finite: an infinite one with weight 0 would give NaN.
      value = value < -0x1p126f && logit[x] >= -FLT_MAX ? -0x1p126f : value;
      logit[x] = value;
      lowest[x] = value < lowest[x] ? value : lowest[x];
      weighted[x] += weight * value;
    }
  }
  for (int64_t c = 0; c <= C; ++c) {
    float* logit = centred + c * pitch;
    // Clamped outputs also read source pixel 1, with weight 0, so that 0 * inf gives NaN here too.
    logit[0] = interpolate(logit[1], logit[std::min<int64_t>(W, 2)], 1.0f, 0.0f);
    logit[W + 1] = logit[W];
  }
  lowest[0] = lowest[1];
  lowest[W + 1] = lowest[W];
}

// Cells between source rows v - 1 and v.
struct CellRow {
  int64_t v;
  const SourceRow &top, &bottom;
};

CellRow cell_row(Scratch& scratch, const float* logits, int64_t n, int64_t v, const Plan& plan) {
  const UpsampleShape& s = plan.shape;
  const auto source_row = [&](int64_t y) -> const SourceRow& {
    y = std::clamp<int64_t>(y, 0, s.H - 1);
    SourceRow& row = scratch.rows[y & 1];
    if (row.index != n * s.H + y) {
      row.index = n * s.H + y;
      load_row(row, scratch, logits + n * s.stride_N + y * s.stride_H, plan);
    }
    return row;
  };
  // Clamped outputs have row 0 with weight 1 and row 1 with weight 0, where 0 * inf gives NaN.
  return {v, source_row(v - 1), source_row(std::max<int64_t>(v, 1))};
}

ALWAYS_INLINE bool is_tame(const CellRow& row, const Block& block) {
  float lowest = 0.0f;
  for (int64_t v = block.cell; v <= block.cell + kLanes; ++v) {
    lowest = std::min({lowest, row.top.lowest.data()[v], row.bottom.lowest.data()[v]});
  }
  return lowest >= kTame;
}

// Operands of one class at the k-th pixels of a block's cells.
struct Strip {
  const float* __restrict__ top, * __restrict__ bottom;  // [kLanes + 1] source values
  const float* __restrict__ w0, * __restrict__ w1;       // [kLanes]
};

ALWAYS_INLINE Strip strip_of(const CellRow& row, const Block& block, const Plan& plan, int64_t c,
                             int64_t k) {
  const int64_t source = c * plan.pitch + block.cell, slots = block.slots + k * kLanes;
  return {row.top.centred.data() + source, row.bottom.centred.data() + source,
          plan.w0.data() + slots, plan.w1.data() + slots};
}

// Logits at the top or bottom edge of the cells. The result must be 0 for slots without a pixel,
// whose weights are 0, even if a corner is NaN. This uses a mask, because the compiler does not
// vectorise a branch.
ALWAYS_INLINE float at_edge(const float* source, const Strip& s, int l) {
  const uint32_t used = s.w0[l] + s.w1[l] > 0.0f ? ~0u : 0u;
  const float z = interpolate(source[l], source[l + 1], s.w0[l], s.w1[l]);
  return bits_to_float(float_to_bits(z) & used);
}

// Exponentials at the first row of a group, and their ratio from row to row.
struct Progression {
  float e[kLanes], ratio[kLanes];
};

ALWAYS_INLINE void start(Progression& p, const Strip& strip, const RowGroup& group) {
#pragma omp simd
  for (int l = 0; l < kLanes; ++l) {
    const float top = at_edge(strip.top, strip, l), bottom = at_edge(strip.bottom, strip, l);
    p.e[l] = fast_exp2(interpolate(top, bottom, group.h0[0], group.h1[0]));
    p.ratio[l] = fast_exp2((bottom - top) * group.step);
  }
}

// 2^x for x <= 0, or 0 if x is below kTame: smaller values are negligible beside 1, and products
// with them would be denormal and slow.
ALWAYS_INLINE float exp2_or_0(float x) {
  return bits_to_float(float_to_bits(fast_exp2(x)) & (x < kTame ? 0u : ~0u));
}

ALWAYS_INLINE void add_tame_exponentials(float* __restrict__ sum, const Strip& strip,
                                         const RowGroup& group, int64_t pitch) {
  Progression p;
  start(p, strip, group);
  for (int64_t y = 0; y < group.count; ++y) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      sum[y * pitch + l] += p.e[l];
      p.e[l] *= p.ratio[l];
    }
  }
}

ALWAYS_INLINE void take_maximum(float* __restrict__ maximum, const Strip& strip,
                                const RowGroup& group, int64_t pitch) {
  for (int64_t y = 0; y < group.count; ++y) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const float z = interpolate(at_edge(strip.top, strip, l), at_edge(strip.bottom, strip, l),
                                  group.h0[y], group.h1[y]);
      maximum[y * pitch + l] = z > maximum[y * pitch + l] ? z : maximum[y * pitch + l];
    }
  }
}

ALWAYS_INLINE void add_exponentials(float* __restrict__ sum, const float* __restrict__ shift,
                                    const Strip& strip, const RowGroup& group, int64_t pitch) {
  for (int64_t y = 0; y < group.count; ++y) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const float z = interpolate(at_edge(strip.top, strip, l), at_edge(strip.bottom, strip, l),
                                  group.h0[y], group.h1[y]);
      sum[y * pitch + l] += exp2_or_0(z - shift[y * pitch + l]);
    }
  }
}

// scratch.sum[y, slot] = sum over classes of 2^(logit - scratch.shift[y, slot]). In a tame block
// the shift is 0, otherwise it is the greatest logit.
ALWAYS_INLINE void sum_exponentials(Scratch& scratch, bool tame, const CellRow& row,
                                    const Block& block, const RowGroup& group, const Plan& plan) {
  const int64_t C = plan.shape.C, pitch = plan.max_slots, slots = block.depth * kLanes;
  for (int64_t y = 0; y < group.count; ++y) {
    std::fill_n(scratch.sum.data() + y * pitch, slots, 0.0f);
    std::fill_n(scratch.shift.data() + y * pitch, slots, tame ? 0.0f : -INFINITY);
  }
  for (int64_t k = 0; k < block.depth; ++k) {
    float* sum = scratch.sum.data() + k * kLanes;
    float* shift = scratch.shift.data() + k * kLanes;
    if (tame) {
      for (int64_t c = 0; c < C; ++c) {
        add_tame_exponentials(sum, strip_of(row, block, plan, c, k), group, pitch);
      }
    } else {
      for (int64_t c = 0; c < C; ++c) {
        take_maximum(shift, strip_of(row, block, plan, c, k), group, pitch);
      }
      for (int64_t c = 0; c < C; ++c) {
        add_exponentials(sum, shift, strip_of(row, block, plan, c, k), group, pitch);
      }
    }
  }
}

struct RowSums {
  double loss = 0.0, weight = 0.0;
  int64_t bad_x = -1;  // first pixel whose target is not a class
};

// Outputs and targets of one image.
struct ImageLosses {
  float* loss;  // [out_H, out_W] or nullptr
  float* log_sum_exp;
  const int64_t* target;
  RowSums* sums;  // [out_H]
};

ALWAYS_INLINE void take_losses(const ImageLosses& image, Scratch& scratch, const CellRow& row,
                               const Block& block, const RowGroup& group, const Plan& plan) {
  for (int64_t y = 0; y < group.count; ++y) {
    float* __restrict__ sum = scratch.sum.data() + y * plan.max_slots;
    for (int64_t s = 0; s < block.depth * kLanes; ++s) sum[s] = fast_log2(sum[s]);
  }
  const int64_t C = plan.shape.C;
  const float target_part = 1.0f - plan.params.label_smoothing;
  const float smooth_part = plan.params.label_smoothing / static_cast<float>(C);
  for (int64_t i = 0; i < group.count; ++i) {
    const float* log_sums = scratch.sum.data() + i * plan.max_slots;
    const float* shifts = scratch.shift.data() + i * plan.max_slots;
    RowSums sums = image.sums[group.y + i];
    for (int64_t x = block.x_begin; x < block.x_end; ++x) {
      const int64_t pixel = (group.y + i) * plan.shape.out_W + x, target = image.target[pixel];
      const int64_t cell = block.cell + plan.slot[x] % kLanes;
      const auto logit = [&](int64_t c) __attribute__((always_inline)) {
        const float* a = row.top.centred.data() + c * plan.pitch + cell;
        const float* b = row.bottom.centred.data() + c * plan.pitch + cell;
        return interpolate(a[0], a[1], b[0], b[1], plan.columns.w0[x], plan.columns.w1[x],
                           group.h0[i], group.h1[i]);
      };
      const float log_sum = log_sums[plan.slot[x]], shift = shifts[plan.slot[x]];
      float loss = 0.0f;
      if (target != plan.params.ignore_index) {
        if (target < 0 || target >= C) {
          if (sums.bad_x < 0) sums.bad_x = x;
          continue;
        }
        const float weight = plan.class_weight(target);
        loss = target_part * weight * (shift - logit(target) + log_sum);
        if (smooth_part > 0.0f) {
          loss += smooth_part * (plan.total_class_weight * (shift + log_sum) - logit(C));
        }
        loss *= kLn2;
        sums.loss += loss;
        sums.weight += weight;
      }
      image.log_sum_exp[pixel] = (shift + log_sum) * kLn2;
      if (image.loss) image.loss[pixel] = loss;
    }
    image.sums[group.y + i] = sums;
  }
}

TARGET_CLONES void cell_row_losses(const ImageLosses& image, Scratch& scratch, const CellRow& row,
                                   const Plan& plan) {
  const int64_t end = plan.rows.begin[row.v + 1];
  for (int64_t y = plan.rows.begin[row.v]; y < end; y += kRows) {
    const RowGroup group(plan.rows, y, end);
    for (const Block& block : plan.blocks) {
      sum_exponentials(scratch, is_tame(row, block), row, block, group, plan);
      take_losses(image, scratch, row, block, group, plan);
    }
  }
}

ALWAYS_INLINE Corners& corners_of(Scratch& scratch, const Block& block, const Plan& plan,
                                  int64_t c) {
  return scratch.corners[c * plan.blocks.size() + block.cell / kLanes];
}

// Inputs of the backward pass of one image.
struct ImageGradients {
  const float* grad_loss;  // [out_H, out_W] in any strides
  int64_t grad_loss_stride_H, grad_loss_stride_W;
  const float* log_sum_exp;
  const int64_t* target;
};

// Sets the slots of a group: coefficients of the softmax, and log2 of its denominator as `sum`. The
// part of the gradient that comes from the target is added directly to the corners, and the part
// that comes from label smoothing to the corners of an additional class C.
ALWAYS_INLINE void take_targets(const ImageGradients& image, Scratch& scratch, const Block& block,
                                const RowGroup& group, const Plan& plan) {
  const int64_t C = plan.shape.C;
  const float target_part = 1.0f - plan.params.label_smoothing;
  const float smooth_part = plan.params.label_smoothing / static_cast<float>(C);
  for (int64_t i = 0; i < group.count; ++i) {
    const float h0 = group.h0[i], h1 = group.h1[i];
    float* top = scratch.top.data() + i * plan.max_slots;
    float* bottom = scratch.bottom.data() + i * plan.max_slots;
    float* log_sum = scratch.sum.data() + i * plan.max_slots;
    for (float* values : {top, bottom, log_sum}) std::fill_n(values, block.depth * kLanes, 0.0f);
    const float* grad_loss = image.grad_loss + (group.y + i) * image.grad_loss_stride_H;
    for (int64_t x = block.x_begin; x < block.x_end; ++x) {
      const int64_t pixel = (group.y + i) * plan.shape.out_W + x, target = image.target[pixel];
      const int32_t slot = plan.slot[x];
      // The gradient of an ignored pixel is 0 times its softmax, as in PyTorch: NaN if a logit is
      // NaN.
      log_sum[slot] = image.log_sum_exp[pixel] * kLog2E;
      if (target == plan.params.ignore_index) continue;
      if (target < 0 || target >= C) {  // the forward pass raised an error
        top[slot] = bottom[slot] = NAN;
        continue;
      }
      const float w0 = plan.columns.w0[x], w1 = plan.columns.w1[x];
      const auto subtract = [&](int64_t c, float value) __attribute__((always_inline)) {
        Corners& corners = corners_of(scratch, block, plan, c);
        const int l = slot % kLanes;
        corners.top_left[l] -= value * h0 * w0;
        corners.top_right[l] -= value * h0 * w1;
        corners.bottom_left[l] -= value * h1 * w0;
        corners.bottom_right[l] -= value * h1 * w1;
      };
      const float grad = grad_loss[x * image.grad_loss_stride_W];
      const float hit = target_part * plan.class_weight(target) * grad;
      const float smooth = smooth_part * grad;
      subtract(target, hit);
      if (smooth_part > 0.0f) subtract(C, smooth);
      const float softmax = hit + smooth * plan.total_class_weight;
      top[slot] = softmax * h0;
      bottom[slot] = softmax * h1;
    }
  }
}

// Adds the gradients at the top and bottom edges of the cells to the gradients of their corners.
ALWAYS_INLINE void spread(Corners& corners, const Strip& s, const float* top, const float* bottom) {
#pragma omp simd
  for (int l = 0; l < kLanes; ++l) {
    corners.top_left[l] = fma_rn(top[l], s.w0[l], corners.top_left[l]);
    corners.top_right[l] = fma_rn(top[l], s.w1[l], corners.top_right[l]);
    corners.bottom_left[l] = fma_rn(bottom[l], s.w0[l], corners.bottom_left[l]);
    corners.bottom_right[l] = fma_rn(bottom[l], s.w1[l], corners.bottom_right[l]);
  }
}

ALWAYS_INLINE void add_tame_softmax(Corners& corners, const float* __restrict__ top_coef,
                                    const float* __restrict__ bottom_coef, const Strip& strip,
                                    const RowGroup& group, int64_t pitch) {
  float top[kLanes] = {}, bottom[kLanes] = {};
  Progression p;
  start(p, strip, group);
  for (int64_t y = 0; y < group.count; ++y) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      top[l] = fma_rn(top_coef[y * pitch + l], p.e[l], top[l]);
      bottom[l] = fma_rn(bottom_coef[y * pitch + l], p.e[l], bottom[l]);
      p.e[l] *= p.ratio[l];
    }
  }
  spread(corners, strip, top, bottom);
}

ALWAYS_INLINE void add_softmax(Corners& corners, const float* __restrict__ top_coef,
                               const float* __restrict__ bottom_coef,
                               const float* __restrict__ shift, const Strip& strip,
                               const RowGroup& group, int64_t pitch) {
  float top[kLanes] = {}, bottom[kLanes] = {};
  for (int64_t y = 0; y < group.count; ++y) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const float z = interpolate(at_edge(strip.top, strip, l), at_edge(strip.bottom, strip, l),
                                  group.h0[y], group.h1[y]);
      const float e = exp2_or_0(z - shift[y * pitch + l]);
      top[l] = fma_rn(top_coef[y * pitch + l], e, top[l]);
      bottom[l] = fma_rn(bottom_coef[y * pitch + l], e, bottom[l]);
    }
  }
  spread(corners, strip, top, bottom);
}

ALWAYS_INLINE void add_softmaxes(Scratch& scratch, const CellRow& row, const Block& block,
                                 const RowGroup& group, const Plan& plan) {
  const bool tame = is_tame(row, block);
  const int64_t pitch = plan.max_slots;
  // The saved log-sum-exp has lost digits of the logarithm if the shift is large.
  if (!tame) sum_exponentials(scratch, tame, row, block, group, plan);
  for (int64_t y = 0; y < group.count; ++y) {
    const float* __restrict__ sum = scratch.sum.data() + y * pitch;
    float* __restrict__ top_coef = scratch.top.data() + y * pitch;
    float* __restrict__ bottom_coef = scratch.bottom.data() + y * pitch;
    for (int64_t s = 0; s < block.depth * kLanes; ++s) {
      const float scale = tame ? fast_exp2(-sum[s]) : 1.0f / sum[s];
      top_coef[s] *= scale;
      bottom_coef[s] *= scale;
    }
  }
  for (int64_t c = 0; c < plan.shape.C; ++c) {
    Corners& corners = corners_of(scratch, block, plan, c);
    for (int64_t k = 0; k < block.depth; ++k) {
      const Strip strip = strip_of(row, block, plan, c, k);
      const float* top_coef = scratch.top.data() + k * kLanes;
      const float* bottom_coef = scratch.bottom.data() + k * kLanes;
      if (tame) {
        add_tame_softmax(corners, top_coef, bottom_coef, strip, group, pitch);
      } else {
        const float* shift = scratch.shift.data() + k * kLanes;
        add_softmax(corners, top_coef, bottom_coef, shift, strip, group, pitch);
      }
    }
  }
}

// scratch.corners = gradients at the corners of one cell row.
TARGET_CLONES void cell_row_gradients(const ImageGradients& image, Scratch& scratch,
                                      const CellRow& row, const Plan& plan) {
  std::fill(scratch.corners.begin(), scratch.corners.end(), Corners{});
  const int64_t end = plan.rows.begin[row.v + 1];
  for (int64_t y = plan.rows.begin[row.v]; y < end; y += kRows) {
    const RowGroup group(plan.rows, y, end);
    for (const Block& block : plan.blocks) {
      take_targets(image, scratch, block, group, plan);
      add_softmaxes(scratch, row, block, group, plan);
    }
  }
}

// scratch.carry += sums of the corners at the top or bottom edge of a cell row.
TARGET_CLONES void carry_edge(Scratch& scratch, bool bottom, const Plan& plan) {
  for (int64_t c = 0; c <= plan.shape.C; ++c) {
    for (const Block& block : plan.blocks) {
      const Corners& corners = corners_of(scratch, block, plan, c);
      const float* left = bottom ? corners.bottom_left : corners.top_left;
      const float* right = bottom ? corners.bottom_right : corners.top_right;
      float* carry = scratch.carry.data() + c * plan.pitch + block.cell;
      for (int l = 0; l < kLanes; ++l) carry[l] += left[l];
      for (int l = 0; l < kLanes; ++l) carry[l + 1] += right[l];
    }
  }
}

// Writes row y of an image's gradient [C, H, W]. The gradients of the repeated first and last pixel
// are added to those of the pixels themselves.
void write_row(float* grad_logits, const Scratch& scratch, int64_t y, const Plan& plan) {
  const int64_t C = plan.shape.C, H = plan.shape.H, W = plan.shape.W;
  const float* smooth = scratch.carry.data() + C * plan.pitch;
  for (int64_t c = 0; c < C; ++c) {
    const float* carry = scratch.carry.data() + c * plan.pitch;
    const float weight = plan.smoothing_weight(c);
    float* row = grad_logits + (c * H + y) * W;
    for (int64_t x = 0; x < W; ++x) row[x] = carry[x + 1] + weight * smooth[x + 1];
    row[0] += carry[0] + weight * smooth[0];
    row[W - 1] += carry[W + 1] + weight * smooth[W + 1];
  }
}

// Writes rows [begin, end) of an image's gradient. Cell row v lies between rows v - 1 and v.
void differentiate_rows(float* grad_logits, const ImageGradients& image, Scratch& scratch,
                        const float* logits, int64_t n, int64_t begin, int64_t end,
                        const Plan& plan) {
  for (int64_t v = begin; v <= end; ++v) {
    cell_row_gradients(image, scratch, cell_row(scratch, logits, n, v, plan), plan);
    if (v > begin) {
      carry_edge(scratch, false, plan);
      if (v == plan.shape.H) carry_edge(scratch, true, plan);
      write_row(grad_logits, scratch, v - 1, plan);
    }
    scratch.carry.clear();
    carry_edge(scratch, v > 0, plan);  // cell row 0 contributes its top edge only
  }
}

int threads_for(const UpsampleShape& shape, int64_t items, int num_threads) {
  const int64_t useful = shape.N * shape.out_H * shape.out_W / kPixelsPerThread;
  return static_cast<int>(std::max<int64_t>(std::min<int64_t>({num_threads, items, useful}), 1));
}

void forward(float* loss, float* log_sum_exp, CrossEntropySums* sums, const float* logits,
             const int64_t* target, const Plan& plan, int num_threads) {
  const UpsampleShape& s = plan.shape;
  const int64_t pixels = s.out_H * s.out_W, num_cell_rows = s.N * (s.H + 1);
  const int threads = threads_for(s, num_cell_rows, num_threads);
  // Neighbouring cell rows share a source row, so a thread computes several at a time.
  const int64_t run_length = std::max<int64_t>(num_cell_rows / (threads * 8), 1);
  std::vector<Scratch> scratch(threads, Scratch(plan, false));
  std::vector<RowSums> row_sums(s.N * s.out_H);

#pragma omp parallel for num_threads(threads) schedule(dynamic, run_length)
  for (int64_t i = 0; i < num_cell_rows; ++i) {
    const int64_t n = i / (s.H + 1), v = i % (s.H + 1);
    if (plan.rows.begin[v] == plan.rows.begin[v + 1]) continue;
    Scratch& mine = scratch[omp_get_thread_num()];
    const ImageLosses image{loss ? loss + n * pixels : nullptr, log_sum_exp + n * pixels,
                            target + n * pixels, row_sums.data() + n * s.out_H};
    cell_row_losses(image, mine, cell_row(mine, logits, n, v, plan), plan);
  }

  *sums = {0.0, 0.0, -1};
  for (int64_t row = 0; row < s.N * s.out_H; ++row) {
    sums->loss += row_sums[row].loss;
    sums->weight += row_sums[row].weight;
    if (sums->bad_pixel < 0 && row_sums[row].bad_x >= 0) {
      sums->bad_pixel = row * s.out_W + row_sums[row].bad_x;
    }
  }
}

void backward(float* grad_logits, const float* grad_loss,
              const std::array<int64_t, 3>& grad_loss_strides, const float* log_sum_exp,
              const float* logits, const int64_t* target, const Plan& plan, int num_threads) {
  const UpsampleShape& s = plan.shape;
  const int64_t pixels = s.out_H * s.out_W;
  const int threads = threads_for(s, s.N * s.H, num_threads);
  // The first cell row of a band is also computed for the band before it.
  const int64_t bands_per_image = std::clamp<int64_t>(threads * 4 / s.N, 1, s.H);
  const int64_t band_rows = (s.H + bands_per_image - 1) / bands_per_image;
  std::vector<Scratch> scratch(threads, Scratch(plan, true));

#pragma omp parallel for num_threads(threads) schedule(dynamic) collapse(2)
  for (int64_t n = 0; n < s.N; ++n) {
    for (int64_t begin = 0; begin < s.H; begin += band_rows) {
      const ImageGradients image{grad_loss + n * grad_loss_strides[0], grad_loss_strides[1],
                                 grad_loss_strides[2], log_sum_exp + n * pixels,
                                 target + n * pixels};
      differentiate_rows(grad_logits + n * s.C * s.H * s.W, image, scratch[omp_get_thread_num()],
                         logits, n, begin, std::min(begin + band_rows, s.H), plan);
    }
  }
}

}  // namespace

Status upsample_cross_entropy_fwd(float* loss, float* log_sum_exp, CrossEntropySums* sums,
                                  const float* logits, const int64_t* target,
                                  const UpsampleShape& shape, const CrossEntropyParams& params,
                                  int num_threads) try {
  forward(loss, log_sum_exp, sums, logits, target, Plan(shape, params), num_threads);
  return {};
} catch (const std::exception&) {
  return {"upsample_cross_entropy_fwd", "out of memory"};
}

Status upsample_cross_entropy_bwd(float* grad_logits, const float* grad_loss,
                                  const std::array<int64_t, 3>& grad_loss_strides,
                                  const float* log_sum_exp, const float* logits,
                                  const int64_t* target, const UpsampleShape& shape,
                                  const CrossEntropyParams& params, int num_threads) try {
  if (shape.N == 0) return {};
  backward(grad_logits, grad_loss, grad_loss_strides, log_sum_exp, logits, target,
           Plan(shape, params), num_threads);
  return {};
} catch (const std::exception&) {
  return {"upsample_cross_entropy_bwd", "out of memory"};
}

}  // namespace deeplab_fast::cpu
