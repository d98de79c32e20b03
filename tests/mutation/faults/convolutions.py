"""Faults of the convolution kernels and their work lists."""

from __future__ import annotations

from .guards import (
    BESIDE,
    FAR_CONV,
    FAR_DEPTHWISE,
    FAR_MEANS,
    MEAN,
    NON_FINITE,
    SINGLE_ROW,
    SM90_FORMS,
    WGRAD,
    WGRAD_SM90,
    Fault,
)

FAULTS: dict[str, list[Fault]] = {
    "csrc/schedule/work_list.h": [
        Fault(
            "the row below the map is inside",
            "static_cast<uint32_t>(tap.dy) < static_cast<uint32_t>(H)",
            "static_cast<uint32_t>(tap.dy) <= static_cast<uint32_t>(H)",
        ),
    ],
    "csrc/schedule/tap_tiles.cpp": [
        Fault("zone edge off by one", "d < 0 ? -d : size - d", "d < 0 ? -d : size - d - 1"),
        Fault("zone edge of negative taps off by one", "d < 0 ? -d :", "d < 0 ? 1 - d :"),
        Fault(
            "input gradient with the signs of the forward pass",
            "flipped ? -forward : forward",
            "forward",
        ),
        Fault(
            "dilations swapped",
            "offset(r, kernel_H, dilation_H, H), offset(s, kernel_W, dilation_W, W)",
            "offset(r, kernel_H, dilation_W, H), offset(s, kernel_W, dilation_H, W)",
        ),
        Fault("tap index by columns", "r * kernel_W + s}", "r * kernel_H + s}"),
        Fault("no union of a tile's taps", "open[i] |= zone.taps[i];", "open[i] = zone.taps[i];"),
        Fault("last partial tile lost", "if (fill > 0) emit(", "if (false) emit("),
        Fault("rectangle on the wrong side", "std::max(0, -tap.dy)", "std::max(0, tap.dy)"),
        Fault("pixels of another image", "(n * H + y) * W + x);", "(n * W + y) * W + x);"),
        Fault(
            "far taps not clipped",
            "std::clamp<int64_t>(flipped ? -forward : forward, -size, size)",
            "flipped ? -forward : forward",
        ),
        Fault(
            "zones of every row in the same direction",
            "if (i % 2 == 1) std::reverse",
            "if (i % 2 == 2) std::reverse",
        ),
        Fault(
            "zones in the order of their sizes",
            "return from_size < from_snake ? by_size : order;",
            "return by_size;",
        ),
        Fault(
            "no search for a better order",
            "for (bool improved = true; improved;) {",
            "for (bool improved = false; improved;) {",
        ),
        Fault(
            "a worse order kept",
            "if (cost >= best) return false;",
            "if (cost < best) return false;",
        ),
    ],
    "csrc/schedule/split_k.cpp": [
        Fault(
            "no cost per item",
            "begin + item.num_k_iters + costs.item + (item.slot",
            "begin + item.num_k_iters + (item.slot",
        ),
        Fault(
            "pieces fill a CTA without their own cost",
            "const int64_t piece = limit - used - costs.item - costs.split;",
            "const int64_t piece = limit - used - costs.split;",
        ),
        Fault(
            "pieces shorter than the cost of a split",
            "const int64_t shortest = std::max<int64_t>(1, costs.split);",
            "const int64_t shortest = 1;",
        ),
        Fault(
            "shortest items first",
            "return a.num_k_iters > b.num_k_iters;",
            "return a.num_k_iters < b.num_k_iters;",
        ),
        Fault(
            "last piece of a split tile lost",
            "for (int64_t p = 1; p <= pieces; ++p)",
            "for (int64_t p = 1; p < pieces; ++p)",
        ),
        Fault(
            "last slot of a split tile not added",
            "first_slot, static_cast<int32_t>(ends.size())}",
            "first_slot, static_cast<int32_t>(ends.size() - 1)}",
        ),
        Fault("pieces overlap", "        begin = end;\n", "        begin = end - 1;\n"),
        Fault("no wrap-around rule", "part = 64; part <= 96;", "part = 64; part < 64;"),
        Fault(
            "split for any gain",
            "best_makespan + best_makespan / 100 < whole_makespan",
            "best_makespan < whole_makespan",
        ),
        Fault(
            "split only if twice as fast",
            "best_makespan + best_makespan / 100 < whole_makespan",
            "2 * best_makespan < whole_makespan",
        ),
        Fault(
            "no equal pieces",
            "for (int64_t part = 128; part >= 16; part -= 4)",
            "for (int64_t part = 128; part > 128; part -= 4)",
        ),
        Fault(
            "no cost of a split",
            "costs.item + (item.slot < 0 ? 0 : costs.split);",
            "costs.item;",
        ),
        Fault(
            "a CTA is free when it starts",
            "loads.push({end, cta});",
            "loads.push({begin, cta});",
        ),
    ],
    "csrc/cuda/aspp/aspp.cu": [
        Fault(
            "no barrier before the vector is read",
            "__syncthreads();\n\n  constexpr int kSize",
            "constexpr int kSize",
        ),
        Fault("sums of half a warp", "for (int distance = 16;", "for (int distance = 8;"),
        Fault("linear without bias", "sum += to_float(bias[k]);", ""),
        Fault("pooled branch without ReLU", "relu && sum < 0.0f ? 0.0f : sum;", "sum;"),
        Fault(
            "offset of an image in 32 bits",
            "const int64_t image = blockIdx.x / blocks;",
            "const int image = blockIdx.x / blocks;",
            FAR_MEANS,
        ),
        Fault(
            "offset of a row of weights in 32 bits",
            "weight + k * weight_stride + c",
            "weight + static_cast<int>(k * weight_stride) + c",
            FAR_MEANS,
        ),
        Fault(
            "ReLU of the pooled branch drops NaN",
            "relu && sum < 0.0f ? 0.0f : sum;",
            "relu ? fmaxf(sum, 0.0f) : sum;",
            NON_FINITE,
        ),
        Fault(
            "infinite means left out",
            "vector[c] = input[image * C + c];",
            "vector[c] = fminf(input[image * C + c], 65504.0f);",
            NON_FINITE,
        ),
        Fault(
            "NaN of a bias not added",
            "sum += to_float(bias[k]);",
            "if (to_float(bias[k]) == to_float(bias[k])) sum += to_float(bias[k]);",
            NON_FINITE,
        ),
    ],
    "csrc/cuda/conv/conv_epilogue.cuh": [
        Fault("bias not added", "value[i] += bias[i] + residual[i];", "value[i] += residual[i];"),
        Fault("residual not added", "value[i] += bias[i] + residual[i];", "value[i] += bias[i];"),
        Fault(
            "bias of the first image for all",
            "int64_t{pixel / (shape.H * shape.W)} * output.K + k",
            "k",
        ),
        Fault(
            "NaN becomes the bound",
            "if (value[i] < params.low) value[i] = params.low;",
            "if (!(value[i] >= params.low)) value[i] = params.low;",
        ),
        Fault("no upper bound", "if (value[i] > params.high) value[i] = params.high;", ""),
        Fault(
            "vectors at odd channels",
            "count == 4 && (shape.out_channels | output.first_channel) % 4 == 0",
            "count == 4",
        ),
        Fault(
            "channels past the branch's last written",
            "if (i < count) round_to(p[i], value[i]);",
            "round_to(p[i], value[i]);",
        ),
        Fault(
            "first channel of a branch forgotten",
            "* shape.out_channels + output.first_channel + k",
            "* shape.out_channels + k",
        ),
        Fault(
            "a partial sum left out of the reduction",
            "for (int i = 0; i < reduction.num_slots; ++i) {",
            "for (int i = 1; i < reduction.num_slots; ++i) {",
        ),
        Fault(
            "bias not added to split tiles",
            "  epilogue.finish(pixel, sum);\n  epilogue.write(pixel, sum);",
            "  epilogue.write(pixel, sum);",
        ),
        Fault(
            "reduction of the rows above",
            "const int row = blockIdx.x % kBlocks * kRows + threadIdx.x / kRowThreads;",
            "const int row = blockIdx.x % kBlocks * kRows;",
        ),
        Fault("no split tile reduced", "if (work.num_reductions == 0) return {};", "return {};"),
        Fault(
            "bias of an image left out of the gradient",
            "if (image_bias != nullptr && i < count) value[i] += image_bias[i];",
            "",
            MEAN,
        ),
        Fault(
            "offset of the output in 32 bits",
            "return static_cast<int64_t>(pixel) * shape.out_channels + output",
            "return pixel * shape.out_channels + output",
            FAR_CONV,
        ),
        Fault(
            "offset of an image's bias in 32 bits",
            "int64_t{pixel / (shape.H * shape.W)} * output.K + k",
            "pixel / (shape.H * shape.W) * output.K + k",
            FAR_CONV,
        ),
        Fault(
            "offset of a workspace slot in 32 bits",
            "const int64_t slot = reduction.first_slot + i;",
            "const int slot = reduction.first_slot + i;",
            FAR_CONV,
        ),
        Fault(
            "the lower bound drops NaN",
            "if (value[i] < params.low) value[i] = params.low;",
            "value[i] = fmaxf(value[i], params.low);",
            NON_FINITE,
        ),
        Fault(
            "the upper bound drops NaN",
            "if (value[i] > params.high) value[i] = params.high;",
            "value[i] = fminf(value[i], params.high);",
            NON_FINITE,
        ),
        Fault(
            "NaN of the residual not added",
            "value[i] += bias[i] + residual[i];",
            "value[i] += bias[i] + (residual[i] == residual[i] ? residual[i] : 0.0f);",
            NON_FINITE,
        ),
        Fault(
            "an infinite bias not added",
            "value[i] += bias[i] + residual[i];",
            "value[i] += (fabsf(bias[i]) < INFINITY ? bias[i] : 0.0f) + residual[i];",
            NON_FINITE,
        ),
        Fault(
            "residual behind the bounds",
            "value[i] += bias[i] + residual[i];\n"
            "      if (image_bias != nullptr && i < count) value[i] += image_bias[i];\n"
            "      // Comparisons with NaN are false, so NaN stays NaN.\n"
            "      if (value[i] < params.low) value[i] = params.low;\n"
            "      if (value[i] > params.high) value[i] = params.high;",
            "value[i] += bias[i];\n"
            "      if (image_bias != nullptr && i < count) value[i] += image_bias[i];\n"
            "      if (value[i] < params.low) value[i] = params.low;\n"
            "      if (value[i] > params.high) value[i] = params.high;\n"
            "      value[i] += residual[i];",
            NON_FINITE,
        ),
        Fault(
            "bias twice in split tiles",
            "  float sum[4] = {};",
            "  float sum[4] = {epilogue.bias[0], epilogue.bias[1], "
            "epilogue.bias[2], epilogue.bias[3]};",
            NON_FINITE,
        ),
        Fault(
            "a partial sum that is NaN left out",
            "sum[c] += partial[c];",
            "sum[c] += partial[c] == partial[c] ? partial[c] : 0.0f;",
            NON_FINITE,
        ),
        Fault(
            "each partial sum bounded below",
            "sum[c] += partial[c];",
            "sum[c] += partial[c] < params.low ? params.low : partial[c];",
            NON_FINITE,
        ),
        Fault(
            "last channel without the bias of an image",
            "if (image_bias != nullptr && i < count)",
            "if (image_bias != nullptr && i + 1 < count)",
            NON_FINITE,
        ),
    ],
    "csrc/cuda/depthwise/depthwise.cuh": [
        Fault(
            "a residue has one pixel too few",
            "const int in_longer = num_longer * (shorter + 1);",
            "const int in_longer = num_longer * shorter;",
        ),
        Fault(
            "strips overlap",
            "min(begin + shape.strip_rows, shape.H)}",
            "min(begin + shape.strip_rows - 1, shape.H)}",
        ),
        Fault(
            "rows not flipped",
            "if (!shape.flipped) return {y, shape.dilation_H, count};",
            "return {y, shape.dilation_H, count};",
        ),
        Fault(
            "a run goes past the strip",
            "const int count = min(end - position,",
            "const int count = min(shape.H,",
        ),
    ],
    "csrc/cuda/depthwise/depthwise_conv2d.cu": [
        Fault(
            "pixels left of the map",
            "has_column[s] = x >= 0 && x < shape.W;",
            "has_column[s] = x < shape.W;",
        ),
        Fault(
            "pixels right of the map",
            "has_column[s] = x >= 0 && x < shape.W;",
            "has_column[s] = x >= 0;",
        ),
        Fault(
            "rows below the map",
            "inside += after >= 0 && after < shape.H;",
            "inside += after >= 0;",
        ),
        Fault(
            "weights transposed",
            "taps[at % kTaps][at / kTaps] = part[j];",
            "taps[at / kVector][at % kVector] = part[j];",
        ),
        Fault(
            "columns not flipped",
            "const int step_W = shape.flipped ? -shape.dilation_W : shape.dilation_W;",
            "const int step_W = shape.dilation_W;",
        ),
        Fault(
            "dilations swapped",
            "const int step_W = shape.flipped ? -shape.dilation_W : shape.dilation_W;",
            "const int step_W = shape.flipped ? -shape.dilation_H : shape.dilation_H;",
        ),
        Fault(
            "sums start without bias",
            "for (int e = 0; e < kVector; ++e) sums[i % kR][e] = start[e];",
            "for (int e = 0; e < kVector; ++e) sums[i % kR][e] = 0.0f;",
        ),
        Fault(
            "output a row off",
            "int64_t to = first + run.first * row_stride;",
            "int64_t to = first + (run.first + run.step) * row_stride;",
        ),
        Fault(
            "no barrier before the weights",
            "  __syncthreads();\n\n  const int vector",
            "  const int vector",
        ),
        Fault("residual not added", "sum[e] += residual[e];", ";"),
        Fault(
            "any kernel: rows not flipped",
            "const int64_t step_H = shape.flipped ? -shape.dilation_H : shape.dilation_H;",
            "const int64_t step_H = shape.dilation_H;",
        ),
        Fault(
            "any kernel: columns not flipped",
            "const int64_t step_W = shape.flipped ? -shape.dilation_W : shape.dilation_W;",
            "const int64_t step_W = shape.dilation_W;",
        ),
        Fault(
            "any kernel: rows above the map",
            "if (tap_y < 0 || tap_y >= shape.H) continue;",
            "if (tap_y >= shape.H) continue;",
        ),
        Fault(
            "any kernel: rows below the map",
            "if (tap_y < 0 || tap_y >= shape.H) continue;",
            "if (tap_y < 0) continue;",
        ),
        Fault(
            "any kernel: columns right of the map",
            "if (tap_x < 0 || tap_x >= shape.W) continue;",
            "if (tap_x < 0) continue;",
        ),
        Fault(
            "rows above the map",
            "(before >= 0 && before < shape.H ? inside : above) += 1;",
            "(before < shape.H ? inside : above) += 1;",
        ),
        Fault(
            "offset of the weights in 32 bits",
            "weight + static_cast<int64_t>(c) * kTaps + i",
            "weight + c * kTaps + i",
            FAR_DEPTHWISE,
        ),
        Fault(
            "offset of rows in 32 bits",
            "const int64_t row_stride = static_cast<int64_t>(shape.W) * shape.C;",
            "const int row_stride = shape.W * shape.C;",
            FAR_DEPTHWISE,
        ),
        Fault(
            "offset of a pixel in 32 bits",
            "(static_cast<int64_t>(strip.n) * shape.H * shape.W + strip.x) * shape.C + c;",
            "(strip.n * shape.H * shape.W + strip.x) * shape.C + c;",
            FAR_DEPTHWISE,
        ),
        Fault(
            "offset of a column's tap in 32 bits",
            "static_cast<int64_t>(step_W) * shape.C * kBytes;",
            "step_W * shape.C * static_cast<int>(kBytes);",
            FAR_DEPTHWISE,
        ),
        Fault(
            "offset of the output in 32 bits",
            "const ConvEpilogue& epilogue, int64_t offset,",
            "const ConvEpilogue& epilogue, int offset,",
            FAR_DEPTHWISE,
        ),
        Fault(
            "any kernel: offset of the weights in 32 bits",
            "weight[static_cast<int64_t>(first_c + c) * num_taps + tap]",
            "weight[(first_c + c) * num_taps + tap]",
            FAR_DEPTHWISE,
        ),
        Fault(
            "any kernel: offset of a pixel in 32 bits",
            "input + ((image + tap_y) * shape.W + tap_x) * shape.C + c;",
            "input + static_cast<int>(((image + tap_y) * shape.W + tap_x) * shape.C + c);",
            FAR_DEPTHWISE,
        ),
        Fault(
            "any kernel: offset of the output in 32 bits",
            "((image + y) * shape.W + strip.x) * shape.C + c, sum);",
            "static_cast<int>(((image + y) * shape.W + strip.x) * shape.C + c), sum);",
            FAR_DEPTHWISE,
        ),
        Fault(
            "the lower bound drops NaN",
            "value = value < low ? low : value;",
            "value = fmaxf(value, low);",
            NON_FINITE,
        ),
        Fault(
            "the upper bound drops NaN",
            "return value > high ? high : value;",
            "return fminf(value, high);",
            NON_FINITE,
        ),
        Fault(
            "the upper bound for NaN",
            "return value > high ? high : value;",
            "return value <= high ? value : high;",
            NON_FINITE,
        ),
        Fault(
            "zeros not multiplied",
            "for (int e = 0; e < kVector; ++e) sum[e] = fmaf(x[e], taps[k * kS + s][e], sum[e]);",
            "for (int e = 0; e < kVector; ++e)\n"
            "            if (x[e] != 0.0f) sum[e] = fmaf(x[e], taps[k * kS + s][e], sum[e]);",
            NON_FINITE,
        ),
        Fault(
            "a row is loaded one row early",
            "load_next(rows[i % kAhead][s], s, inner + kAhead);",
            "load_next(rows[i % kAhead][s], s, inner + kAhead - 1);",
        ),
        Fault(
            "the row after next is not skipped",
            "for (int s = 0; s < kS; ++s) load_next(rows[i][s], s, i - above);\n"
            "      next += stride * kBytes;",
            "for (int s = 0; s < kS; ++s) load_next(rows[i][s], s, i - above);",
        ),
        Fault(
            "a row past the last of a run is added",
            "if (inner + i >= end) return;",
            "if (inner + i > end) return;",
        ),
        Fault(
            "the first rows have no second tap",
            "add_row(i, i - above, i + 1);",
            "add_row(i, i - above, 1);",
        ),
        Fault(
            "any kernel: zeros not multiplied",
            "for (int e = 0; e < kVector; ++e) sum[e] = fmaf(x[e], w[e], sum[e]);",
            "for (int e = 0; e < kVector; ++e)\n"
            "          if (x[e] != 0.0f) sum[e] = fmaf(x[e], w[e], sum[e]);",
            NON_FINITE,
        ),
        Fault(
            "an infinite residual not added",
            "sum[e] += residual[e];",
            "sum[e] += fabsf(residual[e]) < INFINITY ? residual[e] : 0.0f;",
            NON_FINITE,
        ),
    ],
    "csrc/cuda/depthwise/depthwise_conv2d_wgrad.cu": [
        Fault(
            "no barrier before the sums",
            "__syncthreads();\n  const int num_taps",
            "const int num_taps",
        ),
        Fault(
            "one column not added",
            "for (int column = 0; column < split.columns; ++column) total",
            "for (int column = 1; column < split.columns; ++column) total",
        ),
        Fault(
            "one part not added",
            "for (int part = 0; part < num_parts; ++part) sum",
            "for (int part = 1; part < num_parts; ++part) sum",
        ),
        Fault("taps by channel", "grad_weight[c * num_taps + tap]", "grad_weight[tap * C + c]"),
        Fault(
            "zeros around a run multiplied",
            "add_products([&](int i) { return i <= j && j - i < run.count; });",
            "add_products([](int) { return true; });",
        ),
        Fault(
            "rows below the map",
            "const bool has_next = j + 1 < rows && y >= 0 && y < shape.H;",
            "const bool has_next = j + 1 < rows && y >= 0;",
        ),
        Fault(
            "columns right of the map",
            "has_column[s] = x >= 0 && x < shape.W;",
            "has_column[s] = x >= 0;",
        ),
        Fault(
            "a part's columns not strided",
            "group < split.groups && vector < split.vectors; group += num_parts",
            "group < split.groups && vector < split.vectors; group += num_parts + 1",
        ),
        Fault(
            "offset of rows in 32 bits",
            "const int64_t row_stride = static_cast<int64_t>(shape.W) * shape.C;",
            "const int row_stride = shape.W * shape.C;",
            FAR_DEPTHWISE,
        ),
        Fault(
            "offset of a pixel in 32 bits",
            "(static_cast<int64_t>(strip.n) * shape.H * shape.W + strip.x) * shape.C + c;",
            "(strip.n * shape.H * shape.W + strip.x) * shape.C + c;",
            FAR_DEPTHWISE,
        ),
        Fault(
            "offset of a column's tap in 32 bits",
            "static_cast<int64_t>(offset_W + (s - kS / 2) * shape.dilation_W) * shape.C;",
            "(offset_W + (s - kS / 2) * shape.dilation_W) * shape.C;",
            FAR_DEPTHWISE,
        ),
        Fault(
            "offset of the gradient in 32 bits",
            "const int64_t to_grad = kR / 2 * stride - offset_H * row_stride;",
            "const int to_grad = kR / 2 * stride - offset_H * row_stride;",
            FAR_DEPTHWISE,
        ),
        Fault(
            "offset of a partial sum in 32 bits",
            "partial_sums[to * shape.C + first_c + channel] = total;",
            "partial_sums[static_cast<int>(to) * shape.C + first_c + channel] = total;",
            FAR_DEPTHWISE,
        ),
        Fault(
            "offset of a part in 32 bits",
            "sum += partial_sums[part * size + i];",
            "sum += partial_sums[part * static_cast<int>(size) + i];",
            FAR_DEPTHWISE,
        ),
        Fault(
            "offset of a weight in 32 bits",
            "const int64_t tap = i / C, c = i % C;",
            "const int tap = i / C, c = i % C;",
            FAR_DEPTHWISE,
        ),
        Fault(
            "number of a sum in 32 bits",
            "const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;",
            "const int i = blockIdx.x * kThreads + threadIdx.x;",
            FAR_DEPTHWISE,
        ),
        Fault(
            "NaN left out of the bias",
            "grad_sum[e] += grads[0][e];",
            "grad_sum[e] += grads[0][e] == grads[0][e] ? grads[0][e] : 0.0f;",
            NON_FINITE,
        ),
        Fault(
            "a part that is NaN left out",
            "sum += partial_sums[part * size + i];",
            "sum = fmaxf(sum + partial_sums[part * size + i], -INFINITY);",
            NON_FINITE,
        ),
    ],
    "csrc/cuda/conv/dilated_conv2d.cu": [
        Fault(
            "a single row of weights rejected for its stride",
            "if (o.K > 1) unaligned |= o.weight_stride;",
            "unaligned |= o.weight_stride;",
            SINGLE_ROW,
        ),
        Fault("a partial sum stored as if whole", "if (item.slot >= 0) {", "if (item.slot > 0) {"),
        Fault(
            "offset of a partial sum in 32 bits",
            "static_cast<int64_t>(item.slot) * kBlockM * kBlockN",
            "item.slot * kBlockM * kBlockN",
            FAR_CONV,
        ),
    ],
    "csrc/cuda/conv/dilated_conv2d_sm90.cu": [
        Fault(
            "a single row of weights rejected for its stride",
            "if (o.K > 1) unaligned |= o.weight_stride;",
            "unaligned |= o.weight_stride;",
            SINGLE_ROW,
        ),
        Fault(
            "no fence between the proxies", "          ptx::fence_proxy_async();\n", "", SM90_FORMS
        ),
        Fault(
            "consumers do not fence what copies brought",
            "if constexpr (kArrival == Arrival::kCopies) ptx::fence_proxy_async();",
            "",
            SM90_FORMS,
        ),
        Fault(
            "consumers fence before they have waited",
            "      wait(&barriers.full[state.stage], state.phase);\n"
            "      if constexpr (kArrival == Arrival::kCopies) ptx::fence_proxy_async();\n",
            "      if constexpr (kArrival == Arrival::kCopies) ptx::fence_proxy_async();\n"
            "      wait(&barriers.full[state.stage], state.phase);\n",
            SM90_FORMS,
        ),
        Fault(
            "copies arrive as warps, not as threads",
            "kArrival == Arrival::kThread ? 4 : kWarpgroup;",
            "4;",
            SM90_FORMS,
        ),
        Fault(
            "a stage marked full by the previous stage's copies",
            "kCopies) ptx::cp_async_mbarrier_arrive_noinc(full);",
            "kCopies) ptx::mbarrier_arrive(full);",
            SM90_FORMS,
        ),
        Fault(
            "pixels summed before their copies have come",
            "const bool waits = kArrival == Arrival::kThread || sums != nullptr;",
            "const bool waits = kArrival == Arrival::kThread;",
            SM90_FORMS,
        ),
        Fault(
            "one lane arrives before the others have fenced",
            "          __syncwarp();\n          if (lane == 0) ptx::mbarrier_arrive",
            "          if (lane == 0) ptx::mbarrier_arrive",
            SM90_FORMS,
        ),
        Fault(
            "one lane fences what copies brought",
            "if constexpr (kArrival == Arrival::kCopies) ptx::fence_proxy_async();",
            "if constexpr (kArrival == Arrival::kCopies) if (lane == 0) ptx::fence_proxy_async();",
            SM90_FORMS,
        ),
        Fault(
            "in_flight starts at the first stage for every work item",
            "PipelineState<kStages> in_flight = state;",
            "PipelineState<kStages> in_flight;",
            SM90_FORMS,
        ),
        Fault(
            "one warp of producers waits for the previous kernel",
            "if (i == first_item) ptx::griddepcontrol_wait();  "
            "// the previous kernel may write input",
            "if (i == first_item && warp == 0) ptx::griddepcontrol_wait();",
            SM90_FORMS,
        ),
        Fault(
            "a stage filled while it is read",
            "        wait(&barriers.empty[state.stage], state.phase ^ 1);\n",
            "",
        ),
        Fault(
            "a stage is empty when its own CTA has read it",
            "kClusterSize * kConsumers * 4);",
            "kConsumers * 4);",
        ),
        Fault(
            "a stage released while products read it",
            "if (previous >= 0) release(previous);\n      previous",
            "release(state.stage);\n      previous",
        ),
        Fault(
            "a stage released a product too early",
            "ptx::wgmma_wait_group<1>();",
            "ptx::wgmma_wait_group<2>();",
        ),
        Fault("sums stored before they are there", "    ptx::wgmma_wait_group<0>();\n", ""),
        Fault(
            "a CTA exits before the other",
            "  wait_for_readers(state, barriers.empty);\n",
            "",
        ),
        Fault(
            "barriers of the other CTA used before they are initialised",
            "    ptx::cluster_arrive_relaxed();  // the fence makes the barriers visible\n"
            "    ptx::cluster_wait();\n",
            "    __syncthreads();\n",
        ),
        Fault("barriers not shown to copies", "      ptx::fence_mbarrier_init();\n", ""),
        Fault("pixels not swizzled", "(chunk ^ first_row % 8) * 16", "chunk * 16"),
        Fault("weights for one CTA only", "(1 << kClusterSize) - 1);", "1 << rank);"),
        Fault(
            "the last stages never marked full",
            "item.num_k_iters + (waits ? kMaxInFlight : 0);",
            "item.num_k_iters + (waits && i + 1 == end_item ? kMaxInFlight : 0);",
        ),
        Fault(
            "stages marked full without a wait for their copies",
            "        ptx::cp_async_wait_group<kMaxInFlight - 1>();\n",
            "",
        ),
        Fault(
            "one group of copies not waited for",
            "ptx::cp_async_wait_group<kMaxInFlight - 1>();",
            "ptx::cp_async_wait_group<kMaxInFlight>();",
        ),
        Fault(
            "no groups after the last k-iteration",
            "if (waits) ptx::cp_async_commit_group();",
            "if (waits && round < item.num_k_iters) ptx::cp_async_commit_group();",
        ),
        Fault("pixels of other images summed", "if (pixel >= 0 && pixel < plane)\n", ""),
        Fault(
            "sums of an image before the CTA's pixels",
            "    if (image * plane + plane <= first) continue;\n",
            "",
        ),
        Fault(
            "a quarter of a warp's pixels not summed",
            "for (int distance = kChunks; distance < 32;",
            "for (int distance = kChunks; distance < 16;",
        ),
        Fault(
            "each CTA's sums in the same rows",
            "const int first = item.first_index + rank * kBlockM;",
            "const int first = item.first_index;",
        ),
        Fault(
            "channels of another k-iteration summed",
            "item.c + (round - kMaxInFlight) * kBlockK",
            "item.c + round * kBlockK",
        ),
        Fault(
            "producers do not wait for the previous kernel",
            "    if (i == first_item) ptx::griddepcontrol_wait();  "
            "// the previous kernel may write input\n",
            "",
        ),
        Fault(
            "consumers do not wait for the previous kernel",
            "    if (i == first_item) ptx::griddepcontrol_wait();  "
            "// the previous kernel may write biases\n",
            "",
        ),
        # Packed coordinates.
        Fault(
            "row of a pixel in 15 bits",
            "y[j] = pixel[j].yx >> 16;",
            "y[j] = pixel[j].yx >> 17;",
        ),
        Fault(
            "column of a pixel with its row",
            "x[j] = pixel[j].yx & 0xffff;",
            "x[j] = pixel[j].yx & 0x1ffff;",
        ),
        Fault(
            "the pixels of the first work item",
            "const ListedPixel* listed = work.listed_pixels + item.first_pixel;",
            "const ListedPixel* listed = work.listed_pixels;",
        ),
        Fault(
            "a work item begins with the first tap", "int next_tap = item.tap,", "int next_tap = 0,"
        ),
        Fault("a work item begins with the first channels", "next_c = item.c;", "next_c = 0;"),
        # The way from registers to memory.
        Fault(
            "bias of other channels",
            "bits_of(lane_bias), j % 8 * 4 + lane % 4);",
            "bits_of(lane_bias), j % 4 * 4 + lane % 4);",
        ),
        Fault(
            "bias of the first channels in all blocks",
            "load_bias<T>(bias, output, first_k);",
            "load_bias<T>(bias, output, 0);",
        ),
        Fault(
            "bias of an image of the first row only",
            "image_bias[i % 2] + k",
            "image_bias[0] + k",
        ),
        Fault(
            "bias of the image of a pixel past the end",
            "int64_t{max(pixel[half], 0) / (shape.H * shape.W)}",
            "int64_t{pixel[half] / (shape.H * shape.W)}",
            BESIDE,
        ),
        Fault(
            "bias read past its last channel",
            "if (p != nullptr && k + 1 < output.K) bias[i].y = p[k + 1];",
            "if (p != nullptr && k < output.K) bias[i].y = p[k + 1];",
            BESIDE,
        ),
        Fault(
            "a bias or residual read past its last channel",
            "if (count > 1) sum[1] += to_float(p[1]);",
            "if (count > 0) sum[1] += to_float(p[1]);",
            BESIDE,
        ),
        Fault(
            "residual of pixels past the end",
            "        if (pixel[half] < 0) continue;\n",
            "",
        ),
        Fault(
            "rows past the end stored",
            "          if (row_pixel < 0) return;\n",
            "",
        ),
        Fault(
            "vectors past the last channel stored",
            "if (part + k < count) *reinterpret_cast",
            "*reinterpret_cast",
        ),
        Fault(
            "channels past the last stored",
            "if (part + k + i < count) p[i] = chunk.element[i];",
            "p[i] = chunk.element[i];",
        ),
        Fault(
            "vectors where channels fill none",
            "(output.K | output.first_channel | shape.out_channels) % 8 == 0;",
            "(output.K | shape.out_channels) % 8 == 0;",
        ),
        Fault(
            "offset of a pixel in 32 bits",
            "channels + uint64_t{input_pixel} * static_cast<uint32_t>(shape.in_channels);",
            "channels + input_pixel * static_cast<uint32_t>(shape.in_channels);",
            FAR_CONV,
        ),
        Fault(
            "offset of an output pixel in 32 bits",
            "uint64_t{static_cast<uint32_t>(row_pixel)}",
            "static_cast<uint32_t>(row_pixel)",
            FAR_CONV,
        ),
        Fault(
            "offset of sums of pixels in 32 bits",
            "const int64_t row = int64_t{first / kBlockM + image} * kConvSumParts + warp;",
            "const int row = (first / kBlockM + image) * kConvSumParts + warp;",
            FAR_CONV,
        ),
        Fault(
            "stride of weights in 32 bits",
            "unsigned_64(row) * 2}",
            "static_cast<uint32_t>(row * 2)}",
            FAR_CONV,
        ),
        Fault(
            "a row of weights in 32 bits",
            "const int64_t row = output.K > 1 ?",
            "const int32_t row = output.K > 1 ?",
            FAR_CONV,
        ),
        Fault(
            "sm_90: NaN pixels left out of the means",
            "for (int i = 0; i < kChunk; ++i) sum[i] += value[i];",
            "for (int i = 0; i < kChunk; ++i) sum[i] += value[i] == value[i] ? value[i] : 0.0f;",
            NON_FINITE,
        ),
        Fault(
            "sm_90: NaN clamped to the lower bound",
            "return bits_of(clamp_pair(pair, low, high));",
            "return bits_of(Pair<T>{to_float(pair.x) >= to_float(low.x) ? pair.x : low.x, "
            "to_float(pair.y) >= to_float(low.y) ? pair.y : low.y});",
            NON_FINITE,
        ),
        Fault(
            "sm_90: biases in every partial sum of a split tile",
            "      store_partial_sums<kConvTileSm90>(sum, partial_sums, item.slot, first_row);",
            "      if (output.image_bias != nullptr) sum[0] += output.image_bias[first_k];\n"
            "      store_partial_sums<kConvTileSm90>(sum, partial_sums, item.slot, first_row);",
        ),
    ],
    "csrc/cuda/conv/warp_mma.cuh": [
        Fault(
            "matrices of b swapped",
            "b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]",
            "b[j / 2][j % 2 * 2 + 1], b[j / 2][j % 2 * 2]",
        ),
        Fault(
            "TF32 truncated instead of rounded",
            "for (uint32_t& bits : r) bits = ptx::cvt_rna_tf32(__uint_as_float(bits));",
            "",
        ),
        Fault(
            "weight gradient: matrices of b swapped",
            "b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]",
            "b[j / 2][j % 2 * 2 + 1], b[j / 2][j % 2 * 2]",
            WGRAD,
        ),
        Fault(
            "weight gradient: TF32 truncated instead of rounded",
            "for (uint32_t& bits : r) bits = ptx::cvt_rna_tf32(__uint_as_float(bits));",
            "",
            WGRAD,
        ),
        Fault(
            "b rounded after the first row",
            "if (i == 0 && j % 2 == 0) round",
            "if (i == 1 && j % 2 == 0) round",
        ),
        Fault(
            "weight gradient: b not rounded",
            "if (i == 0 && j % 2 == 0) round",
            "if (i < 0 && j % 2 == 0) round",
            WGRAD,
        ),
    ],
    "csrc/cuda/conv/warp_rows.cuh": [
        Fault(
            "staged rows read before they are there",
            "  }\n  __syncwarp();\n  constexpr int kRows",
            "  }\n  constexpr int kRows",
        ),
        Fault(
            "rows 8 to 15 in the place of the next columns",
            "{pair(j, 0), pair(j, 1), pair(j + 1, 0), pair(j + 1, 1)}",
            "{pair(j, 0), pair(j + 1, 0), pair(j, 1), pair(j + 1, 1)}",
        ),
        Fault("chunks read where others were written", "(read ^ i % 8 * 16)", "read"),
        Fault("chunks written in one place", "(written ^ j * 16)", "(written ^ j % 8 * 16)"),
        Fault(
            "partial sums in the first rows",
            "* kTile + first_row + half * 8 + lane / 4;",
            "* kTile + half * 8 + lane / 4;",
        ),
        Fault(
            "offset of a partial sum in 32 bits",
            "const int64_t row = static_cast<int64_t>(slot) * kTile",
            "const int row = slot * kTile",
            FAR_CONV,
        ),
    ],
    "csrc/cuda/conv/dilated_conv2d_wgrad.cu": [
        Fault(
            "sign of the tap",
            "const int tap_offset = tap.dy * shape.W + tap.dx;",
            "const int tap_offset = -tap.dy * shape.W - tap.dx;",
        ),
        Fault(
            "pixels past the rectangle",
            "const bool has_pixel = i * kCopyRows < pixels_left;",
            "const bool has_pixel = true;",
        ),
        Fault("output channels past the branch's last written", "if (k >= branch.K) continue;", ""),
        Fault(
            "input channels past the last written",
            "if (first_c + col + j * 8 >= shape.C) continue;",
            "",
        ),
        Fault(
            "first channel of a branch forgotten",
            "grad_output + branch.first_channel + (has_k",
            "grad_output + (has_k",
        ),
        Fault(
            "second block of output channels forgotten",
            "const int first_k = item.block / blocks_n * kBlockM,",
            "const int first_k = 0,",
        ),
        Fault(
            "second block of input channels forgotten",
            "first_c = item.block % blocks_n * kBlockN;",
            "first_c = 0;",
        ),
        Fault(
            "a split tile starts at its first pixel",
            "const int first = item.first_k_iter * kBlockK<T>;",
            "const int first = 0;",
        ),
        Fault("every k-iteration has the first pixels", "advance(pixels[i], advance_by);", ""),
        Fault(
            "weights of another tap",
            "branch.num_taps + tap.index) * shape.C + first_c;",
            "branch.num_taps) * shape.C + first_c;",
        ),
        Fault(
            "waits for a stage too few",
            "ptx::cp_async_wait_group<kStages - 2>();",
            "ptx::cp_async_wait_group<kStages - 1>();",
        ),
        Fault("no wait for copies", "ptx::cp_async_wait_group<kStages - 2>();", ""),
        Fault("no barrier between k-iterations", "ptx::bar_sync(1, kThreads);", ""),
        Fault(
            "refills the stage in use",
            "copy_row((k_iter + kStages - 1) % kStages, i);",
            "copy_row(k_iter % kStages, i);",
        ),
        Fault("no group for the copies of a k-iteration", "ptx::cp_async_commit_group();", ""),
        Fault(
            "prologue one k-iteration short",
            "for (int k_iter = 0; k_iter < kStages - 1; ++k_iter) copy",
            "for (int k_iter = 1; k_iter < kStages - 1; ++k_iter) copy",
        ),
        Fault(
            "the last k-iteration missing",
            "k_iter < item.num_k_iters; ++k_iter) {\n      load_half",
            "k_iter + 1 < item.num_k_iters; ++k_iter) {\n      load_half",
        ),
        Fault(
            "matrices of a swapped",
            "* kPitch + lane / 8 % 2 * 8;",
            "* kPitch + (1 - lane / 8 % 2) * 8;",
        ),
        Fault(
            "a warp without work leaves no sums",
            "first_k + warp_row < branch.K && first_c + warp_col < shape.C;",
            "first_k + warp_row + 8 < branch.K && first_c + warp_col < shape.C;",
        ),
        Fault("a partial sum stored as if whole", "if (item.slot < 0) {", "if (item.slot <= 0) {"),
        Fault(
            "bias: rows past the end added",
            "pixel < end; pixel += kBiasRows",
            "pixel <= end; pixel += kBiasRows",
        ),
        Fault("bias: no barrier before the sums", "= sum[i];\n  __syncthreads();", "= sum[i];"),
        Fault(
            "bias: a row left out",
            "for (int r = 0; r < kBiasRows; ++r)",
            "for (int r = 1; r < kBiasRows; ++r)",
        ),
        Fault(
            "bias: a part left out",
            "for (int64_t part = 0; part < num_parts; ++part) sum",
            "for (int64_t part = 1; part < num_parts; ++part) sum",
        ),
        Fault(
            "bias: only the first part",
            "for (int64_t part = 0; part < num_parts; ++part) sum",
            "for (int64_t part = 0; part < 1; ++part) sum",
        ),
        Fault(
            "offset of a pixel in 32 bits",
            "uint64_t{input_pixel} * static_cast",
            "input_pixel * static_cast",
            FAR_CONV,
        ),
        Fault(
            "offset of a weight in 32 bits",
            "(static_cast<int64_t>(k) * branch.num_taps + tap.index)",
            "(k * branch.num_taps + tap.index)",
            FAR_CONV,
        ),
        Fault(
            "offset of a partial sum in 32 bits",
            "(static_cast<int64_t>(item.slot) * kBlockM + row) * kBlockN;",
            "(item.slot * kBlockM + row) * kBlockN;",
            FAR_CONV,
        ),
        Fault(
            "bias: offset of a pixel in 32 bits",
            "load(values, grad_output + pixel * K + k);",
            "load(values, grad_output + static_cast<int>(pixel) * K + k);",
            FAR_CONV,
        ),
        Fault(
            "bias: offset of a part in 32 bits",
            "partial_sums[part * K + first_k + i] = total;",
            "partial_sums[static_cast<int>(part) * K + first_k + i] = total;",
            FAR_CONV,
        ),
        Fault(
            "bias: offset of a part that is added in 32 bits",
            "sum += partial_sums[part * K + k];",
            "sum += partial_sums[static_cast<int>(part) * K + k];",
            FAR_CONV,
        ),
        Fault(
            "bias: NaN left out",
            "for (int i = 0; i < kChunk<T>; ++i) sum[i] += values[i];",
            "for (int i = 0; i < kChunk<T>; ++i) sum[i] += values[i] == values[i] "
            "? values[i] : 0.0f;",
            NON_FINITE,
        ),
        Fault(
            "bias: infinite parts left out",
            "sum += partial_sums[part * K + k];",
            "sum += fabsf(partial_sums[part * K + k]) < INFINITY ? "
            "partial_sums[part * K + k] : 0.0f;",
            NON_FINITE,
        ),
        Fault(
            "offset of a pixel of the output in 32 bits",
            "uint64_t{grad_pixel} * static_cast",
            "grad_pixel * static_cast",
            FAR_CONV,
        ),
        Fault("the first half multiplied twice", "fragments[1], i);", "fragments[0], i);"),
        Fault("both halves are the first", "half * kBlockK<T> / 2 * kPitch;", "0;"),
        Fault(
            "fragments of the previous k-iteration",
            "load_half((k_iter + 1) % kStages, 0);",
            "load_half(k_iter % kStages, 0);",
        ),
        Fault(
            "fragments before the wait for their stage",
            "wait_for_next_stage();  // all warps have loaded this stage's fragments: it is free\n"
            "      load_half((k_iter + 1) % kStages, 0);",
            "load_half((k_iter + 1) % kStages, 0);\n      wait_for_next_stage();",
        ),
        Fault(
            "no wait for the first stage",
            "wait_for_next_stage();\n  if (has_work) {",
            "if (has_work) {",
        ),
        Fault(
            "warps without work miss the barrier",
            "copy_k_iter((k_iter + kStages - 1) % kStages);\n      wait_for_next_stage();",
            "copy_k_iter((k_iter + kStages - 1) % kStages);",
        ),
        Fault(
            "only the first row of a k-iteration copied again",
            "copy_row((k_iter + kStages - 1) % kStages, i);",
            "copy_row((k_iter + kStages - 1) % kStages, 0);",
        ),
    ],
    "csrc/cuda/conv/dilated_conv2d_wgrad_sm90.cu": [
        Fault(
            "the gradient one row off",
            "{first_k + chunk * kChunk, x, y, n}",
            "{first_k + chunk * kChunk, x, y + 1, n}",
        ),
        Fault("sign of the tap", "x + item.dx, y + item.dy, n}", "x - item.dx, y - item.dy, n}"),
        Fault("no wait for a full stage", "wait(&barriers.full[state.stage], state.phase);", ""),
        Fault(
            "no wait for an empty stage",
            "wait(&barriers.empty[state.stage], state.phase ^ 1);",
            "",
        ),
        Fault(
            "a stage is empty without the other CTA",
            "kClusterSize * kConsumers * 4);",
            "kConsumers * 4);",
        ),
        Fault("barriers not shown to copies", "ptx::fence_mbarrier_init();", ""),
        Fault("no fence before products", "ptx::wgmma_fence();", ""),
        Fault("sums read too early", "ptx::wgmma_wait_group<0>();", ""),
        Fault(
            "a stage freed while read",
            "ptx::wgmma_wait_group<1>();\n      if (previous >= 0) release(previous);",
            "if (previous >= 0) release(previous);\n      ptx::wgmma_wait_group<1>();",
        ),
        Fault("offsets of the descriptor exchanged", "1024, kChunkBytes);", "kChunkBytes, 1024);"),
        Fault(
            "gradient not transposed",
            "ptx::wgmma_m64k16<T, kBlockN, true, true>",
            "ptx::wgmma_m64k16<T, kBlockN, false, true>",
        ),
        Fault(
            "input not transposed",
            "ptx::wgmma_m64k16<T, kBlockN, true, true>",
            "ptx::wgmma_m64k16<T, kBlockN, true, false>",
        ),
        Fault("next pixels as in rows of k", "kNext = 16 * kRowBytes / 16;", "kNext = 2;"),
        Fault("one image at a time", "n += work.box_n;", "n += 1;"),
        Fault("rows too far apart", "row * work.box_y, x =", "row * work.box_x, x ="),
        Fault(
            "a work item starts with the first columns",
            "int column = item.column,",
            "int column = 0,",
        ),
        Fault("a work item starts with the first row", "row = item.row,", "row = 0,"),
        Fault("a work item starts with the first image", "n = item.n;", "n = 0;"),
        Fault("channels of the first branch", "branches.branch[item.branch].first_channel", "0"),
        Fault(
            "both CTAs store the same",
            "rank * kBlockM + warp * 16, staged);",
            "warp * 16, staged);",
        ),
        Fault(
            "both CTAs bring the same half",
            "const int first_chunk = rank * (kChunksN / kClusterSize);",
            "const int first_chunk = 0;",
        ),
        Fault(
            "rows of the next branch stored",
            "if (k >= branch.K || c >= shape.C) return;",
            "if (c >= shape.C) return;",
        ),
        Fault(
            "columns past the last channel stored",
            "if (k >= branch.K || c >= shape.C) return;",
            "if (k >= branch.K) return;",
        ),
        Fault(
            "a CTA exits while the other needs it",
            "  wait_for_readers(state, barriers.empty);\n",
            "",
        ),
        Fault(
            "offset of a weight in 32 bits",
            "(static_cast<int64_t>(k) * branch.num_taps + item.index)",
            "(k * branch.num_taps + item.index)",
            FAR_CONV,
        ),
        Fault(
            "stride of images in 32 bits",
            "H * W * C * 2}",
            "static_cast<uint32_t>(H * W * C * 2)}",
            FAR_CONV,
        ),
        Fault(
            "stride of rows in 32 bits",
            "{C * 2, W * C * 2,",
            "{C * 2, static_cast<uint32_t>(W * C * 2),",
            FAR_CONV,
        ),
    ],
    "csrc/cuda/common/elements.cuh": [
        Fault(
            "fp16 saturates",
            "result = __float2half_rn(value); }",
            "result = __float2half_rn(value > 65504.0f ? 65504.0f : value); }",
        ),
        Fault(
            "low bf16 of a word in the bits of the high one",
            "values[1] = __uint_as_float(word & 0xffff0000u);",
            "values[1] = __uint_as_float(word);",
        ),
        Fault(
            "elements of a word swapped",
            "round_to(elements[e], values[i * kPerWord + e]);",
            "round_to(elements[e], values[i * kPerWord + kPerWord - 1 - e]);",
        ),
    ],
    "csrc/cuda/conv/implicit_gemm.cuh": [
        Fault(
            "tap sign of rows", "from.pixels = tap.dy * shape.W", "from.pixels = -tap.dy * shape.W"
        ),
        Fault("tap sign of columns", "* shape.W + tap.dx;", "* shape.W - tap.dx;"),
        Fault(
            "weights of the tap before",
            "static_cast<int64_t>(tap.index) * source.C",
            "static_cast<int64_t>(tap.index - 1) * source.C",
        ),
        Fault(
            "padding not zero-filled",
            "is_inside(tap, y[i], x[i], shape.H, shape.W);",
            "(y[i] >= 0);",
        ),
        Fault(
            "channels past the last copied",
            "(k_iters_left > 0) & (next_c < source.C);",
            "k_iters_left > 0;",
        ),
        Fault(
            "rows and columns of a pixel swapped",
            "static_cast<int>(image_row) * shape.W;",
            "static_cast<int>(image_row) * shape.H;",
        ),
        Fault(
            "image of a pixel not left out",
            "image_row % static_cast<unsigned>(shape.H);",
            "image_row;",
        ),
        Fault(
            "a split tile starts at its first tap",
            "int next_tap = item.first_k_iter % tile.num_taps;",
            "int next_tap = 0;",
        ),
        Fault(
            "a split tile starts at its first channel",
            "int next_c = item.first_k_iter / tile.num_taps * kBlockK<T> + chunk",
            "int next_c = chunk",
        ),
        Fault("channels do not advance", "next_c += kBlockK<T>;", ""),
        Fault(
            "waits for a stage too few",
            "ptx::cp_async_wait_group<kStages - 2>();",
            "ptx::cp_async_wait_group<kStages - 1>();",
        ),
        Fault("no wait for copies", "ptx::cp_async_wait_group<kStages - 2>();", ""),
        Fault("no barrier between k-iterations", "ptx::bar_sync(1, kConvThreads);", ""),
        Fault(
            "no barrier before the sums",
            "__syncthreads();  // all warps are done with the stages",
            "",
        ),
        Fault("no barrier after the sums", "__syncthreads();\n  return sums;", "return sums;"),
        Fault(
            "refills the stage in use",
            "T* free_stage = stages + (k_iter + kStages - 1) % kStages",
            "T* free_stage = stages + k_iter % kStages",
        ),
        Fault("no group for the copies of a k-iteration", "ptx::cp_async_commit_group();", ""),
        Fault(
            "prologue one k-iteration short",
            "for (int k_iter = 0; k_iter < kStages - 1; ++k_iter) copy",
            "for (int k_iter = 1; k_iter < kStages - 1; ++k_iter) copy",
        ),
        Fault(
            "the last k-iteration missing",
            "k_iter < item.num_k_iters; ++k_iter) {\n      T* free_stage",
            "k_iter + 1 < item.num_k_iters; ++k_iter) {\n      T* free_stage",
        ),
        Fault(
            "chunks of reader and writer differ",
            "swizzled<T>(warp_row + lane % 16, lane / 16);",
            "swizzled<T>(warp_row + lane % 16, 1 - lane / 16);",
        ),
        Fault(
            "a warp idles early",
            "const bool has_work = warp_row < tile.num_pixels &&",
            "const bool has_work = warp_row + 1 < tile.num_pixels &&",
        ),
        Fault(
            "offset of a pixel in 32 bits",
            "uint64_t{p} * static_cast<uint32_t>(shape.in_channels)",
            "p * static_cast<uint32_t>(shape.in_channels)",
            FAR_CONV,
        ),
        Fault(
            "offset of a row of weights in 32 bits",
            "k * output.weight_stride;",
            "k * static_cast<int>(output.weight_stride);",
            FAR_CONV,
        ),
        Fault(
            "offset of a tap's weights in 32 bits",
            "static_cast<int64_t>(tap.index) * source.C + source",
            "tap.index * source.C + source",
            FAR_CONV,
        ),
        Fault("the first half multiplied twice", "fragments[1], i);", "fragments[0], i);"),
        Fault(
            "both halves are the first of the input",
            "input_at) ^ (half * 2 * kChunk<T>)",
            "input_at)",
        ),
        Fault(
            "both halves are the first of the weights",
            "weight_at) ^ (half * 2 * kChunk<T>)",
            "weight_at)",
        ),
        Fault(
            "fragments of the previous k-iteration",
            "load_fragments((k_iter + 1) % kStages, 0);",
            "load_fragments(k_iter % kStages, 0);",
        ),
        Fault(
            "fragments before the wait for their stage",
            "wait_for_next_stage();  // all warps have loaded this stage's fragments: it is free\n"
            "      load_fragments((k_iter + 1) % kStages, 0);",
            "load_fragments((k_iter + 1) % kStages, 0);\n      wait_for_next_stage();",
        ),
        Fault(
            "no wait for the first stage",
            "wait_for_next_stage();\n  if (has_work) {",
            "if (has_work) {",
        ),
        Fault(
            "warps without work miss the barrier",
            "kStages * kStage);\n      wait_for_next_stage();",
            "kStages * kStage);",
        ),
        Fault("weights move from the first k-iteration", "weights_before = weights;", ""),
        Fault(
            "zeros land on the sums",
            "ptx::cp_async_wait_all();  // zeros past the last k-iteration",
            "",
        ),
        Fault(
            "pixels past the end of the tile",
            "pixels[min(first_row + i * kCopyRows, tile.num_pixels - 1)];",
            "pixels[first_row + i * kCopyRows];",
        ),
    ],
    "csrc/cuda/common/pairs.cuh": [
        Fault(
            "the lower bound of a pair drops NaN",
            "return __hmin2_nan(__hmax2_nan(pair, low), high);",
            "const float2 values = to_floats(pair), bounds = to_floats(low);\n"
            "  round_to(pair, fmaxf(values.x, bounds.x), fmaxf(values.y, bounds.y));\n"
            "  return __hmin2_nan(pair, high);",
        ),
        Fault(
            "the upper bound of a pair drops NaN",
            "return __hmin2_nan(__hmax2_nan(pair, low), high);",
            "pair = __hmax2_nan(pair, low);\n"
            "  const float2 values = to_floats(pair), bounds = to_floats(high);\n"
            "  round_to(pair, fminf(values.x, bounds.x), fminf(values.y, bounds.y));\n"
            "  return pair;",
        ),
        Fault(
            "no upper bound of a pair",
            "return __hmin2_nan(__hmax2_nan(pair, low), high);",
            "return __hmax2_nan(pair, low);",
        ),
    ],
    "csrc/cuda/common/pipeline.cuh": [
        Fault(
            "both arrivals of a reader at its own CTA",
            "ptx::mbarrier_arrive_cluster(empty, cta);",
            "ptx::mbarrier_arrive_cluster(empty, ptx::cluster_ctarank());",
        ),
        Fault(
            "a CTA exits before its last stage was read",
            "for (int i = 0; i < kStages; ++i) {",
            "for (int i = 0; i < kStages - 1; ++i) {",
        ),
        Fault(
            "weight gradient: a CTA exits before its last stage was read",
            "for (int i = 0; i < kStages; ++i) {",
            "for (int i = 0; i < kStages - 1; ++i) {",
            WGRAD_SM90,
        ),
        Fault("the phase never changes", "    phase ^= 1;\n", ""),
    ],
    "csrc/cuda/aspp/pixel_means.cu": [
        Fault(
            "the last run of pixels is short",
            "const int64_t end = min(begin + runs.run, runs.N * runs.num_pixels);",
            "const int64_t end = min(begin + runs.run, runs.N * runs.num_pixels - 1);",
        ),
        Fault(
            "one warp's sum missing",
            "total += of_warps[w * kColumns + c];",
            "total += w == 0 ? 0.0f : of_warps[w * kColumns + c];",
        ),
        Fault(
            "no barrier before warps are added",
            "    __syncthreads();\n    if (c >= kColumns",
            "    if (c >= kColumns",
        ),
        Fault(
            "sums overwritten while they are read",
            "    __syncthreads();  // before the sums are overwritten\n",
            "",
        ),
        Fault(
            "no barrier before the rows of warps are added",
            "  __syncthreads();\n  if (warp > 0",
            "  if (warp > 0",
        ),
        Fault("mean without its divisor", "total / static_cast<float>(runs.num_pixels);", "total;"),
        Fault(
            "an image without its last run",
            "row < (last_run + image + 1) * runs.parts;",
            "row < (last_run + image) * runs.parts;",
        ),
        Fault(
            "offset of a pixel in 32 bits",
            "load(chunk, p + pixel * runs.C);",
            "load(chunk, p + static_cast<int>(pixel) * runs.C);",
            FAR_MEANS,
        ),
        Fault(
            "offset of a run's sums in 32 bits",
            "sums[(i_run + image) * runs.C + first_c + c] = total;",
            "sums[static_cast<int>(i_run + image) * runs.C + first_c + c] = total;",
            FAR_MEANS,
        ),
        Fault(
            "offset of sums in 32 bits",
            "sum += sums[row * runs.C + c];",
            "sum += sums[static_cast<int>(row) * runs.C + c];",
            FAR_MEANS,
        ),
        Fault(
            "offset of a mean in 32 bits",
            "means[image * runs.C + c]",
            "means[static_cast<int>(image) * runs.C + c]",
            FAR_MEANS,
        ),
        Fault(
            "NaN pixels left out of the means",
            "sum[i] += chunk[i];",
            "sum[i] += chunk[i] == chunk[i] ? chunk[i] : 0.0f;",
            NON_FINITE,
        ),
        Fault(
            "a warp's infinite sum left out of the means",
            "total += of_warps[w * 32 + lane];",
            "total += fabsf(of_warps[w * 32 + lane]) < INFINITY ? of_warps[w * 32 + lane] : 0.0f;",
            NON_FINITE,
        ),
    ],
    "csrc/cuda/common/tensor_map.cuh": [
        Fault(
            "the description of a smaller weight at the same address",
            "  std::copy_n(dims, kRank, key.begin() + kRank);\n",
            "",
        ),
        Fault(
            "the description of a weight with other strides",
            "  std::copy_n(strides, kRank - 1, key.begin() + 1);\n",
            "",
        ),
        Fault(
            "the description of a weight at another address",
            "key{reinterpret_cast<uintptr_t>(address)};",
            "key{};",
        ),
        Fault(
            "one stride overwritten in the key",
            "key.begin() + kRank);\n",
            "key.begin() + kRank - 1);\n",
        ),
        Fault(
            "the last dimension left out of the key",
            "std::copy_n(dims, kRank, key.begin() + kRank);",
            "std::copy_n(dims, kRank - 1, key.begin() + kRank);",
        ),
        Fault(
            "the last stride left out of the key",
            "std::copy_n(strides, kRank - 1, key.begin() + 1);",
            "std::copy_n(strides, kRank - 2, key.begin() + 1);",
        ),
    ],
    "csrc/cuda/conv/rectangle_walk.cuh": [
        Fault("an offset of a row lost", "pixel.y += 1;", "pixel.y += 0;"),
        Fault("no gap between rows", "pixel.index += step.row_gap;", ""),
        Fault("no gap between images", "pixel.index += step.image_gap;", ""),
        Fault(
            "a row ends one pixel late",
            "if (pixel.x >= step.w) {",
            "if (pixel.x > step.w) {",
        ),
        Fault(
            "first pixels of the first image only",
            "return {y, x, (n * H + first_y + y) * W + first_x + x};",
            "return {y, x, (first_y + y) * W + first_x + x};",
        ),
    ],
    "csrc/cuda/conv/wgrad_reduce.cuh": [
        Fault(
            "one partial sum not added",
            "i < reduction.num_slots; ++i",
            "i + 1 < reduction.num_slots; ++i",
        ),
        Fault(
            "reduction of the rows above",
            "const int row = blockIdx.x % kBlocks * kRows + threadIdx.x / kRowThreads;",
            "const int row = blockIdx.x % kBlocks * kRows;",
        ),
        Fault("no split tile reduced", "if (work.num_reductions == 0) return {};", "return {};"),
        Fault(
            "offset of a weight in 32 bits",
            "(static_cast<int64_t>(k) * branch.num_taps + tap.index) * shape.C + c",
            "(k * branch.num_taps + tap.index) * shape.C + c",
            FAR_CONV,
        ),
        Fault(
            "offset of a workspace slot in 32 bits",
            "const int64_t slot = reduction.first_slot + i;",
            "const int slot = reduction.first_slot + i;",
            FAR_CONV,
        ),
        Fault(
            "a partial sum that is NaN left out",
            "sum[1] += partial[1];",
            "sum[1] += partial[1] == partial[1] ? partial[1] : 0.0f;",
            NON_FINITE,
        ),
    ],
}
