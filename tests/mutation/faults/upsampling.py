"""Faults of the upsampling kernels."""

from __future__ import annotations

from .guards import FAR_CPU, FAR_UPSAMPLING, Fault

FAULTS: dict[str, list[Fault]] = {
    "csrc/common/bilinear.h": [
        Fault("ties to the highest class", "value > best ||", "value >= best ||"),
        Fault("the last NaN wins", "(value != value && best == best)", "(value != value)"),
        Fault(
            "no margin for rounding",
            "return x - fma_rn(0x1p-18f, x < 0.0f ? -x : x, 0x1p-118f);",
            "return x;",
        ),
        Fault("no margin for denormals", "0x1p-118f);", "0.0f);"),
        Fault("source index not clamped at 0", "src = src < 0.0f ? 0.0f : src;", ""),
        Fault("source index not clamped at the end", "if (pair.lo > size - 1)", "if (false)"),
        Fault(
            "another order of operations",
            "return fma_rn(a, w0, mul_rn(b, w1));",
            "return fma_rn(b, w1, mul_rn(a, w0));",
        ),
        Fault(
            "pixel centres off by half", "static_cast<float>(dst) + 0.5f", "static_cast<float>(dst)"
        ),
    ],
    "csrc/common/half.h": [
        Fault(
            "half infinity is finite",
            "if (magnitude >= 0x0f800000u)",
            "if (magnitude > 0x0f800000u)",
        ),
        Fault("half NaN is finite", "bits |= 0x7f800000u;", "bits = 0x7f800000u;"),
        Fault(
            "half denormals are zero",
            "float_to_bits(bits_to_float(magnitude) * 0x1p112f)",
            "(magnitude < 0x00800000u ? 0u : magnitude + 0x38000000u)",
        ),
        Fault("half without its sign", "bits_to_float(bits | sign)", "bits_to_float(bits)"),
        Fault("bfloat16 shifted too little", "value.bits) << 16", "value.bits) << 15"),
    ],
    "csrc/cpu/exp2_log2.h": [
        Fault("2^x: a coefficient off", "0x1.5f7276p-10f", "0x1.4f7276p-10f"),
        Fault("log2: a coefficient off", "0x1.ec70e6p-1f", "0x1.ec9000p-1f"),
    ],
    "csrc/cpu/stream.h": [
        Fault(
            "the last part of a line not stored", "i < kLineBytes / 16;", "i < kLineBytes / 16 - 1;"
        ),
        Fault("a part of a line too much", "i < kLineBytes / 16;", "i <= kLineBytes / 16;"),
    ],
    "csrc/cpu/upsample_argmax.cpp": [
        Fault(
            "offset of a row in 32 bits",
            "logits + n * shape.stride_N + y * shape.stride_H, plan);",
            "logits + static_cast<int>(n * shape.stride_N + y * shape.stride_H), plan);",
            FAR_CPU,
        ),
        Fault(
            "offset of a column of all classes in 32 bits",
            "src + plan.source_columns[x + i] * plan.shape.stride_W;",
            "src + static_cast<int>(plan.source_columns[x + i] * plan.shape.stride_W);",
            FAR_CPU,
        ),
        Fault(
            "offset of a class in 32 bits",
            "dst[c * pitch + x] = to_float(src[c * stride_C + x]);",
            "dst[c * pitch + x] = to_float(src[static_cast<int>(c * stride_C) + x]);",
            FAR_CPU,
        ),
        Fault(
            "offset of a gathered class in 32 bits",
            "src[c * stride_C + columns[x] * stride_W]",
            "src[static_cast<int>(c * stride_C + columns[x] * stride_W)]",
            FAR_CPU,
        ),
        Fault(
            "offset of an image's labels in 32 bits",
            "store_band(labels + n * shape.out_H * shape.out_W,",
            "store_band(labels + static_cast<int>(n * shape.out_H * shape.out_W),",
            FAR_CPU,
        ),
        Fault(
            "a line past the end of the row",
            "x + kLine <= out_W; x += kLine",
            "x < out_W; x += kLine",
        ),
        Fault(
            "rows shorter than the distance to the next cache line",
            "std::min<int64_t>((kLine - misaligned) % kLine, out_W)",
            "static_cast<int64_t>((kLine - misaligned) % kLine)",
        ),
        Fault("lines not aligned", "(kLine - misaligned) % kLine, out_W", "misaligned, out_W"),
        Fault(
            "no labels after the last line",
            "    for (; x < out_W; ++x) row[x]",
            "    for (; x < (stream ? x : out_W); ++x) row[x]",
        ),
        Fault(
            "a label too many",
            "    for (; x < out_W; ++x) row[x]",
            "    for (; x <= out_W; ++x) row[x]",
        ),
        Fault(
            "the last label left out",
            "    for (; x < out_W; ++x) row[x]",
            "    for (; x < out_W - 1; ++x) row[x]",
        ),
        Fault(
            "labels truncated to a byte",
            "    for (; x < out_W; ++x) row[x] = static_cast<Label>(src[x]);",
            "    for (; x < out_W; ++x) row[x] = static_cast<Label>(static_cast<uint8_t>(src[x]));",
        ),
        Fault("wide cells not split", "dst - axis.spans.back().begin == max_span", "false"),
        Fault(
            "cells one pixel wider than a tile",
            "dst - axis.spans.back().begin == max_span",
            "dst - axis.spans.back().begin > max_span",
        ),
        Fault("an unused column before", "columns[last] == column ? last : last - 1", "last"),
        Fault(
            "the last pixels not transposed", "    transpose_from<1>(rest, dst, src, plan);\n", ""
        ),
        Fault("the last classes not ranked", "  rank_from<1>(rest, row, scratch, plan);\n", ""),
        Fault(
            "unused columns treated as used",
            "stride_W == 1 && width == plan.shape.W",
            "stride_W == 1",
        ),
        Fault("infinity counts as finite", ">= infinity ?", "> infinity ?"),
        Fault("second best forgotten", "      s = s < loser ? loser : s;\n", ""),
        Fault(
            "second best is not the one that was best",
            "value < b ? value : b;\n      s",
            "value < b ? value : s;\n      s",
        ),
        Fault("every winner is safe", "kNotFinite : safe ?", "kNotFinite : true ?"),
        Fault(
            "three corners agree",
            "&& bottom.sure[cell.lo] == k && bottom.sure[cell.hi] == k",
            "&& bottom.sure[cell.lo] == k",
        ),
        Fault("left corners agree", "top.sure[cell.hi] == k && bottom", "bottom"),
        Fault(
            "last column not checked for NaN",
            "x <= tile.last_column(); ++x) {\n    finite",
            "x < tile.last_column(); ++x) {\n    finite",
        ),
        Fault("lower row not checked for NaN", " && tile.bottom->sure[x] != kNotFinite", ""),
        Fault(
            "lower corners win nothing",
            "      stays |= bottom[c * pitch + x] > bottom_bound[x];\n",
            "",
        ),
        Fault(
            "bounds of the upper row for both",
            "losing_bound(bottom[k * pitch + x])",
            "losing_bound(top[k * pitch + x])",
        ),
        Fault(
            "no margin",
            "losing_bound(top[k * pitch + x]) : INFINITY",
            "top[k * pitch + x] : INFINITY",
        ),
        Fault(
            "the last corners win nothing",
            "padded = round_up(columns, kLanes)",
            "padded = columns / kLanes * kLanes",
        ),
        Fault(
            "the last pixels of a cell not interpolated",
            "x0 < cell->end; x0 += kCellLanes",
            "x0 + kCellLanes <= cell->end; x0 += kCellLanes",
        ),
        Fault(
            "weights of the first pixels of a cell",
            "plan.columns.w1[x0 + x]",
            "plan.columns.w1[cell->begin + x]",
        ),
        Fault(
            "stale candidates after the last",
            "std::fill_n(candidates + count, kUnroll, candidates[count - 1]);",
            "",
        ),
        Fault(
            "the last candidates left out",
            "round_up(std::min<int64_t>(count - first, kTileClasses), kUnroll);",
            "std::min<int64_t>(count - first, kTileClasses) / kUnroll * kUnroll;",
        ),
        Fault(
            "candidates of the first 32 only",
            "first < count; first += kTileClasses",
            "first < std::min<int64_t>(count, kTileClasses); first += kTileClasses",
        ),
        Fault("the least finite value wins nothing", "width, -INFINITY);", "width, -FLT_MAX);"),
        Fault("negative values win nothing", "width, -INFINITY);", "width, 0.0f);"),
        Fault(
            "ties to the highest candidate", "kFinite ? next > best :", "kFinite ? next >= best :"
        ),
        Fault(
            "NaN as in finite tiles",
            "return compare_candidates<false>(",
            "return compare_candidates<true>(",
        ),
        Fault(
            "the weights of the row above",
            "plan.rows.w1[band.begin + y];",
            "plan.rows.w1[band.begin];",
        ),
        Fault(
            "cells with different winners joined",
            "common_winner(top, bottom, *next) == winner",
            "common_winner(top, bottom, *next) >= 0",
        ),
        Fault(
            "tiles of any width",
            "             next->end - cell->begin <= kTileColumns",
            "             next->end - cell->begin <= 2 * kTileColumns",
        ),
        Fault(
            "a row of another image",
            "if (row.index == n * shape.H + y) continue;",
            "if (row.index == y) continue;",
        ),
        Fault(
            "rows of labels that overlap",
            "label_pitch(s.out_W + kTilePitch)",
            "label_pitch(s.out_W)",
        ),
        Fault(
            "images over one another",
            "store_band(labels + n * shape.out_H * shape.out_W,",
            "store_band(labels,",
        ),
        Fault(
            "int32 offsets of classes",
            "to_float(src[c * stride_C + columns[x] * stride_W])",
            "to_float(src[static_cast<int32_t>(c * stride_C) + columns[x] * stride_W])",
        ),
        Fault(
            "int32 offsets of columns",
            "to_float(src[c * stride_C + columns[x] * stride_W])",
            "to_float(src[c * stride_C + static_cast<int32_t>(columns[x] * stride_W)])",
        ),
        Fault(
            "int32 offsets of classes in dense rows",
            "to_float(src[c * stride_C + x])",
            "to_float(src[static_cast<int32_t>(c * stride_C) + x])",
        ),
        Fault(
            "int32 offsets of images",
            "logits + n * shape.stride_N +",
            "logits + static_cast<int32_t>(n * shape.stride_N) +",
        ),
        Fault(
            "int32 offsets of rows",
            "+ y * shape.stride_H, plan",
            "+ static_cast<int32_t>(y * shape.stride_H), plan",
        ),
        Fault(
            "no room for repeated candidates",
            "candidates(plan.shape.C + kUnroll)",
            "candidates(plan.shape.C)",
        ),
        Fault(
            "logits read past the last column",
            "x < width; ++x) dst[c * pitch + x] = to_float(src[c * stride_C + x]);",
            "x <= width; ++x) dst[c * pitch + x] = to_float(src[c * stride_C + x]);",
        ),
        Fault(
            "a row of the greatest band not stored",
            "y = band.begin; y < band.end; ++y",
            "y = band.begin; y < band.end - (band.end - band.begin) / kTileRows; ++y",
        ),
    ],
    "csrc/cpu/upsample_cross_entropy.cpp": [
        Fault(
            "offset of a row in 32 bits",
            "logits + n * s.stride_N + y * s.stride_H, plan);",
            "logits + static_cast<int>(n * s.stride_N + y * s.stride_H), plan);",
            FAR_CPU,
        ),
        Fault(
            "offset of a class in 32 bits",
            "centred[c * pitch + x + 1] = src[c * stride_C + x];",
            "centred[c * pitch + x + 1] = src[static_cast<int>(c * stride_C) + x];",
            FAR_CPU,
        ),
        Fault(
            "offset of a gathered class in 32 bits",
            "src[c * stride_C + x * stride_W]",
            "src[static_cast<int>(c * stride_C + x * stride_W)]",
            FAR_CPU,
        ),
        Fault(
            "offset of an image's incoming gradient in 32 bits",
            "grad_loss + n * grad_loss_strides[0],",
            "grad_loss + static_cast<int>(n * grad_loss_strides[0]),",
            FAR_CPU,
        ),
        Fault(
            "offset of a row's incoming gradient in 32 bits",
            "image.grad_loss + (group.y + i) * image.grad_loss_stride_H;",
            "image.grad_loss + static_cast<int>((group.y + i) * image.grad_loss_stride_H);",
            FAR_CPU,
        ),
        Fault(
            "offset of a column's incoming gradient in 32 bits",
            "grad_loss[x * image.grad_loss_stride_W]",
            "grad_loss[static_cast<int>(x * image.grad_loss_stride_W)]",
            FAR_CPU,
        ),
        Fault(
            "cpu: a band past the last row",
            "std::min(begin + band_rows, s.H), plan)",
            "begin + band_rows, plan)",
        ),
        Fault(
            "cpu: a source row of another image",
            "row.index != n * s.H + y) {",
            "row.index % s.H != y || row.index < 0) {",
        ),
        Fault(
            "cpu: threshold of wild blocks too low",
            "constexpr float kTame = -80.0f",
            "constexpr float kTame = -150.0f",
        ),
        Fault(
            "cpu: last corner of a block not checked",
            "v <= block.cell + kLanes; ++v",
            "v < block.cell + kLanes; ++v",
        ),
        Fault(
            "cpu: 32-bit strides of classes",
            "const int64_t stride_C = plan.shape.stride_C, stride_W",
            "const int32_t stride_C = plan.shape.stride_C, stride_W",
        ),
        Fault(
            "cpu: 32-bit offsets of the incoming gradient",
            "(group.y + i) * image.grad_loss_stride_H;",
            "static_cast<int32_t>((group.y + i) * image.grad_loss_stride_H);",
        ),
        Fault(
            "cpu: ignored pixels' NaN forgotten",
            "log_sum[slot] = image.log_sum_exp[pixel] * kLog2E;",
            "if (target != plan.params.ignore_index)\n"
            "        log_sum[slot] = image.log_sum_exp[pixel] * kLog2E;",
        ),
        Fault(
            "cpu: sums of rows in fp32",
            "double loss = 0.0, weight = 0.0;",
            "float loss = 0.0f, weight = 0.0f;",
        ),
        Fault("cpu: exponentials out of range", "(x < kTame ? 0u : ~0u)", "~0u"),
        Fault(
            "cpu: the last bad target is named",
            "if (sums->bad_pixel < 0 && row_sums[row].bad_x >= 0) {",
            "if (row_sums[row].bad_x >= 0) {",
        ),
        Fault("cpu: last source pixel not repeated", "    logit[W + 1] = logit[W];\n", ""),
        Fault(
            "cpu: 32-bit targets",
            "if (target < 0 || target >= C) {  // the",
            "if (int32_t(target) < 0 || int32_t(target) >= C) {  // the",
        ),
    ],
    "csrc/cuda/upsample/cells.cuh": [
        Fault("first pixel of a cell off by one", "begin[mine] = i;", "begin[mine] = i + 1;"),
        Fault("weights swapped", "make_float2(pair.w0, pair.w1)", "make_float2(pair.w1, pair.w0)"),
        Fault(
            "last cell of a tile one pixel short",
            "begin[mine + 1] = count = n;",
            "begin[mine + 1] = n - 1;\n      count = n;",
        ),
        Fault("past the last row", "y + 1 < shape.H ? shape.stride_H : 0", "shape.stride_H"),
        Fault("past the last column", "x + 1 < shape.W ? shape.stride_W : 0", "shape.stride_W"),
        Fault(
            "offset of a class in 32 bits",
            "const Logit* p = a + c * stride_C;",
            "const Logit* p = a + static_cast<int>(c * stride_C);",
            FAR_UPSAMPLING,
        ),
        Fault(
            "offset of an image in 32 bits",
            "logits + n * shape.stride_N + y",
            "logits + static_cast<int>(n * shape.stride_N) + y",
            FAR_UPSAMPLING,
        ),
        Fault(
            "offset of a row in 32 bits",
            "+ y * shape.stride_H + x",
            "+ static_cast<int>(y * shape.stride_H) + x",
            FAR_UPSAMPLING,
        ),
        Fault(
            "offset of a column in 32 bits",
            "+ x * shape.stride_W,",
            "+ static_cast<int>(x * shape.stride_W),",
            FAR_UPSAMPLING,
        ),
        Fault(
            "offset of the next pixel in 32 bits",
            "const Logit* a;  // class 0\n  int64_t right, down, stride_C;",
            "const Logit* a;  // class 0\n  int right, down;\n  int64_t stride_C;",
            FAR_UPSAMPLING,
        ),
        Fault("too few cells to a tile", "return pixels * 3 / 10 + 2;", "return pixels * 2 / 10;"),
        Fault(
            "an int32 offset of the third class",
            "const Logit* p = a + c * stride_C;",
            "const Logit* p = a + static_cast<int32_t>(c * stride_C);",
        ),
        Fault(
            "an int32 offset of the image",
            "logits + n * shape.stride_N +",
            "logits + static_cast<int32_t>(n * shape.stride_N) +",
        ),
        Fault("pixels past the output", "    if (i >= n) return;\n", ""),
        Fault(
            "cells counted from the first of the map",
            "if (i == 0) first_cell = static_cast<int32_t>(origin);",
            "if (i == 0) first_cell = 0;",
        ),
    ],
    "csrc/cuda/upsample/upsample_argmax.cu": [
        Fault("infinity counts as finite", "finite &= fabsf(value) < 0x1p126f;", ""),
        Fault(
            "ties between lanes missed",
            "second = fmaxf(fmaxf(second, other_second), fminf(best, other));",
            "second = fmaxf(second, other_second);",
        ),
        Fault("second best forgotten", "second = fmaxf(second, fminf(value, best));", ""),
        Fault(
            "every winner is safe",
            "return second <= losing_bound(best) ? winner : kUnsure - winner;",
            "return winner;",
        ),
        Fault("no wait for the bounds", "__syncwarp();\n  int count = 0;", "int count = 0;"),
        Fault("no wait for the list", "__syncwarp();\n  return count;", "return count;"),
        Fault(
            "one corner's bound is enough",
            "x.x > bound.x || x.y > bound.y || x.z > bound.z || x.w > bound.w",
            "x.x > bound.x || x.y > bound.y || x.z > bound.z",
        ),
        Fault(
            "one more candidate than fits",
            "if (count <= kMaxCandidates) {",
            "if (count <= kMaxCandidates + 1) {",
        ),
        Fault("lower corners not checked", "(i + lane / 2 % 2) * (tile", "i * (tile"),
        Fault("rows below the cell written", "if (y + r * kCellLanesH < y_end) tile", "tile"),
        Fault("bytes of a vector overlap", "<< byte % 4 * 8;", "<< byte % 4 * 4;"),
        Fault(
            "a cell inside a vector skipped",
            "for (int c = first_cell; c < last_cell; ++c)",
            "for (int c = first_cell + 1; c < last_cell; ++c)",
        ),
        Fault("a vector of one pixel's label", "tile.label[y][x + e];", "tile.label[y][x];"),
        Fault("columns past the tile stored", "if (x >= tile.cols.count) return;", ""),
        Fault("no barrier before the ranks", "__syncthreads();\n\n  // Ranks", "\n  // Ranks"),
        Fault("no barrier after the ranks", "__syncthreads();\n\n  // Labels", "\n  // Labels"),
        Fault(
            "no barrier before contested cells",
            "__syncthreads();\n\n  for (int i = warp;",
            "\n  for (int i = warp;",
        ),
        Fault(
            "no barrier before the stores",
            "__syncthreads();\n\n  constexpr int kVector",
            "\n  constexpr int kVector",
        ),
        Fault(
            "three corners agree",
            "&& below[0] == rank[0] && below[1] == rank[0];",
            "&& below[0] == rank[0];",
        ),
        Fault("unsure winners agree", "rank[0] >= 0 && rank[1]", "rank[1]"),
        Fault("images over one another", "labels += (blockIdx.z * shape.out_H + y)", "labels += y"),
        Fault(
            "lanes leave before a shuffle",
            "i - lane < pixels * kLanesPerPixel",
            "i < pixels * kLanesPerPixel",
        ),
        Fault("stale contested count", "if (threadIdx.x == 0) tile.num_contested = 0;", ""),
        Fault(
            "offset of a class in 32 bits",
            "const float value = to_float(pixel[c * stride_C]);",
            "const float value = to_float(pixel[static_cast<int>(c * stride_C)]);",
            FAR_UPSAMPLING,
        ),
        Fault(
            "offset of a tile's labels in 32 bits",
            "labels += (blockIdx.z * shape.out_H + y) * shape.out_W + x;",
            "labels += static_cast<int>((blockIdx.z * shape.out_H + y) * shape.out_W + x);",
            FAR_UPSAMPLING,
        ),
        Fault(
            "number of a pixel in 32 bits",
            "const int64_t pixel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;",
            "const int64_t pixel = blockIdx.x * kThreads + threadIdx.x;",
            FAR_UPSAMPLING,
        ),
        Fault("pixels past the last", "  if (pixel >= pixels) return;\n", ""),
        Fault("vectors in unaligned rows", "shape.out_W % kVector == 0", "shape.out_W >= kVector"),
        Fault(
            "a row past the tile stored",
            "y < tile.rows.count; y += kRowStep",
            "y <= tile.rows.count; y += kRowStep",
        ),
        Fault(
            "the last classes not listed",
            "first < C && count <= kMaxCandidates; first += 32",
            "first + 31 < C && count <= kMaxCandidates; first += 32",
        ),
        Fault(
            "a candidate more than fits listed",
            "can_win && slot < kMaxCandidates",
            "can_win && slot <= kMaxCandidates",
        ),
        Fault("classes past the last read", "corners.at(min(c, C - 1))", "corners.at(c)"),
        Fault("negative values win nothing", "best_class < 0 || replaces_best", "replaces_best"),
        Fault(
            "rows past the last read",
            "min(tile.rows.first_cell + pixel / (cells_W + 1), last_row)",
            "tile.rows.first_cell + pixel / (cells_W + 1)",
        ),
        Fault(
            "columns past the last read",
            "min(tile.cols.first_cell + pixel % (cells_W + 1), last_col)",
            "tile.cols.first_cell + pixel % (cells_W + 1)",
        ),
        Fault(
            "only one lane's classes are finite",
            "    finite &= __shfl_xor_sync(kAllLanes, finite, lanes);\n",
            "",
        ),
        Fault(
            "weights of the first row", "weights[min(y + r * kCellLanesH, y_end - 1)]", "weights[y]"
        ),
        Fault(
            "int32 offsets of images",
            "logits + blockIdx.z * shape.stride_N +",
            "logits + static_cast<int>(blockIdx.z * shape.stride_N) +",
        ),
        Fault(
            "int32 offsets of classes",
            "to_float(pixel[c * stride_C])",
            "to_float(pixel[static_cast<int32_t>(c * stride_C)])",
        ),
        Fault(
            "labels truncated to a byte",
            "*labels = static_cast<Label>(vector[0]);",
            "*labels = static_cast<Label>(static_cast<uint8_t>(vector[0]));",
        ),
        Fault(
            "labels of all classes truncated to int16",
            "      best_class = c;\n",
            "      best_class = static_cast<int16_t>(c);\n",
        ),
        Fault(
            "the last part of the classes not ranked",
            "for (int32_t c = part; c < C; c +=",
            "for (int32_t c = part; c < C / kLanesPerPixel * kLanesPerPixel; c +=",
        ),
        Fault(
            "cells past as many as threads",
            "cell < cells_H * cells_W; cell += kThreads",
            "cell < min(cells_H * cells_W, kThreads); cell += kThreads",
        ),
        Fault(
            "ranks past as many as threads",
            "i - lane < pixels * kLanesPerPixel; i += kThreads",
            "i - lane < min(pixels * kLanesPerPixel, kThreads); i += kThreads",
        ),
        Fault(
            "a block of pixels too few",
            "(pixels + kThreads - 1) / kThreads",
            "(pixels + kThreads - 2) / kThreads",
        ),
        Fault(
            "a tile too few",
            "(shape.out_W + kTileW - 1) / kTileW",
            "(shape.out_W + kTileW - 2) / kTileW",
        ),
        Fault(
            "a cell's first columns only",
            "x < x_end; x += kCellLanesW",
            "x < min(x_end, tile.cols.begin[j] + 2 * kCellLanesW); x += kCellLanesW",
        ),
        Fault("the least finite value wins nothing", "best[r] = -INFINITY;", "best[r] = -1.0f;"),
        Fault(
            "a tie for the later candidate",
            "label[r] = value > best[r] ? k",
            "label[r] = value >= best[r] ? k",
        ),
    ],
    "csrc/cuda/upsample/upsample_cross_entropy.cu": [
        Fault(
            "no smoothing term",
            "loss += smooth_part * smooth;",
            ";",
        ),
        Fault(
            "rows past the cell count",
            "        if (r >= num_rows) label[r] = kIgnored;\n",
            "",
        ),
        Fault(
            "every row has the target of the first",
            "column_target[min(r, num_rows - 1) * out_W]",
            "column_target[0]",
        ),
        Fault(
            "idle threads add their loss",
            "if (active) {\n        sums.loss",
            "{\n        sums.loss",
        ),
        Fault("rows past the cell stored", "if (active && r < num_rows) {", "if (active) {"),
        Fault(
            "no barrier before warps are added",
            "if (threadIdx.x % 32 == 0) tile.warps[threadIdx.x / 32] = sums;\n  __syncthreads();",
            "if (threadIdx.x % 32 == 0) tile.warps[threadIdx.x / 32] = sums;",
        ),
        Fault(
            "mean over all pixels' weights",
            "mean ? sums.loss / sums.weight : sums.loss",
            "sums.loss",
        ),
        Fault(
            "class weight left out of the loss",
            "const float weight = class_weight(params, label[r]);",
            "const float weight = 1.0f;",
        ),
        Fault(
            "class weight left out of smoothing",
            "weighted.x = fma_rn(class_weight(params, c), ends.x, weighted.x);",
            "weighted.x = fma_rn(1.0f, ends.x, weighted.x);",
        ),
        Fault(
            "offset of a pixel in 32 bits",
            "const int64_t pixel = (strip.n * shape.out_H + y) * shape.out_W + my_x;",
            "const int pixel = (strip.n * shape.out_H + y) * shape.out_W + my_x;",
            FAR_UPSAMPLING,
        ),
        Fault(
            "only the first 512 blocks' sums",
            "i < blocks; i += kReduceThreads",
            "i < (blocks < 512 ? blocks : 512); i += kReduceThreads",
        ),
        Fault(
            "half of the reducing warps", "warp < kReduceThreads / 32; ++warp", "warp < 8; ++warp"
        ),
        Fault(
            "a column past the last read",
            "my_x = min(x + static_cast<int32_t>(threadIdx.x), x_end - 1);",
            "my_x = min(x + static_cast<int32_t>(threadIdx.x), x_end);",
        ),
    ],
    "csrc/cuda/upsample/upsample_cross_entropy.cuh": [
        Fault(
            "one maximum for both rows",
            "maxima[i] = make_float2(top.x, bottom.x);",
            "maxima[i] = make_float2(top.x, top.x);",
        ),
        Fault(
            "wild blocks not detected",
            "if (!(fminf(top.y, bottom.y) >= kTame)) atomicMax(&wild, 1);",
            "",
        ),
        Fault(
            "no barrier after the maxima",
            "atomicMax(&wild, 1);\n    }\n    __syncthreads();",
            "atomicMax(&wild, 1);\n    }",
        ),
        Fault(
            "rows replaced while read",
            "__syncthreads();  // before the rows are overwritten",
            "",
        ),
        Fault(
            "classes replaced while read",
            "__syncthreads();  // before the values are overwritten",
            "",
        ),
        Fault("exponentials not stepped", "e = mul_rn(e, ratio);", ""),
        Fault("ignored pixels count", "if (target == params.ignore_index) return kIgnored;", ""),
        Fault(
            "a target past the last class",
            "static_cast<uint64_t>(target) < static_cast<uint64_t>(C);",
            "static_cast<uint64_t>(target) <= static_cast<uint64_t>(C);",
        ),
        Fault(
            "a negative target is a class",
            "static_cast<uint64_t>(target) < static_cast<uint64_t>(C);",
            "target < C;",
        ),
        Fault(
            "cells of eight rows take the loop of short ones",
            "if (num_rows > kRestart) {",
            "if (num_rows > kRows) {",
        ),
        Fault(
            "the logarithm of NaN is a number",
            "0x1p-23f, x - x);",
            "0x1p-23f, 0.0f);",
        ),
        Fault(
            "a logarithm without the highest power",
            "float p = 0x1.ba18f8p-2f;",
            "float p = 0.0f;",
        ),
        Fault(
            "offset of ranges in 32 bits",
            "ranges + strip.n * shape.H * shape.W + strip.origin + i;",
            "ranges + static_cast<int>(strip.n * shape.H * shape.W) + strip.origin + i;",
            FAR_UPSAMPLING,
        ),
        Fault(
            "offset of an image in 32 bits",
            "logits + strip.n * shape.stride_N + strip.origin * shape.stride_W;",
            "logits + static_cast<int>(strip.n * shape.stride_N) + strip.origin * shape.stride_W;",
            FAR_UPSAMPLING,
        ),
        Fault(
            "offset of a row in 32 bits",
            "bottom = origin + strip.bottom * shape.stride_H;",
            "bottom = origin + static_cast<int>(strip.bottom * shape.stride_H);",
            FAR_UPSAMPLING,
        ),
        Fault(
            "offset of classes in 32 bits",
            "const int64_t offset = (first + c) * stride_C + i * stride_W;",
            "const int offset = (first + c) * stride_C + i * stride_W;",
            FAR_UPSAMPLING,
        ),
        Fault("sums in fp32", "double loss, weight;", "float loss, weight;"),
        Fault(
            "wild blocks detected at their tops only",
            "fminf(top.y, bottom.y) >= kTame",
            "top.y >= kTame",
        ),
        Fault(
            "threshold of wild blocks too low",
            "constexpr float kTame = -60.0f",
            "constexpr float kTame = -140.0f",
        ),
        Fault(
            "32-bit offsets of classes",
            "const int64_t offset = (first + c) * stride_C + i * stride_W;",
            "const int32_t offset = static_cast<int32_t>((first + c) * stride_C + i * stride_W);",
        ),
        Fault(
            "32 classes of a chunk in channels_last",
            "c < count; c += 32) put(c, i);",
            "c < min(count, 32); c += 32) put(c, i);",
        ),
        Fault(
            "steps that do not reach the last row",
            "/ static_cast<float>(num_rows - 1)",
            "/ static_cast<float>(num_rows)",
        ),
    ],
    "csrc/cuda/upsample/upsample_cross_entropy_bwd.cu": [
        Fault(
            "gradient: no barrier before the classes",
            "edges.load_from(first_class);\n      __syncthreads();",
            "edges.load_from(first_class);",
        ),
        Fault(
            "gradient: columns replaced while read",
            "__syncthreads();\n    }\n  }\n  __syncthreads();",
            "}\n  }\n  __syncthreads();",
        ),
        Fault(
            "gradient: no barrier before the cells' sides",
            "__syncthreads();\n    }\n  }\n  __syncthreads();",
            "__syncthreads();\n    }\n  }",
        ),
        Fault(
            "gradient: no smoothing",
            "const float smoothed = smooth_part * grad[r];",
            "const float smoothed = 0.0f;",
        ),
        Fault(
            "gradient: full weight of the target despite smoothing",
            "const float taken = target_part * class_weight(params, label[r]) * grad[r];",
            "const float taken = class_weight(params, label[r]) * grad[r];",
        ),
        Fault(
            "gradient: class weight left out",
            "const float taken = target_part * class_weight(params, label[r]) * grad[r];",
            "const float taken = target_part * grad[r];",
        ),
        Fault(
            "gradient: mean without its divisor",
            "grad.divisor ? 1.0f / *grad.divisor : 1.0f;",
            "1.0f;",
        ),
        Fault(
            "gradient: incoming gradient of the first row",
            "pixel.grad_loss[row * pixel.grad_stride_H]",
            "pixel.grad_loss[0]",
        ),
        Fault(
            "gradient: only the first run of a column",
            "for (int k = 1; k < num_runs; ++k) {",
            "for (int k = 1; k < 1; ++k) {",
        ),
        Fault(
            "gradient: runs of one class not separated",
            "if (label[r] != run.label) {",
            "if (r == 0) {",
        ),
        Fault(
            "gradient: shift of wild blocks forgotten",
            "if (wild) tile.shift[r][i] = d.shift[r];",
            "",
        ),
        Fault(
            "gradient: wild blocks with the rounded logarithm",
            "if (!wild) d.log_sum[r]",
            "d.log_sum[r]",
        ),
        Fault(
            "gradient: every block has the first classes",
            "static_cast<int32_t>(blockIdx.y) * layout.chunk;",
            "0;",
        ),
        Fault(
            "gradient: a cell's columns of another round",
            "const int end = min(col_begin[cell + 1], x + kThreads) - x;",
            "const int end = col_begin[cell + 1] - x;",
        ),
        Fault(
            "gradient: right weight of a column left out",
            "corners.y = fma_rn(top, w.y, corners.y);",
            "corners.y = fma_rn(top, w.x, corners.y);",
        ),
        Fault(
            "gradient: next cell's columns forgotten",
            "(x > 0 ? before.w : before.z) + after.z;",
            "(x > 0 ? before.w : before.z);",
        ),
        Fault(
            "gradient: first column takes the side of an inner one",
            "float top = (x > 0 ? before.y : before.x)",
            "float top = before.y",
        ),
        Fault(
            "gradient: last column's right side forgotten",
            "if (x == strip.W - 1) {",
            "if (false) {",
        ),
        Fault(
            "gradient: top row takes the side of an inner one",
            "(y > 0 ? *bottoms : *tops)",
            "*bottoms",
        ),
        Fault(
            "gradient: cells below a row forgotten",
            "(y > 0 ? *bottoms : *tops) + tops[2 * plane];",
            "(y > 0 ? *bottoms : *tops);",
        ),
        Fault(
            "gradient: bottom row's lower side forgotten",
            "if (y == shape.H - 1) sum += bottoms[2 * plane];",
            "",
        ),
        Fault(
            "offset of a pixel in 32 bits",
            "const int64_t pixel = (strip.n * shape.out_H + y) * shape.out_W + my_x;",
            "const int pixel = (strip.n * shape.out_H + y) * shape.out_W + my_x;",
            FAR_UPSAMPLING,
        ),
        Fault(
            "offset of the incoming gradient in 32 bits",
            "grad.loss + strip.n * grad.stride_N + y * grad.stride_H + my_x * grad.stride_W,",
            "grad.loss + static_cast<int>(strip.n * grad.stride_N + y * grad.stride_H) +\n"
            "              static_cast<int>(my_x * grad.stride_W),",
            FAR_UPSAMPLING,
        ),
        Fault(
            "stride of the incoming gradient in 32 bits",
            "  const float* grad_loss;\n  int64_t grad_stride_H;",
            "  const float* grad_loss;\n  int grad_stride_H;",
            FAR_UPSAMPLING,
        ),
        Fault(
            "offset of an image's cells in 32 bits",
            "(strip.n * (shape.H + 1) + strip.row) * 2 * plane;",
            "static_cast<int>((strip.n * (shape.H + 1) + strip.row) * 2 * plane);",
            FAR_UPSAMPLING,
        ),
        Fault(
            "offset within cells in 32 bits",
            "const int64_t offset =\n        channels_last",
            "const int offset =\n        channels_last",
            FAR_UPSAMPLING,
        ),
        Fault(
            "number of an element in 32 bits",
            "const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;",
            "const int64_t i = blockIdx.x * kThreads + threadIdx.x;",
            FAR_UPSAMPLING,
        ),
        Fault(
            "offset of gathered cells in 32 bits",
            "(n * (shape.H + 1) + y) * 2 * plane + in_plane;",
            "static_cast<int>((n * (shape.H + 1) + y) * 2 * plane + in_plane);",
            FAR_UPSAMPLING,
        ),
        Fault(
            "offset of a gathered element in 32 bits",
            "[channels_last ? i : ((n * shape.C + c) * shape.H + y) * shape.W + x]",
            "[channels_last ? int(i) : int(((n * shape.C + c) * shape.H + y) * shape.W + x)]",
            FAR_UPSAMPLING,
        ),
        Fault(
            "gradient: class weight left out of smoothing",
            "smooths ? class_weight(params, first_class + c) : 0.0f",
            "smooths ? 1.0f : 0.0f",
        ),
        Fault(
            "gradient: total weight left out of smoothing",
            "scale = taken + smoothed * total_class_weight;",
            "scale = taken + smoothed;",
        ),
        Fault(
            "gradient: an element past the last",
            "if (i >= shape.N * shape.H * plane) return;",
            "if (i > shape.N * shape.H * plane) return;",
        ),
        Fault(
            "gradient: 32-bit offsets of the incoming gradient",
            "y * grad.stride_H + my_x * grad.stride_W",
            "static_cast<int32_t>(y * grad.stride_H) + my_x * grad.stride_W",
        ),
        Fault(
            "gradient: ignored pixels' NaN forgotten",
            "scale *= ptx::ex2_approx(-d.log_sum[r]);",
            "if (label[r] != kIgnored) scale *= ptx::ex2_approx(-d.log_sum[r]);",
        ),
        Fault(
            "gradient: pixels past the last row read",
            "const int row = min(r, num_rows - 1);",
            "const int row = r;",
        ),
        Fault(
            "gradient: rows past the cell count",
            "    if (r >= num_rows) label[r] = kIgnored;\n",
            "",
        ),
        Fault(
            "gradient: only the first four rows of a cell",
            "if (i > 0 && i * kRestart >= progression.num_rows) break;",
            "if (i > 0) break;",
        ),
        Fault(
            "gradient: wild blocks take the progression",
            "wild ? add(std::true_type{})",
            "false ? add(std::true_type{})",
        ),
        Fault(
            "gradient: rows of a vector swapped",
            "make_float4(row_before.x, row_before.y, row.x, row.y)",
            "make_float4(row.x, row.y, row_before.x, row_before.y)",
        ),
        Fault(
            "gradient: exponentials grow from the last row",
            "fma_rn(sum.x, ratio, rows.x), fma_rn(sum.y, ratio, rows.y)",
            "fma_rn(rows.x, ratio, sum.x), fma_rn(rows.y, ratio, sum.y)",
        ),
        Fault(
            "gradient: all rows follow from the first exponential",
            "between(ends, progression.starts[i])",
            "between(ends, progression.starts[0])",
        ),
    ],
    "csrc/cuda/upsample/upsample_cross_entropy_prepare.cu": [
        Fault(
            "first row of a cell off",
            "cell_of(middle, size, scale, align_corners) >= cell",
            "cell_of(middle, size, scale, align_corners) > cell",
        ),
        Fault(
            "clamped pixels in the first cell",
            "pair.lo == 0 && pair.w1 == 0.0f ? 0 : pair.lo + 1",
            "pair.lo + 1",
        ),
        Fault(
            "total class weight without half a warp's share",
            "for (int lanes = 16; lanes > 0; lanes /= 2) total",
            "for (int lanes = 8; lanes > 0; lanes /= 2) total",
        ),
        Fault(
            "offset of a class in 32 bits",
            "to_float(pixel[c * stride_C]);",
            "to_float(pixel[static_cast<int>(c * stride_C)]);",
            FAR_UPSAMPLING,
        ),
        Fault(
            "number of a pixel in 32 bits",
            "const int64_t i = (block * kThreads + threadIdx.x) / kLanesPerPixel;",
            "const int64_t i =\n"
            "        static_cast<uint32_t>(block * kThreads + threadIdx.x) / kLanesPerPixel;",
            FAR_UPSAMPLING,
        ),
        Fault(
            "offset of a source pixel in 32 bits",
            "logits + n * shape.stride_N + y * shape.stride_H + x * shape.stride_W;",
            "logits + static_cast<int>(n * shape.stride_N + y * shape.stride_H) +\n"
            "                          static_cast<int>(x * shape.stride_W);",
            FAR_UPSAMPLING,
        ),
        Fault(
            "size of the workspace in 32 bits",
            "int64_t bytes = 0;",
            "int bytes = 0;",
            FAR_UPSAMPLING,
        ),
        Fault(
            "threads for two cells too few",
            "blocks_for(shape.H + 2 + shape.W + 2)",
            "blocks_for(shape.H + shape.W + 2)",
        ),
        Fault(
            "no memory for the last column's cell",
            "take(workspace.col_begin, shape.W + 2)",
            "take(workspace.col_begin, shape.W + 1)",
        ),
        Fault(
            "no memory for the last cells' gradients",
            "shape.N * (shape.H + 1) * 2 * shape.C * shape.W : 0",
            "shape.N * shape.H * 2 * shape.C * shape.W : 0",
        ),
        Fault(
            "no memory for the last pixel's range",
            "take(workspace.ranges, shape.N * shape.H * shape.W)",
            "take(workspace.ranges, shape.N * shape.H * shape.W - 1)",
        ),
        Fault("more blocks than an int32", " && num_blocks(shape, layout) < INT32_MAX", ""),
    ],
}
