"""Faults to put into the kernels and the package, for mutate.py. The tests must catch every one."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Guard(NamedTuple):
    """Of a source: the tests that must notice."""

    tests: str  # files, and what -k selects in them
    module: str = "_emulated"  # the one to compile, for csrc; the work lists are made by _C


ARGMAX = Guard("tests/test_upsample_argmax_rules.py tests/test_upsample_argmax.py emulated")
ARGMAX_CPU = Guard(
    "tests/test_upsample_argmax_rules.py tests/test_upsample_argmax.py "
    "(cpu or outputs or streamed or half_precision or several_threads) and not emulated",
    "_C",
)
ARGMAX_TRITON = Guard(
    "tests/test_upsample_argmax_rules.py tests/test_upsample_argmax.py "
    "(triton or interpreter or interpreted) and not (compile or export or opcheck or real_logits)"
)
ASPP = Guard("tests/test_aspp.py tests/test_prepared_kernels.py prepared_kernels or emulated")
CALLS = Guard(
    "tests/test_kernel_calls.py tests/test_workspaces.py tests/test_tile_edges.py "
    "kernel_calls or workspaces or branches or along"
)
CONV = Guard(
    "tests/test_convolution_kernel.py tests/test_dilated_conv2d.py convolution_kernel or emulated_"
)
DEPTHWISE = Guard("tests/test_dilated_conv2d.py tests/test_fused_conv2d.py emulated and depthwise")
ENTROPY = Guard(
    "tests/test_upsample_cross_entropy_limits.py tests/test_upsample_cross_entropy.py "
    "emulated and not (compile or export or opcheck)"
)
ENTROPY_CPU = Guard("tests/test_upsample_cross_entropy_limits.py cpu or threads_share", "_C")
ENTROPY_TRITON = Guard("tests/test_upsample_cross_entropy_limits.py triton")
EVALUATION = Guard("tests/test_evaluation.py not command and not wrong_arguments")
FAR = "tests/test_large_offsets.py"
FAR_CONV = Guard(f"{FAR} test_convolution or weight_gradient or bias_gradient or on_the_way")
FAR_CPU = Guard(f"{FAR} cpu", "_C")
FAR_DEPTHWISE = Guard(f"{FAR} depthwise")
FAR_MEANS = Guard(f"{FAR} means or pooled")
FAR_UPSAMPLING = Guard(f"{FAR} argmax or far_labels or cross_entropy")
MEAN = Guard("tests/test_dilated_conv2d_and_mean.py emulated")
MEASURED = Guard("tests/test_measured.py")
NON_FINITE = Guard("tests/test_non_finite.py sm_80 or sm_90")
NON_FINITE_CPU = Guard("tests/test_non_finite.py cpu or prepared_model")
NON_FINITE_TRITON = Guard("tests/test_non_finite.py triton")
RECIPE = Guard("tests/test_recipe.py")
REGISTRATION = Guard(
    "tests/test_backends.py tests/test_arguments.py not (side_effects or symbolic)"
)
SCHEDULES = Guard("tests/test_schedules.py tests/test_zones.py schedules or executed", "_C")
TRAINING_DATA = Guard("tests/test_training_data.py")
TRANSFORMS = Guard("tests/test_transforms.py not (compiled or model_and)")
TRITON_ASPP = Guard("tests/test_triton.py images_that_differ or bias_of_images")
TRITON_DENSE = Guard("tests/test_triton_blocks.py not depthwise and not interpolation")
TRITON_DEPTHWISE = Guard("tests/test_triton_blocks.py depthwise or rate or strides")
TRITON_FAR = Guard("tests/test_triton_blocks.py far")
WGRAD_SM90 = Guard("tests/test_dilated_conv2d_wgrad_sm90.py not compiler")

GUARDS = {
    "csrc/common/bilinear.h": ARGMAX,
    "csrc/common/half.h": ARGMAX_CPU,
    "csrc/common/zones.h": Guard("tests/test_zones.py", "_C"),
    "csrc/cpu/exp2_log2.h": ENTROPY_CPU,
    "csrc/cpu/stream.h": ARGMAX_CPU,
    "csrc/cpu/upsample_argmax.cpp": ARGMAX_CPU,
    "csrc/cpu/upsample_cross_entropy.cpp": ENTROPY_CPU,
    "csrc/cuda/aspp.cu": ASPP,
    "csrc/cuda/cells.cuh": ARGMAX,
    "csrc/cuda/conv_epilogue.cuh": CONV,
    "csrc/cuda/depthwise.cuh": DEPTHWISE,
    "csrc/cuda/depthwise_conv2d.cu": DEPTHWISE,
    "csrc/cuda/depthwise_conv2d_wgrad.cu": DEPTHWISE,
    "csrc/cuda/dilated_conv2d.cu": CONV,
    "csrc/cuda/dilated_conv2d_sm90.cu": Guard(
        "tests/test_races.py tests/test_dilated_conv2d_sm90.py "
        "sm_90 or seeds_agree or pipeline or epilogue or means"
    ),
    "csrc/cuda/dilated_conv2d_wgrad.cu": Guard(
        "tests/test_races.py tests/test_dilated_conv2d_backward.py sums or emulated"
    ),
    "csrc/cuda/dilated_conv2d_wgrad_sm90.cu": WGRAD_SM90,
    "csrc/cuda/elements.cuh": NON_FINITE,
    "csrc/cuda/implicit_gemm.cuh": CONV,
    "csrc/cuda/pixel_means.cu": ASPP,
    "csrc/cuda/tensor_map.cuh": Guard(
        "tests/test_dilated_conv2d_sm90.py tests/test_cache_keys.py "
        "same_address or memory_of_others or more_weights"
    ),
    "csrc/cuda/upsample_argmax.cu": ARGMAX,
    "csrc/cuda/upsample_cross_entropy.cu": ENTROPY,
    "csrc/cuda/upsample_cross_entropy.cuh": ENTROPY,
    "csrc/cuda/upsample_cross_entropy_bwd.cu": ENTROPY,
    "csrc/cuda/upsample_cross_entropy_prepare.cu": ENTROPY,
    "csrc/cuda/wgrad_reduce.cuh": WGRAD_SM90,
    "deeplab_fast/_resident.py": Guard("tests/test_resident.py tests/test_cache_keys.py"),
    "deeplab_fast/backends.py": REGISTRATION,
    "deeplab_fast/cpu.py": NON_FINITE_CPU,
    "deeplab_fast/cuda_kernels/aspp.py": Guard(
        "tests/test_kernel_calls.py tests/test_aspp.py aspp and (limits or pooled or emulated)"
    ),
    "deeplab_fast/cuda_kernels/common.py": CALLS,
    "deeplab_fast/cuda_kernels/depthwise_conv2d.py": Guard(
        "tests/test_kernel_calls.py tests/test_workspaces.py tests/test_dilated_conv2d.py "
        "depthwise or rates_between"
    ),
    "deeplab_fast/cuda_kernels/dilated_conv2d.py": CALLS,
    "deeplab_fast/cuda_kernels/dilated_conv2d_and_mean.py": Guard(
        "tests/test_workspaces.py tests/test_tile_edges.py tests/test_dilated_conv2d_sm90.py means"
    ),
    "deeplab_fast/cuda_kernels/dilated_conv2d_backward.py": CALLS,
    "deeplab_fast/cuda_kernels/register.py": Guard("tests/test_fused_conv2d.py emulated"),
    "deeplab_fast/cuda_kernels/upsample_cross_entropy.py": ENTROPY,
    "deeplab_fast/cuda_kernels/work_lists.py": Guard(
        "tests/test_kernel_calls.py tests/test_cache_keys.py tests/test_dilated_conv2d_sm90.py "
        "tests/test_dilated_conv2d_wgrad_sm90.py kernel_calls or convolutions or boxes or fp32"
    ),
    "deeplab_fast/measured.py": MEASURED,
    "deeplab_fast/models/inference.py": NON_FINITE_CPU,
    "deeplab_fast/ops/_arguments.py": REGISTRATION,
    "deeplab_fast/ops/_convolution.py": Guard(
        "tests/test_measured.py tests/test_cache_keys.py classes or class or share"
    ),
    "deeplab_fast/ops/_library.py": REGISTRATION,
    "deeplab_fast/ops/_transforms.py": TRANSFORMS,
    "deeplab_fast/ops/aspp.py": REGISTRATION,
    "deeplab_fast/ops/dilated_conv2d.py": REGISTRATION,
    "deeplab_fast/ops/dilated_conv2d_and_mean.py": REGISTRATION,
    "deeplab_fast/ops/fused_conv2d.py": REGISTRATION,
    "deeplab_fast/ops/upsample_argmax.py": REGISTRATION,
    "deeplab_fast/ops/upsample_cross_entropy.py": REGISTRATION,
    "deeplab_fast/training/checkpoint.py": RECIPE,
    "deeplab_fast/training/data.py": TRAINING_DATA,
    "deeplab_fast/training/distributed.py": RECIPE,
    "deeplab_fast/training/evaluation.py": EVALUATION,
    "deeplab_fast/training/inference.py": EVALUATION,
    "deeplab_fast/training/loader.py": TRAINING_DATA,
    "deeplab_fast/training/log.py": RECIPE,
    "deeplab_fast/training/loop.py": RECIPE,
    "deeplab_fast/training/metrics.py": EVALUATION,
    "deeplab_fast/training/objective.py": RECIPE,
    "deeplab_fast/training/recipe.py": RECIPE,
    "deeplab_fast/training/transforms.py": TRAINING_DATA,
    "deeplab_fast/triton.py": Guard(
        "tests/test_triton.py versions or every_name or gpus_that or in_the_order or widened "
        "or refuses or together or asked or have_the_dtype or anywhere"
    ),
    "deeplab_fast/triton_kernels/aspp.py": NON_FINITE_TRITON,
    "deeplab_fast/triton_kernels/bilinear.py": Guard(
        "tests/test_triton_blocks.py tests/test_triton.py with_the_fma or fma_rounds_once"
    ),
    "deeplab_fast/triton_kernels/depthwise_conv2d.py": NON_FINITE_TRITON,
    "deeplab_fast/triton_kernels/dilated_conv2d.py": NON_FINITE_TRITON,
    "deeplab_fast/triton_kernels/upsample_argmax.py": ARGMAX_TRITON,
    "deeplab_fast/triton_kernels/upsample_cross_entropy.py": ENTROPY_TRITON,
}


class Fault(NamedTuple):
    name: str
    sound: str  # occurs once in the file
    faulty: str
    guard: Guard | None = None  # where it is not that of the file


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
    "csrc/common/zones.h": [
        Fault("zone edge off by one", "d < 0 ? -d : size - d", "d < 0 ? -d : size - d - 1"),
        Fault("zone edge of negative taps off by one", "d < 0 ? -d :", "d < 0 ? 1 - d :"),
        Fault(
            "input gradient with the forward's signs", "mirrored ? -forward : forward", "forward"
        ),
        Fault(
            "rates swapped",
            "offset(r, kernel_H, dilation_H, H), offset(s, kernel_W, dilation_W, W)",
            "offset(r, kernel_H, dilation_W, H), offset(s, kernel_W, dilation_H, W)",
        ),
        Fault("tap index by columns", "r * kernel_W + s}", "r * kernel_H + s}"),
        Fault("a tile's taps not united", "open[i] |= zone.taps[i];", "open[i] = zone.taps[i];"),
        Fault("last partial tile lost", "if (fill > 0) emit(", "if (false) emit("),
        Fault(
            "shortest items first",
            "return a.num_steps > b.num_steps;",
            "return a.num_steps < b.num_steps;",
        ),
        Fault("rectangle on the wrong side", "std::max(0, -tap.dy)", "std::max(0, tap.dy)"),
        Fault("pixels of another image", "(n * H + y) * W + x);", "(n * W + y) * W + x);"),
        Fault(
            "far taps not clipped",
            "std::clamp<int64_t>(mirrored ? -forward : forward, -size, size)",
            "mirrored ? -forward : forward",
        ),
        Fault("rows backwards", "if (i % 2 == 1) std::reverse", "if (i % 2 == 2) std::reverse"),
        Fault(
            "the row below the map is inside",
            "static_cast<uint32_t>(tap.dy) < static_cast<uint32_t>(H)",
            "static_cast<uint32_t>(tap.dy) <= static_cast<uint32_t>(H)",
            CONV,
        ),
        Fault(
            "a piece of a split sum skipped",
            "for (int64_t p = 1; p <= pieces; ++p) ends",
            "for (int64_t p = 1; p < pieces; ++p) ends",
        ),
        Fault(
            "a slot of a split sum not added",
            "first_slot, static_cast<int32_t>(ends.size())}",
            "first_slot, static_cast<int32_t>(ends.size() - 1)}",
        ),
        Fault("pieces overlap", "        begin = end;\n", "        begin = end - 1;\n"),
        Fault("no wrap-around rule", "part = 64; part <= 96;", "part = 64; part < 64;"),
        Fault(
            "split for any gain",
            "best.makespan + best.makespan / 100 < whole",
            "best.makespan < whole",
            SCHEDULES,
        ),
        Fault(
            "never split",
            "best.makespan + best.makespan / 100 < whole",
            "2 * best.makespan < whole",
            SCHEDULES,
        ),
        Fault(
            "no equal pieces",
            "for (int64_t part = 128; part >= 16; part -= 4)",
            "for (int64_t part = 128; part > 128; part -= 4)",
            SCHEDULES,
        ),
        Fault(
            "zones in the order of their sizes",
            "return from_size < from_snake ? by_size : order;",
            "return by_size;",
            SCHEDULES,
        ),
        Fault(
            "no search of an order",
            "for (bool improved = true; improved;) {",
            "for (bool improved = false; improved;) {",
            SCHEDULES,
        ),
        Fault(
            "an order kept that is not better",
            "if (cost >= best) return false;",
            "if (cost < best) return false;",
            SCHEDULES,
        ),
        Fault(
            "the overhead of a piece left out",
            "item.num_steps + (item.slot < 0 ? 0 : split_overhead)",
            "item.num_steps",
        ),
        Fault(
            "a worker is free when it starts",
            "loads.push({end, worker});",
            "loads.push({begin, worker});",
        ),
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
            "a row shorter than the way to the next line",
            "std::min<int64_t>((kLine - misaligned) % kLine, out_W)",
            "static_cast<int64_t>((kLine - misaligned) % kLine)",
        ),
        Fault(
            "lines that start elsewhere", "(kLine - misaligned) % kLine, out_W", "misaligned, out_W"
        ),
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
            "labels by way of a byte",
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
            "all columns taken for used", "stride_W == 1 && width == plan.shape.W", "stride_W == 1"
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
            "the last column not looked at for NaN",
            "x <= tile.last_column(); ++x) {\n    finite",
            "x < tile.last_column(); ++x) {\n    finite",
        ),
        Fault("the lower row not looked at for NaN", " && tile.bottom->sure[x] != kNotFinite", ""),
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
            "cells of any winner joined",
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
            "room for the candidates alone",
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
            "cpu: tame where exponentials underflow",
            "constexpr float kTame = -80.0f",
            "constexpr float kTame = -150.0f",
        ),
        Fault(
            "cpu: the last corner is tame",
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
            "if (target != plan.terms.ignore_index)\n"
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
            "if (target < 0 || target >= C) {  // refused",
            "if (int32_t(target) < 0 || int32_t(target) >= C) {  // refused",
        ),
    ],
    "csrc/cuda/aspp.cu": [
        Fault(
            "no barrier before the vector is read",
            "__syncthreads();\n\n  constexpr int kSize",
            "constexpr int kSize",
        ),
        Fault("half a warp's sums", "for (int distance = 16;", "for (int distance = 8;"),
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
    "csrc/cuda/cells.cuh": [
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
    "csrc/cuda/conv_epilogue.cuh": [
        Fault("bias not added", "value[i] += bias[i] + residual[i];", "value[i] += residual[i];"),
        Fault("residual not added", "value[i] += bias[i] + residual[i];", "value[i] += bias[i];"),
        Fault(
            "bias of the first image for all",
            "int64_t{pixel / (shape.H * shape.W)} * output.K + k",
            "k",
        ),
        Fault(
            "NaN becomes the bound",
            "if (value[i] < terms.low) value[i] = terms.low;",
            "if (!(value[i] >= terms.low)) value[i] = terms.low;",
        ),
        Fault("no upper bound", "if (value[i] > terms.high) value[i] = terms.high;", ""),
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
            "a piece left out of the reduction",
            "for (int i = 0; i < reduction.num_slots; ++i) {",
            "for (int i = 1; i < reduction.num_slots; ++i) {",
        ),
        Fault(
            "bias not added to split sums",
            "  epilogue.finish(pixel, sum);\n  epilogue.write(pixel, sum);",
            "  epilogue.write(pixel, sum);",
        ),
        Fault(
            "reduction of the rows above",
            "const int row = blockIdx.x % kBlocks * kRows + threadIdx.x / kRowThreads;",
            "const int row = blockIdx.x % kBlocks * kRows;",
        ),
        Fault("no split reduced", "if (work.num_reductions == 0) return {};", "return {};"),
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
            "offset of a piece in 32 bits",
            "const int64_t slot = reduction.first_slot + i;",
            "const int slot = reduction.first_slot + i;",
            FAR_CONV,
        ),
        Fault(
            "the lower bound drops NaN",
            "if (value[i] < terms.low) value[i] = terms.low;",
            "value[i] = fmaxf(value[i], terms.low);",
            NON_FINITE,
        ),
        Fault(
            "the upper bound drops NaN",
            "if (value[i] > terms.high) value[i] = terms.high;",
            "value[i] = fminf(value[i], terms.high);",
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
            "      // NaN is neither below nor above.\n"
            "      if (value[i] < terms.low) value[i] = terms.low;\n"
            "      if (value[i] > terms.high) value[i] = terms.high;",
            "value[i] += bias[i];\n"
            "      if (image_bias != nullptr && i < count) value[i] += image_bias[i];\n"
            "      if (value[i] < terms.low) value[i] = terms.low;\n"
            "      if (value[i] > terms.high) value[i] = terms.high;\n"
            "      value[i] += residual[i];",
            NON_FINITE,
        ),
        Fault(
            "bias twice in split sums",
            "  float sum[4] = {};",
            "  float sum[4] = {epilogue.bias[0], epilogue.bias[1], "
            "epilogue.bias[2], epilogue.bias[3]};",
            NON_FINITE,
        ),
        Fault(
            "a piece that is NaN left out",
            "sum[c] += piece[c];",
            "sum[c] += piece[c] == piece[c] ? piece[c] : 0.0f;",
            NON_FINITE,
        ),
        Fault(
            "each piece bounded below",
            "sum[c] += piece[c];",
            "sum[c] += piece[c] < terms.low ? terms.low : piece[c];",
            NON_FINITE,
        ),
        Fault(
            "last channel without the bias of an image",
            "if (image_bias != nullptr && i < count)",
            "if (image_bias != nullptr && i + 1 < count)",
            NON_FINITE,
        ),
    ],
    "csrc/cuda/depthwise.cuh": [
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
            "rows not mirrored",
            "if (!shape.mirrored) return {y, shape.rate_H, count};",
            "return {y, shape.rate_H, count};",
        ),
        Fault(
            "a run goes past the strip",
            "const int count = min(end - position,",
            "const int count = min(shape.H,",
        ),
        Fault(
            "bits of the first bf16 of a word in the second",
            "to[1] = __uint_as_float(word & 0xffff0000u);",
            "to[1] = __uint_as_float(word);",
            NON_FINITE,
        ),
        Fault(
            "fp16 saturates",
            "*p = __float2half_rn(value);",
            "*p = __float2half_rn(value > 65504.0f ? 65504.0f : value);",
            NON_FINITE,
        ),
    ],
    "csrc/cuda/depthwise_conv2d.cu": [
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
            "const bool has_next = j + 1 < rows && y >= 0 && y < shape.H;",
            "const bool has_next = j + 1 < rows && y >= 0;",
        ),
        Fault(
            "weights transposed",
            "taps[at % kTaps][at / kTaps] = part[j];",
            "taps[at / kVector][at % kVector] = part[j];",
        ),
        Fault(
            "columns not mirrored",
            "const int step_W = shape.mirrored ? -shape.rate_W : shape.rate_W;",
            "const int step_W = shape.rate_W;",
        ),
        Fault(
            "rates swapped",
            "const int step_W = shape.mirrored ? -shape.rate_W : shape.rate_W;",
            "const int step_W = shape.mirrored ? -shape.rate_H : shape.rate_H;",
        ),
        Fault(
            "sums start without bias",
            "for (int e = 0; e < kVector; ++e) sum[0][e] = start[e];",
            "for (int e = 0; e < kVector; ++e) sum[0][e] = 0.0f;",
        ),
        Fault("output a row off", "at - (kR / 2 + 1) * stride", "at - kR / 2 * stride"),
        Fault(
            "no barrier before the weights",
            "  __syncthreads();\n\n  const int vector",
            "  const int vector",
        ),
        Fault("residual not added", "value[e] += residual[e];", ";"),
        Fault(
            "any kernel: rows not mirrored",
            "const int64_t step_H = shape.mirrored ? -shape.rate_H : shape.rate_H;",
            "const int64_t step_H = shape.rate_H;",
        ),
        Fault(
            "any kernel: columns not mirrored",
            "const int64_t step_W = shape.mirrored ? -shape.rate_W : shape.rate_W;",
            "const int64_t step_W = shape.rate_W;",
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
            "row[s] = load_input(input + at, s, y >= 0 && y < shape.H);",
            "row[s] = load_input(input + at, s, y < shape.H);",
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
            "static_cast<int64_t>(s - kS / 2) * step_W * shape.C;",
            "(s - kS / 2) * step_W * shape.C;",
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
            "value[e] = value[e] < epilogue.low ? epilogue.low : value[e];  // NaN stays",
            "value[e] = fmaxf(value[e], epilogue.low);",
            NON_FINITE,
        ),
        Fault(
            "the upper bound drops NaN",
            "value[e] = value[e] > epilogue.high ? epilogue.high : value[e];",
            "value[e] = fminf(value[e], epilogue.high);",
            NON_FINITE,
        ),
        Fault(
            "the upper bound's zero for NaN",
            "value[e] = value[e] > epilogue.high ? epilogue.high : value[e];",
            "value[e] = value[e] <= epilogue.high ? value[e] : epilogue.high;",
            NON_FINITE,
        ),
        Fault(
            "zeros not multiplied",
            "            sum[i][e] = fmaf(x[e], taps[i * kS + s][e], sum[i][e]);",
            "            if (x[e] != 0.0f) sum[i][e] = fmaf(x[e], taps[i * kS + s][e], sum[i][e]);",
            NON_FINITE,
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
            "value[e] += residual[e];",
            "value[e] += fabsf(residual[e]) < INFINITY ? residual[e] : 0.0f;",
            NON_FINITE,
        ),
    ],
    "csrc/cuda/depthwise_conv2d_wgrad.cu": [
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
        Fault("taps by channel", "grad_weight + c * num_taps + tap", "grad_weight + tap * C + c"),
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
            "static_cast<int64_t>(offset_W + (s - kS / 2) * shape.rate_W) * shape.C;",
            "(offset_W + (s - kS / 2) * shape.rate_W) * shape.C;",
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
    "csrc/cuda/dilated_conv2d.cu": [
        Fault("a partial sum stored as if whole", "if (item.slot >= 0) {", "if (item.slot > 0) {"),
        Fault(
            "offset of a partial sum in 32 bits",
            "static_cast<int64_t>(item.slot) * kBlockM * kBlockN",
            "item.slot * kBlockM * kBlockN",
            FAR_CONV,
        ),
    ],
    "csrc/cuda/dilated_conv2d_sm90.cu": [
        Fault("no fence between the proxies", "    ptx::fence_proxy_async();\n", ""),
        Fault(
            "a stage filled while it is read",
            "      wait(&barriers.empty[place.stage], place.parity ^ 1);\n",
            "",
        ),
        Fault(
            "a stage is empty when its own block has read it",
            "kBlocks * kConsumers * 4);",
            "kConsumers * 4);",
        ),
        Fault(
            "a stage released while products read it",
            "if (previous >= 0) release(previous);\n      previous",
            "release(place.stage);\n      previous",
        ),
        Fault(
            "a stage released a product too early",
            "ptx::wgmma_wait_group<1>();",
            "ptx::wgmma_wait_group<2>();",
        ),
        Fault("sums stored before they are there", "    ptx::wgmma_wait_group<0>();\n", ""),
        Fault(
            "a block leaves before the other",
            "    ptx::cluster_arrive();  // the other block may still have something for this one\n"
            "    ptx::cluster_wait();\n",
            "",
        ),
        Fault(
            "barriers of the other block used before they are there",
            "    ptx::cluster_arrive();\n    ptx::cluster_wait();\n    const int worker",
            "    __syncthreads();\n    const int worker",
        ),
        Fault("barriers not shown to copies", "      ptx::fence_mbarrier_init();\n", ""),
        Fault("pixels not swizzled", "(chunk ^ first_row % 8) * 16", "chunk * 16"),
        Fault("weights for one block only", "(1 << kBlocks) - 1);", "1 << rank);"),
        Fault(
            "staged sums overwritten too early",
            "    __syncwarp();  // what was staged before has been read\n",
            "",
        ),
        Fault("last stages not announced", "  while (under_way > 0) announce();\n", ""),
        Fault(
            "stages announced whose copies were not waited for",
            "          ptx::cp_async_wait_group<kLag - 1>();\n",
            "",
        ),
        Fault(
            "one group of copies not waited for",
            "ptx::cp_async_wait_group<kLag - 1>();",
            "ptx::cp_async_wait_group<kLag>();",
        ),
        Fault(
            "pixels of the last stages not summed",
            "item.num_steps + (sums != nullptr ? kLag : 0);",
            "item.num_steps;",
        ),
        Fault(
            "stages of the item before summed", "sums != nullptr && arrived >= 0", "sums != nullptr"
        ),
        Fault("pixels of other images summed", "if (pixel >= 0 && pixel < plane)\n", ""),
        Fault(
            "a quarter of a warp's pixels not summed",
            "for (int distance = kChunks; distance < 32;",
            "for (int distance = kChunks; distance < 16;",
        ),
        Fault("each block's sums in the same rows", "+ rank * kBlockM;  // the first", ";"),
        Fault("no wait for the kernel before", "    ptx::griddepcontrol_wait();\n", ""),
        Fault(
            "offset of a pixel in 32 bits",
            "const int64_t neighbour = static_cast<uint32_t>(pixel[j]) + shift;",
            "const uint32_t neighbour = static_cast<uint32_t>(pixel[j]) + shift;",
            FAR_CONV,
        ),
        Fault(
            "offset of a partial sum in 32 bits",
            "const int64_t slot_row = static_cast<int64_t>(item.slot) * kConvTileSm90",
            "const int slot_row = item.slot * kConvTileSm90",
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
            "sm_90: terms in every piece of a split sum",
            "        store(partial_sums + slot_row * kConvTileSm90 + tile_col, value);",
            "        epilogue.finish(pixel, value);\n"
            "        store(partial_sums + slot_row * kConvTileSm90 + tile_col, value);",
            NON_FINITE,
        ),
    ],
    "csrc/cuda/dilated_conv2d_wgrad.cu": [
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
            "grad_output + branch.first_channel + first_k + chunk;",
            "grad_output + first_k + chunk;",
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
            "a split sum starts at its first pixel",
            "const int first = item.first_step * kBlockK<T> + first_row;",
            "const int first = first_row;",
        ),
        Fault("every step has the first pixels", "advance(pixels[i], pixel_step);", ""),
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
        Fault(
            "no barrier between steps",
            "__syncthreads();  // the stage is here, and all are done with the one before",
            "",
        ),
        Fault(
            "refills the stage in use",
            "copy_next_step(ahead % kStages);",
            "copy_next_step(step % kStages);",
        ),
        Fault(
            "no group for a step without copies",
            "copy_next_step(ahead % kStages);\n    ptx::cp_async_commit_group();",
            "{\n copy_next_step(ahead % kStages);\n ptx::cp_async_commit_group();\n }",
        ),
        Fault(
            "prologue one step short",
            "for (int step = 0; step < kStages - 1; ++step) {",
            "for (int step = 1; step < kStages - 1; ++step) {",
        ),
        Fault(
            "the last step missing",
            "for (int step = 0; step < item.num_steps; ++step) {",
            "for (int step = 0; step + 1 < item.num_steps; ++step) {",
        ),
        Fault(
            "matrices of a swapped",
            "* kPitch + lane / 8 % 2 * 8;",
            "* kPitch + (1 - lane / 8 % 2) * 8;",
        ),
        Fault(
            "matrices of b swapped",
            "{b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]}",
            "{b[j / 2][j % 2 * 2 + 1], b[j / 2][j % 2 * 2]}",
        ),
        Fault(
            "tf32 cut off instead of rounded",
            "ptx::cvt_rna_tf32(cols[at + (k + j % 2 * 4) * kPitch + j / 2 * 8]);",
            "__float_as_uint(cols[at + (k + j % 2 * 4) * kPitch + j / 2 * 8]);",
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
            "const int64_t pixel = pixels[i].index;",
            "const int pixel = pixels[i].index;",
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
    ],
    "csrc/cuda/dilated_conv2d_wgrad_sm90.cu": [
        Fault(
            "the gradient one row off",
            "{first_k + chunk * kChunk, x, y, n}",
            "{first_k + chunk * kChunk, x, y + 1, n}",
        ),
        Fault("sign of the tap", "x + tap.dx, y + tap.dy, n}", "x - tap.dx, y - tap.dy, n}"),
        Fault("no wait for a full stage", "wait(&barriers.full[place.stage], place.parity);", ""),
        Fault(
            "no wait for an empty stage",
            "wait(&barriers.empty[place.stage], place.parity ^ 1);",
            "",
        ),
        Fault(
            "a stage is free without the other block",
            "kBlocks * kConsumers * 4);",
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
        Fault("a piece starts half as far in", "item.first_step * kBoxes;", "item.first_step;"),
        Fault("channels of the first branch", "branches.of[tap.branch].first_channel", "0"),
        Fault(
            "both blocks store the same", "* kConvTileSm90 + rank * kBlockM;", "* kConvTileSm90;"
        ),
        Fault(
            "both blocks bring the same half",
            "const int first_chunk = rank * (kChunksN / kBlocks);",
            "const int first_chunk = 0;",
        ),
        Fault("rows of the next branch stored", "if (k >= branch.K) continue;", ""),
        Fault(
            "a block leaves while the other needs it",
            "    ptx::cluster_arrive();  // the other block may still have something for this one\n"
            "    ptx::cluster_wait();\n",
            "",
        ),
        Fault(
            "offset of a weight in 32 bits",
            "(static_cast<int64_t>(k) * branch.num_taps + tap.index)",
            "(k * branch.num_taps + tap.index)",
            FAR_CONV,
        ),
        Fault(
            "offset of a partial sum in 32 bits",
            "const int64_t partial = slot_row * kConvTileSm90 + col;",
            "const int partial = static_cast<int>(slot_row) * kConvTileSm90 + col;",
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
    "csrc/cuda/elements.cuh": [
        Fault(
            "fp16 saturates",
            "result = __float2half_rn(value); }",
            "result = __float2half_rn(value > 65504.0f ? 65504.0f : value); }",
        ),
    ],
    "csrc/cuda/implicit_gemm.cuh": [
        Fault(
            "tap sign of rows",
            "(static_cast<int64_t>(tap.dy) * shape.W + tap.dx)",
            "(-static_cast<int64_t>(tap.dy) * shape.W + tap.dx)",
        ),
        Fault(
            "tap sign of columns",
            "* shape.W + tap.dx) * shape.in_channels",
            "* shape.W - tap.dx) * shape.in_channels",
        ),
        Fault(
            "weights of the tap before",
            "static_cast<int64_t>(tap.index) * source.C",
            "static_cast<int64_t>(tap.index - 1) * source.C",
        ),
        Fault(
            "padding not zero-filled",
            "const bool has_input = has_channels && is_inside(tap, y[i], x[i], shape.H, shape.W);",
            "const bool has_input = has_channels && y[i] >= 0;",
        ),
        Fault(
            "channels past the last copied",
            "const bool has_channels = next_c + chunk * kChunk<T> < source.C;",
            "const bool has_channels = true;",
        ),
        Fault(
            "rows and columns of a pixel swapped",
            "x[i] = pixel % shape.W;",
            "x[i] = pixel % shape.H;",
        ),
        Fault(
            "image of a pixel not left out",
            "pixel / shape.W % shape.H : INT_MIN",
            "pixel / shape.W : INT_MIN",
        ),
        Fault(
            "a split sum starts at its first tap",
            "int next_tap = item.first_step % tile.num_taps;",
            "int next_tap = 0;",
        ),
        Fault(
            "a split sum starts at its first channel",
            "int next_c = item.first_step / tile.num_taps * kBlockK<T>;",
            "int next_c = 0;",
        ),
        Fault("channels do not advance", "next_c += kBlockK<T>;", ""),
        Fault(
            "waits for a stage too few",
            "ptx::cp_async_wait_group<kStages - 2>();",
            "ptx::cp_async_wait_group<kStages - 1>();",
        ),
        Fault("no wait for copies", "ptx::cp_async_wait_group<kStages - 2>();", ""),
        Fault(
            "no barrier between steps",
            "__syncthreads();  // the stage is here, and all are done with the one before",
            "",
        ),
        Fault(
            "no barrier before the sums", "__syncthreads();  // all are done with the stages", ""
        ),
        Fault("no barrier after the sums", "__syncthreads();\n  return sums;", "return sums;"),
        Fault(
            "refills the stage in use",
            "copy_next_step(ahead % kStages);",
            "copy_next_step(step % kStages);",
        ),
        Fault(
            "no group for a step without copies",
            "copy_next_step(ahead % kStages);\n    ptx::cp_async_commit_group();",
            "{\n copy_next_step(ahead % kStages);\n ptx::cp_async_commit_group();\n }",
        ),
        Fault(
            "prologue one step short",
            "for (int step = 0; step < kStages - 1; ++step) {",
            "for (int step = 1; step < kStages - 1; ++step) {",
        ),
        Fault(
            "the last step missing",
            "for (int step = 0; step < item.num_steps; ++step) {",
            "for (int step = 0; step + 1 < item.num_steps; ++step) {",
        ),
        Fault(
            "chunks of reader and writer differ",
            "input_at[k] = swizzled<T>(warp_row + lane % 16, 2 * k + lane / 16);",
            "input_at[k] = swizzled<T>(warp_row + lane % 16, 2 * k + 1 - lane / 16);",
        ),
        Fault(
            "matrices of b swapped",
            "b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]",
            "b[j / 2][j % 2 * 2 + 1], b[j / 2][j % 2 * 2]",
        ),
        Fault(
            "tf32 cut off instead of rounded",
            "for (uint32_t& bits : r) bits = ptx::cvt_rna_tf32(__uint_as_float(bits));",
            "",
        ),
        Fault(
            "a warp idles early",
            "const bool has_work = warp_row < tile.num_pixels &&",
            "const bool has_work = warp_row + 1 < tile.num_pixels &&",
        ),
        Fault(
            "offset of a pixel in 32 bits",
            "input + static_cast<int64_t>(pixel) * shape.in_channels",
            "input + pixel * shape.in_channels",
            FAR_CONV,
        ),
        Fault(
            "offset of a row of weights in 32 bits",
            "weight + k * output.weight_stride +",
            "weight + k * static_cast<int>(output.weight_stride) +",
            FAR_CONV,
        ),
        Fault(
            "offset of a tap's weights in 32 bits",
            "static_cast<int64_t>(tap.index) * source.C + source",
            "tap.index * source.C + source",
            FAR_CONV,
        ),
        Fault(
            "offset of a tap in 32 bits",
            "(static_cast<int64_t>(tap.dy) * shape.W + tap.dx) * shape",
            "(tap.dy * shape.W + tap.dx) * shape",
            FAR_CONV,
        ),
        Fault(
            "offset of a tap without a sign",
            "(static_cast<int64_t>(tap.dy) * shape.W + tap.dx) * shape",
            "static_cast<uint32_t>(tap.dy * shape.W + tap.dx) * int64_t{1} * shape",
            FAR_CONV,
        ),
    ],
    "csrc/cuda/pixel_means.cu": [
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
            "    __syncthreads();  // the sums before are no longer read\n",
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
    "csrc/cuda/tensor_map.cuh": [
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
    "csrc/cuda/upsample_argmax.cu": [
        Fault("infinity counts as finite", "finite &= fabsf(value) < 0x1p126f;", ""),
        Fault(
            "ties between lanes not seen",
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
        Fault("lower corners not looked at", "(i + lane / 2 % 2) * (tile", "i * (tile"),
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
            "const float value = load(pixel + c * stride_C);",
            "const float value = load(pixel + static_cast<int>(c * stride_C));",
            FAR_UPSAMPLING,
        ),
        Fault(
            "offset of a tile's source in 32 bits",
            "logits + blockIdx.z * shape.stride_N + row * shape.stride_H + col * shape.stride_W;",
            "logits + static_cast<int>(blockIdx.z * shape.stride_N + row * shape.stride_H) +\n"
            "        static_cast<int>(col * shape.stride_W);",
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
        Fault(
            "vectors where rows have none", "shape.out_W % kVector == 0", "shape.out_W >= kVector"
        ),
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
            "load(pixel + c * stride_C)",
            "load(pixel + static_cast<int32_t>(c * stride_C))",
        ),
        Fault(
            "labels by way of a byte",
            "*labels = static_cast<Label>(vector[0]);",
            "*labels = static_cast<Label>(static_cast<uint8_t>(vector[0]));",
        ),
        Fault(
            "labels of all classes by way of int16",
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
    "csrc/cuda/upsample_cross_entropy.cu": [
        Fault(
            "no smoothing term",
            "loss = (target_part * weight * hit + smooth_part * smooth) * kLn2;",
            "loss = target_part * weight * hit * kLn2;",
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
            "const float weight = class_weight(terms, label[r]);",
            "const float weight = 1.0f;",
        ),
        Fault(
            "class weight left out of smoothing",
            "weighted.x = fma_rn(class_weight(terms, c), ends.x, weighted.x);",
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
    "csrc/cuda/upsample_cross_entropy.cuh": [
        Fault(
            "one maximum for both rows",
            "maxima[i] = make_float2(top.x, bottom.x);",
            "maxima[i] = make_float2(top.x, top.x);",
        ),
        Fault(
            "wild blocks not seen",
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
            "__syncthreads();  // the rows before are no longer read",
            "",
        ),
        Fault(
            "classes replaced while read",
            "__syncthreads();  // the classes before are no longer read",
            "",
        ),
        Fault("exponentials not stepped", "e = mul_rn(e, ratio);", ""),
        Fault("ignored pixels count", "if (target == terms.ignore_index) return kIgnored;", ""),
        Fault(
            "a target past the last class",
            "target < 0 || target >= C ? kBad",
            "target < 0 || target > C ? kBad",
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
        Fault("only tops decide what is tame", "fminf(top.y, bottom.y) >= kTame", "top.y >= kTame"),
        Fault(
            "tame where exponentials underflow",
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
    "csrc/cuda/upsample_cross_entropy_bwd.cu": [
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
            "gradient: the whole target in spite of smoothing",
            "const float taken = target_part * class_weight(terms, label[r]) * grad[r];",
            "const float taken = class_weight(terms, label[r]) * grad[r];",
        ),
        Fault(
            "gradient: class weight left out",
            "const float taken = target_part * class_weight(terms, label[r]) * grad[r];",
            "const float taken = target_part * grad[r];",
        ),
        Fault(
            "gradient: mean without its divisor",
            "grad.divisor ? 1.0f / *grad.divisor : 1.0f;",
            "1.0f;",
        ),
        Fault(
            "gradient: incoming gradient of the first row",
            "pixel.grad_loss += pixel.grad_stride_H;",
            "",
        ),
        Fault(
            "gradient: only the first run of a column",
            "for (int k = 1; k < tile.runs[0][i].count; ++k) {",
            "for (int k = 1; k < 1; ++k) {",
        ),
        Fault(
            "gradient: runs of one class not told apart",
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
            "gradient: first column has the side of an inner one",
            "float top = (x > 0 ? before.y : before.x)",
            "float top = before.y",
        ),
        Fault(
            "gradient: last column's right side forgotten",
            "if (x == strip.W - 1) {",
            "if (false) {",
        ),
        Fault(
            "gradient: top row has the side of an inner one",
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
            "(channels_last ? i : ((n * shape.C + c) * shape.H + y) * shape.W + x)",
            "static_cast<int>(channels_last ? i : ((n * shape.C + c) * shape.H + y) * shape.W + x)",
            FAR_UPSAMPLING,
        ),
        Fault(
            "gradient: class weight left out of smoothing",
            "smooths ? class_weight(terms, first_class + c) : 0.0f",
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
            "gradient: 32-bit offsets of the incoming one",
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
            "if (r + 1 < num_rows) {",
            "if (r + 1 < kRows) {",
        ),
    ],
    "csrc/cuda/upsample_cross_entropy_prepare.cu": [
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
            "total of the class weights without half a warp's",
            "for (int lanes = 16; lanes > 0; lanes /= 2) total",
            "for (int lanes = 8; lanes > 0; lanes /= 2) total",
        ),
        Fault(
            "offset of a class in 32 bits",
            "load(pixel + c * stride_C);",
            "load(pixel + static_cast<int>(c * stride_C));",
            FAR_UPSAMPLING,
        ),
        Fault(
            "number of a pixel in 32 bits",
            "const int64_t i = (block * kThreads + threadIdx.x) / kLanesPerPixel;",
            "const int i = static_cast<uint32_t>(block * kThreads + threadIdx.x) / kLanesPerPixel;",
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
    "csrc/cuda/wgrad_reduce.cuh": [
        Fault(
            "one piece not added",
            "i < reduction.num_slots; ++i",
            "i + 1 < reduction.num_slots; ++i",
        ),
        Fault(
            "reduction of the rows above",
            "const int row = blockIdx.x % kBlocks * kRows + threadIdx.x / kRowThreads;",
            "const int row = blockIdx.x % kBlocks * kRows;",
        ),
        Fault("no split reduced", "if (work.num_reductions == 0) return {};", "return {};"),
        Fault(
            "offset of a weight in 32 bits",
            "(static_cast<int64_t>(k) * branch.num_taps + tap.index) * shape.C + c",
            "(k * branch.num_taps + tap.index) * shape.C + c",
            FAR_CONV,
        ),
        Fault(
            "offset of a piece in 32 bits",
            "const int64_t slot = reduction.first_slot + i;",
            "const int slot = reduction.first_slot + i;",
            FAR_CONV,
        ),
        Fault(
            "a piece that is NaN left out",
            "sum[1] += piece[1];",
            "sum[1] += piece[1] == piece[1] ? piece[1] : 0.0f;",
            NON_FINITE,
        ),
    ],
    "deeplab_fast/_resident.py": [
        Fault(
            "keyword arguments left out of the key",
            "key = (*args, *kwargs.items())",
            "key = (*args,)",
        ),
        Fault(
            "names of keyword arguments left out of the key",
            "key = (*args, *kwargs.items())",
            "key = (*args, *kwargs.values())",
        ),
        Fault(
            "first argument left out of the key",
            "key = (*args, *kwargs.items())",
            "key = (*args[1:], *kwargs.items())",
        ),
        Fault(
            "last argument left out of the key",
            "key = (*args, *kwargs.items())",
            "key = (*args[:-1], *kwargs.items())",
        ),
        Fault(
            "the key is how many arguments there are",
            "key = (*args, *kwargs.items())",
            "key = (len(args), *kwargs.items())",
        ),
        Fault(
            "one more entry than is kept", "elif len(recent) >= KEPT:", "elif len(recent) > KEPT:"
        ),
        Fault(
            "dropped before the device has read it",
            "                for gpu in gpus:\n                    torch.cuda.synchronize(gpu)\n",
            "",
        ),
        Fault("only one generation", "recent, older = {}, recent", "recent, older = {}, {}"),
        Fault(
            "older entries are not found",
            "for generation in (recent, older, captured):",
            "for generation in (recent, captured):",
        ),
        Fault(
            "captured entries are not found",
            "for generation in (recent, older, captured):",
            "for generation in (recent, older):",
        ),
        Fault(
            "captured entries are dropped",
            "                captured[key] = found\n",
            "                pass\n",
        ),
        Fault(
            "a first call is captured",
            "                if capturing:\n                    raise RuntimeError",
            "                if False:\n                    raise RuntimeError",
        ),
        Fault(
            "captured only when new",
            "if key in generation and not capturing:",
            "if key in generation:",
        ),
        Fault(
            "made in the caller's thread",
            "found = thread.submit(make, *args, **kwargs).result()",
            "found = make(*args, **kwargs)",
        ),
        Fault(
            "made by several threads at once",
            "        with lock:\n",
            "        with threading.Lock():\n",
        ),
        Fault(
            "found in an older generation and not kept",
            "            recent[key] = found\n",
            "            if generation is not older:\n                recent[key] = found\n",
        ),
        Fault(
            "GPUs given by name are not waited for",
            "filter(_is_gpu, (*args, *kwargs.values()))",
            "filter(_is_gpu, args)",
        ),
    ],
    "deeplab_fast/backends.py": [
        Fault("forced for ever after an exception", "_forced = self.outer", "_forced = _forced"),
        Fault("an inner backend ends the outer", "_forced = self.outer", '_forced = ""'),
        Fault(
            "the reference before the kernels of the CPU",
            '"cpu": ("cpu", "reference")',
            '"cpu": ("reference", "cpu")',
        ),
        Fault(
            "the trace has what was asked for",
            "_trace.append((op, name))",
            "_trace.append((op, requested))",
        ),
        Fault("a trace ends the outer one", "        _trace = outer", "        _trace = None"),
        Fault("every refusal is a warning", "isinstance(reason, Remediable)", "reason"),
        Fault("cuDNN before what beat it", '(*faster, "reference")', '("reference", *faster)'),
        Fault(
            "measurements decide on the CPU too",
            'device_type == "cuda" and op in shape_classes',
            "op in shape_classes",
        ),
    ],
    "deeplab_fast/cpu.py": [
        Fault(
            "a branch's ReLU drops NaN",
            "torch.clamp(output, min=0, out=slice)",
            "torch.fmax(output, output.new_zeros(()), out=slice)",
        ),
        Fault(
            "ReLU of the pooled branch drops NaN",
            "F.linear(x.mean((2, 3)), pool_weight.flatten(1), pool_bias).relu_()",
            "F.linear(x.mean((2, 3)), pool_weight.flatten(1), pool_bias).nan_to_num_().relu_()",
        ),
        Fault(
            "the pooled branch behind the ReLU",
            "F.conv2d(branches, branch_weight).add_(image_bias[:, :, None, None]).relu_()",
            "F.conv2d(branches, branch_weight).relu_().add_(image_bias[:, :, None, None])",
        ),
        Fault(
            "ReLU6 as ReLU",
            'return tensor.relu_() if activation == "relu" else F.relu6(tensor, inplace=True)',
            "return tensor.relu_()",
        ),
        Fault(
            "sums of blocks lose NaN",
            "total += convolve(input, weight, None)",
            "total += convolve(input, weight, None).nan_to_num(0.0)",
        ),
    ],
    "deeplab_fast/cuda_kernels/aspp.py": [
        Fault(
            "means of too many channels",
            "max(input.size(1), pool_weight.size(0)) > _MAX_POOL_CHANNELS",
            "pool_weight.size(0) > _MAX_POOL_CHANNELS",
        ),
        Fault(
            "too many pooled channels",
            "max(input.size(1), pool_weight.size(0)) > _MAX_POOL_CHANNELS",
            "input.size(1) > _MAX_POOL_CHANNELS",
        ),
        Fault("one channel fewer than fit", "> _MAX_POOL_CHANNELS:", ">= _MAX_POOL_CHANNELS:"),
        Fault(
            "rows of the projection next to each other",
            "_C.AsppShape(N, C, P, K, project_weight.stride(0))",
            "_C.AsppShape(N, C, P, K, P)",
        ),
        Fault(
            "strided biases",
            "pool_bias, project_bias = pool_bias.contiguous(), project_bias.contiguous()",
            "pass",
        ),
        Fault("strided pooled weight", "    pool_weight = aligned_nhwc(pool_weight)\n", ""),
        Fault(
            "channels of the first branch",
            "sum(weight.size(0) for weight in weights)\n    if",
            "weights[0].size(0)\n    if",
        ),
        Fault(
            "projection without activation",
            '[(1, 1)], activation="relu",',
            '[(1, 1)], activation="none",',
        ),
        Fault("branches without activation", 'pairs, "relu")', 'pairs, "none")'),
    ],
    "deeplab_fast/cuda_kernels/common.py": [
        Fault(
            "aligned to 8 bytes",
            "tensor.data_ptr() % 16 == 0 else",
            "tensor.data_ptr() % 2 == 0 else",
        ),
        Fault("relu6 without its bound", '"relu6": (0.0, 6.0)', '"relu6": (0.0, math.inf)'),
        Fault("relu of negatives", '"relu": (0.0, math.inf)', '"relu": (-1.0, math.inf)'),
        Fault(
            "finite bounds without an activation",
            '"none": (-math.inf, math.inf)',
            '"none": (-3.4e38, 3.4e38)',
            NON_FINITE,
        ),
        Fault("ReLU bounded above", '"relu": (0.0, math.inf)', '"relu": (0.0, 3.4e38)', NON_FINITE),
    ],
    "deeplab_fast/cuda_kernels/depthwise_conv2d.py": [
        Fault(
            "rates limited by the other side",
            "min(dilation[0], H), min(dilation[1], W)",
            "min(dilation[0], W), min(dilation[1], H)",
        ),
        Fault(
            "rates swapped",
            "min(dilation[0], H), min(dilation[1], W)",
            "min(dilation[1], H), min(dilation[0], W)",
        ),
        Fault(
            "taps not mirrored for the gradient",
            "_shape(input, weight, dilation, mirrored=True)",
            "_shape(input, weight, dilation, mirrored=False)",
        ),
        Fault(
            "taps mirrored for the output",
            "    shape = _shape(input, weight, dilation, mirrored=False)\n",
            "    shape = _shape(input, weight, dilation, mirrored=True)\n",
        ),
        Fault(
            "one pixel too many",
            "input.numel() // input.size(1) >= _MAX_PIXELS",
            "input.numel() // input.size(1) > _MAX_PIXELS",
        ),
        Fault(
            "one tap too many",
            "weight.size(2) * weight.size(3) > _C.MAX_DEPTHWISE_TAPS",
            "weight.size(2) * weight.size(3) > _C.MAX_DEPTHWISE_TAPS + 2",
        ),
        Fault("strided bias", "None if bias is None else bias.contiguous()", "bias"),
        Fault(
            "strided weight",
            "nhwc, weight = aligned_nhwc(input), aligned(weight, torch.contiguous_format)",
            "nhwc = aligned_nhwc(input)",
        ),
        Fault(
            "scratch memory without the bias",
            "num_parts * (taps + 1) * channels",
            "num_parts * taps * channels",
        ),
        Fault(
            "one part only", "        num_parts = max(num_parts, 1)\n", "        num_parts = 1\n"
        ),
        Fault(
            "parts without a limit",
            "min(input.numel() // _ELEMENTS_PER_PART, -(-_MAX_PARTIAL_SUMS // channels))",
            "input.numel() // _ELEMENTS_PER_PART",
        ),
        Fault(
            "several outputs of a channel",
            "if weight.size(0) != input.size(1):",
            "if weight.size(0) % input.size(1):",
        ),
        Fault(
            "a dense convolution of one channel",
            "groups == input.size(1) and (groups > 1 or weight.size(0) == 1)",
            "groups == input.size(1)",
        ),
    ],
    "deeplab_fast/cuda_kernels/dilated_conv2d.py": [
        Fault("first channels of branches", "sum(channels[:i]),", "sum(channels[: i + 1]),"),
        Fault(
            "strided biases",
            "None if bias is None else bias.contiguous() for bias in biases",
            "bias for bias in biases",
        ),
        Fault(
            "rows of any 1x1 weight",
            "weight.shape[2:] == (1, 1) and weight.stride(1) == 1",
            "weight.shape[2:] == (1, 1)",
        ),
        Fault(
            "rows of any kernel",
            "weight.shape[2:] == (1, 1) and weight.stride(1) == 1",
            "weight.stride(1) == 1",
        ),
        Fault(
            "rows at any address",
            "weight.data_ptr() % 16 == 0 and row_bytes % 16 == 0",
            "row_bytes % 16 == 0",
        ),
        Fault(
            "rows of any length",
            "weight.data_ptr() % 16 == 0 and row_bytes % 16 == 0",
            "weight.data_ptr() % 16 == 0",
        ),
        Fault(
            "one pixel too many for the work list",
            "// input.size(1) >= 2**31",
            "// input.size(1) > 2**31",
        ),
        Fault(
            "pixels of one branch only",
            "len(weights) * input.numel() // input",
            "input.numel() // input",
        ),
        Fault(
            "one branch too many",
            "len(weights) > _C.MAX_CONV_BRANCHES",
            "len(weights) > _C.MAX_CONV_BRANCHES + 1",
        ),
        Fault("channels of any number", "    if channels % multiple:\n", "    if False:\n"),
        Fault(
            "taps of one row",
            "weight.size(2) * weight.size(3) > MAX_TAPS",
            "weight.size(2) > MAX_TAPS",
        ),
        Fault(
            "half the partial sums",
            "work_list.num_slots * work_list.kernel.tile**2",
            "work_list.num_slots * work_list.kernel.tile**2 // 2",
        ),
        Fault(
            "sums of pixels from any branch",
            "pixel_sums is not None and i == summing",
            "pixel_sums is not None",
        ),
        Fault(
            "sums of pixels of a larger kernel",
            "if w.shape[2:] == (1, 1)), None)",
            "if w.size(2) == 1), None)",
        ),
        Fault(
            "steps of another kernel",
            "steps_per_tap(C, input.dtype, kernel)",
            "steps_per_tap(C, input.dtype)",
        ),
        Fault(
            "unaligned input",
            "input, *weights = aligned_nhwc(input), *map",
            "input, *weights = input.contiguous(memory_format=torch.channels_last), *map",
        ),
    ],
    "deeplab_fast/cuda_kernels/dilated_conv2d_and_mean.py": [
        Fault(
            "rows of the sums of one image",
            "(-(-N * H * W // run) + N - 1) * parts",
            "-(-N * H * W // run) * parts",
        ),
        Fault(
            "rows of one part",
            "(-(-N * H * W // run) + N - 1) * parts",
            "-(-N * H * W // run) + N - 1",
        ),
        Fault(
            "pixels of all images",
            "_C.PixelRuns(N, H * W, C, run, parts)",
            "_C.PixelRuns(1, N * H * W, C, run, parts)",
        ),
        Fault(
            "runs of another length",
            "run, parts = _C.CONV_SUM_RUN, _C.CONV_SUM_PARTS",
            "run, parts = 2 * _C.CONV_SUM_RUN, _C.CONV_SUM_PARTS",
        ),
        Fault("summed once more", "    if not is_summed:\n", "    if True:\n"),
    ],
    "deeplab_fast/cuda_kernels/dilated_conv2d_backward.py": [
        Fault(
            "taps of the largest branch",
            "sum(weight.size(2) * weight.size(3) for weight in weights)",
            "max(weight.size(2) * weight.size(3) for weight in weights)",
        ),
        Fault("weights not transposed", "weight.permute(1, 2, 3, 0)", "weight.permute(1, 3, 2, 0)"),
        Fault(
            "steps of the first branch's channels",
            "steps_per_tap(max(channels), input.dtype, kernel)",
            "steps_per_tap(channels[0], input.dtype, kernel)",
        ),
        Fault(
            "first channels off by a branch",
            "zip(accumulate(channels, initial=0), channels,",
            "zip(accumulate(channels), channels,",
        ),
        Fault(
            "mean's share left out",
            "bias_address = 0 if image_bias is None else image_bias.data_ptr()",
            "bias_address = 0",
        ),
        Fault("gradients share memory", "[part.clone() for part in", "[part for part in"),
        Fault("too few pixels a part", "num_pixels // _PIXELS_PER_PART", "num_pixels"),
        Fault(
            "more parts than blocks",
            "max(1, min(kernels.num_workers, num_pixels // _PIXELS_PER_PART))",
            "max(1, num_pixels // _PIXELS_PER_PART)",
        ),
        Fault(
            "half the partial sums",
            "work_list.num_slots * kernel.tile**2",
            "work_list.num_slots * kernel.tile**2 // 2",
        ),
        Fault(
            "half the sums of parts",
            "new_empty(num_parts * K, dtype=torch.float32)",
            "new_empty(num_parts * K // 2, dtype=torch.float32)",
        ),
        Fault(
            "gradients of padded channels",
            "[in_format_of(grad[: w.size(0)], w)",
            "[in_format_of(grad, w)",
        ),
        Fault("strided gradient", "    grad_output = aligned_nhwc(grad_output)\n", "    pass\n"),
        Fault(
            "channels padded to 16 in any dtype",
            "-k % (16 // input.element_size())",
            "-k % 8 if k % 2 else -k % 4",
        ),
    ],
    "deeplab_fast/cuda_kernels/register.py": [
        Fault(
            "a depthwise convolution in place ignores the residual",
            "depthwise_conv2d.forward(kernels, input, weight, bias, dilation, output, activation)",
            "depthwise_conv2d.forward(kernels, input, weight, bias, dilation, None, activation)",
        ),
        Fault(
            "an input that is overwritten while it is read",
            "        input = input.clone()\n",
            "        pass\n",
        ),
        Fault(
            "a copy of the residual is not brought back",
            "    if output is not residual:\n        residual.copy_(output)\n",
            "",
        ),
        Fault(
            "a residual of another shape",
            "if residual.shape != (input.size(0), weight.size(0), *input.shape[2:]):",
            "if residual.dim() != 4:",
        ),
        Fault(
            "a bias of another dtype",
            "if bias.dtype != input.dtype or bias.device != input.device:",
            "if bias.device != input.device:",
        ),
        Fault("a bias of another length", "or bias.shape != weight.shape[:1]:", ":"),
    ],
    "deeplab_fast/cuda_kernels/upsample_cross_entropy.py": [
        Fault(
            "strided log-sum-exp as if contiguous",
            "target.contiguous(), log_sum_exp.contiguous()",
            "target.contiguous(), log_sum_exp",
        ),
        Fault(
            "mean without its total weight",
            'total_weight.data_ptr() if reduction == "mean" else 0',
            "0",
        ),
    ],
    "deeplab_fast/cuda_kernels/work_lists.py": [
        Fault("items not sorted by worker", "if kernel.is_persistent:", "if False:"),
        Fault(
            "as many workers as blocks of the smaller kernel",
            "    num_workers = max(1, num_workers // kernel.blocks_per_worker)\n    rows",
            "    num_workers = max(1, num_workers)\n    rows",
        ),
        Fault(
            "weight gradient: as many workers as blocks of the smaller kernel",
            "    num_workers = max(1, num_workers // kernel.blocks_per_worker)\n    N, H, W",
            "    num_workers = max(1, num_workers)\n    N, H, W",
        ),
        Fault(
            "a block of channels too many",
            "-(-out_channels[output] // kernel.tile)",
            "out_channels[output] // kernel.tile + 1",
        ),
        Fault(
            "blocks of the first output's channels",
            "-(-out_channels[output] // kernel.tile)",
            "-(-out_channels[0] // kernel.tile)",
        ),
        Fault(
            "a step too many",
            "return -(-channels * dtype.itemsize // kernel.step_bytes)",
            "return channels * dtype.itemsize // kernel.step_bytes + 1",
        ),
        Fault(
            "a step too few",
            "return -(-channels * dtype.itemsize // kernel.step_bytes)",
            "return max(1, channels * dtype.itemsize // kernel.step_bytes)",
        ),
        Fault(
            "steps of elements for bytes",
            "return -(-channels * dtype.itemsize // kernel.step_bytes)",
            "return -(-channels * 2 // kernel.step_bytes)",
        ),
        Fault(
            "rates limited by the other side",
            "min(vertical, H), min(horizontal, W))",
            "min(vertical, W), min(horizontal, H))",
        ),
        Fault(
            "rates swapped",
            "min(vertical, H), min(horizontal, W))",
            "min(horizontal, H), min(vertical, W))",
        ),
        Fault(
            "weight gradient: blocks of one operand",
            "-(-k // kernel.tile) * -(-channels // kernel.tile)",
            "-(-k // kernel.tile)",
        ),
        Fault(
            "weight gradient: a step too few",
            "-(-num_boxes(box, N, h, w) * kernel.box_pixels // step)",
            "num_boxes(box, N, h, w) * kernel.box_pixels // step",
        ),
        Fault(
            "weight gradient: steps of 16-bit elements",
            "step = kernel.step_bytes // dtype.itemsize",
            "step = kernel.step_bytes // 2",
        ),
        Fault(
            "boxes of a single image",
            "-(-w // x) * -(-h // y) * -(-N // n)",
            "-(-w // x) * -(-h // y)",
        ),
        Fault("the worst box", "return min(boxes,", "return max(boxes,"),
        Fault(
            "a worker less",
            "workers.bincount(minlength=num_workers).cumsum(0)",
            "workers.bincount().cumsum(0)",
        ),
        Fault(
            "tf32 on the kernel that cuts fp32 off",
            "return CONV_SM90 if kernels.is_sm90 and dtype != torch.float32 else CONV_SM80",
            "return CONV_SM90 if kernels.is_sm90 else CONV_SM80",
        ),
        Fault(
            "partial sums are never reserved",
            'return ConvWorkList(kernel, work, tensors, schedule["num_slots"])',
            "return ConvWorkList(kernel, work, tensors, 0)",
        ),
    ],
    "deeplab_fast/measured.py": [
        Fault(
            "the last row of a class decides",
            "max(ratio, ratios.get(row.kernel, 0))",
            "ratio",
        ),
        Fault(
            "the first row of a class decides",
            "max(ratio, ratios.get(row.kernel, 0))",
            "ratios.get(row.kernel, ratio)",
        ),
        Fault(
            "the best row of a class decides",
            "max(ratio, ratios.get(row.kernel, 0))",
            "min(ratio, ratios.get(row.kernel, ratio))",
        ),
        Fault("a tie with cuDNN wins", "if ratios[k] < 1", "if ratios[k] <= 1"),
        Fault("absolute times", "row.median_ms / row.cudnn_ms", "row.median_ms"),
        Fault("rows of other devices", "if row.device == here:", "if row.device:"),
        Fault(
            "the slowest kernel first",
            "key=ratios.__getitem__)",
            "key=ratios.__getitem__, reverse=True)",
        ),
    ],
    "deeplab_fast/models/inference.py": [
        Fault(
            "a broken image looks healthy",
            "return logits + nan_or_zero.to(logits.dtype)",
            "return logits",
        ),
        Fault(
            "NaN of an image left out", "0 * images.sum((1, 2, 3)", "0 * images.nansum((1, 2, 3)"
        ),
        Fault(
            "all images are broken by one",
            "0 * images.sum((1, 2, 3)",
            "0 * images.sum((0, 1, 2, 3)",
        ),
        Fault(
            "broken weights look healthy",
            "last.bias += 0 * parameter.sum(dtype=torch.float64)",
            "pass",
        ),
        Fault(
            "a broken last layer breaks all classes",
            "for layer in (prepared.backbone, *layers):",
            "for layer in (prepared.backbone, *layers, last):",
        ),
    ],
    "deeplab_fast/ops/_arguments.py": [
        Fault("False of NumPy is True", "return bool(value)", "return True"),
        Fault(
            "a list is no pair", "isinstance(value, Sequence) and", "isinstance(value, tuple) and"
        ),
        Fault(
            "a string is a pair",
            "is_sequence = isinstance(value, Sequence) and not isinstance(value, str)",
            "is_sequence = isinstance(value, Sequence)",
        ),
        Fault("any number of values is a pair", "len(values) != 2 or not", "not"),
        Fault("numbers past 64 bits", "0 < v < INT64_END", "0 < v"),
        Fault(
            "a tensor is a list of tensors",
            "isinstance(values, (Tensor, str))",
            "isinstance(values, str)",
        ),
    ],
    "deeplab_fast/ops/_convolution.py": [
        Fault(
            "memory format left out of the class",
            '        in_format,\n        f"{C}->',
            '        f"{C}->',
        ),
        Fault(
            "rates swapped",
            "_taps_inside(H, R, vertical) * _taps_inside(W, S, horizontal)",
            "_taps_inside(H, R, horizontal) * _taps_inside(W, S, vertical)",
        ),
        Fault(
            "sizes swapped",
            "_taps_inside(H, R, vertical) * _taps_inside(W, S, horizontal)",
            "_taps_inside(W, R, vertical) * _taps_inside(H, S, horizontal)",
        ),
        Fault(
            "images left out of the pixels",
            "max(1, N * H * W).bit_length()",
            "max(1, H * W).bit_length()",
        ),
        Fault(
            "outputs of the first branch only", "sum(K for K, _, _, _ in kernels)", "kernels[0][0]"
        ),
        Fault(
            "share inside rounded down",
            "-(-8 * inside // max(1, dense))",
            "8 * inside // max(1, dense)",
        ),
        Fault("groups left out of the class", '*([f"groups {groups}"] if groups > 1 else []),', ""),
        Fault(
            "all gradients asked for",
            "zip(_GRADIENTS, output_mask) if asked",
            "zip(_GRADIENTS, output_mask)",
        ),
        Fault(
            "tf32 counts as fp32", 'return "tf32" if tf32_is_allowed() else "fp32"', 'return "fp32"'
        ),
        Fault(
            "precision left out of the class",
            'return f"{_precision(input.dtype)} {shapes}"',
            'return f"bf16 {shapes}"',
        ),
    ],
    "deeplab_fast/ops/_library.py": [
        Fault(
            "autocast halves float64",
            "(torch.float32, torch.float16, torch.bfloat16)",
            "(torch.float64, torch.float32, torch.float16, torch.bfloat16)",
        ),
        Fault(
            "autocast leaves fp16",
            "(torch.float32, torch.float16, torch.bfloat16)",
            "(torch.float32, torch.bfloat16)",
        ),
        Fault("autocast is bfloat16", "torch.get_autocast_dtype(device_type)", "torch.bfloat16"),
        Fault("autocast of the meta device", 'device_type == "meta" or not', "not"),
        Fault(
            "an op itself is autocast",
            "        if torch.is_autocast_enabled(device_type):\n            # The",
            "        if False:\n            # The",
        ),
        Fault(
            "backward on the automatic choice",
            'ctx.backend = keyword_only_inputs["backend"]',
            'ctx.backend = ""',
        ),
        Fault(
            "one channel is channels_last",
            "tensor.stride(1) == 1 and tensor.size(1) > 1",
            "tensor.stride(1) == 1",
        ),
        Fault(
            "any strides are those promised",
            "if result.stride() == promised.stride():",
            "if True:",
        ),
        Fault(
            "transforms on the automatic choice",
            "_transforms.call(op, _rules[name], args, backend)",
            '_transforms.call(op, _rules[name], args, "")',
            TRANSFORMS,
        ),
    ],
    "deeplab_fast/ops/_transforms.py": [
        Fault("forward mode not seen", " or forward_ad._current_level >= 0", ""),
        Fault(
            "transforms not seen",
            "torch._C._are_functorch_transforms_active() or forward_ad",
            "forward_ad",
        ),
        Fault(
            "all gradients are needed",
            "call.arguments(needed[1:])",
            "call.arguments([True] * len(needed))",
        ),
        Fault("backward elsewhere", "= call, call.backend", '= call, ""'),
        Fault("tangents elsewhere", "output, call.backend)", 'output, "")'),
        Fault("the first of all weights", "set(mapped) <= set(images)", "True"),
        Fault("images one by one", "set(mapped) <= set(images)", "False"),
        Fault(
            "dimensions exchanged",
            "tensor = tensor.movedim(dim, 0)",
            "tensor = tensor.transpose(dim, 0)",
        ),
        Fault("samples along another dimension", "t.select(d, i)", "t.select(0, i)"),
        Fault("no words about no samples", "if batch_size == 0:", "if False:"),
        Fault(
            "functionalize is for an autograd.Function",
            "    if _is_functionalized_only():\n        return op(*arguments, backend=backend)\n",
            "",
        ),
        Fault(
            "functionalize hides forward mode", "forward_ad._current_level < 0\n        and ", ""
        ),
    ],
    "deeplab_fast/ops/aspp.py": [
        Fault(
            "no tangent from biases of branches",
            "(t_input, t_weights, t_biases, None)",
            "(t_input, t_weights, [None] * len(biases), None)",
            TRANSFORMS,
        ),
        Fault(
            "tangents pass a ReLU", "return t_output * (output > 0)", "return t_output", TRANSFORMS
        ),
        Fault("dtypes differ", "    _check_dtypes(*tensors)\n", ""),
        Fault(
            "pooling of more pixels",
            "tuple(weight.shape[1:]) != (channels, 1, 1)",
            "weight.size(1) != channels",
        ),
        Fault(
            "no gradient where the output is NaN",
            "grad_output * ~(output <= 0)",
            "grad_output * (output > 0)",
            Guard("tests/test_non_finite.py aspp and reference"),
        ),
        Fault(
            "no gradient where a branch is NaN",
            "grad_joined * ~(joined <= 0)",
            "grad_joined * (joined > 0)",
            Guard("tests/test_non_finite.py aspp and reference"),
        ),
    ],
    "deeplab_fast/ops/dilated_conv2d.py": [
        Fault(
            "gradients of input and bias exchanged",
            "mask = list(ctx.needs_input_grad[:3])",
            "mask = list(ctx.needs_input_grad[2::-1])",
        ),
        Fault("every gradient", "mask = list(ctx.needs_input_grad[:3])", "mask = [True] * 3"),
        Fault(
            "gradients of all weights or none",
            "mask = [needs_input, any(needs_weights), any(needs_biases)]",
            "mask = [needs_input, all(needs_weights), any(needs_biases)]",
        ),
        Fault(
            "gradients of biases with those of weights",
            "mask = [needs_input, any(needs_weights), any(needs_biases)]",
            "mask = [needs_input, any(needs_weights), any(needs_weights)]",
        ),
        Fault(
            "fake weights like the input",
            "empty_like_format(weight, tuple(weight.shape)) if mask[1]",
            "empty_like_format(input, tuple(weight.shape)) if mask[1]",
        ),
        Fault(
            "fake bias whether needed or not",
            "weight.size(0) if mask[2] else 0",
            "weight.size(0)",
        ),
        Fault("groups that do not divide", "or weight.size(0) % groups or", "or"),
        Fault("even kernels across", " or weight.size(3) % 2 == 0", ""),
        Fault("bias not autocast", "input, weight, bias = autocast", "input, weight, _ = autocast"),
        Fault(
            "vmap sums over samples",
            "return () if any(mask[1:]) else (0, 1)  #",
            "return (0, 1)  #",
            TRANSFORMS,
        ),
        Fault(
            "tangent of biases alone",
            "for t in (*t_weights, *t_biases)):",
            "for t in t_weights):",
            TRANSFORMS,
        ),
    ],
    "deeplab_fast/ops/dilated_conv2d_and_mean.py": [
        Fault(
            "the mean's gradient lost",
            "mask, grad_mean, backend",
            "mask, None, backend",
            Guard("tests/test_dilated_conv2d_and_mean.py gradcheck"),
        ),
        Fault("the mean in autocast's dtype", "mean.to(input.dtype)", "mean.to(converted.dtype)"),
        Fault(
            "zeros convolved",
            "    ctx.set_materialize_grads(False)",
            "    ctx.set_materialize_grads(True)",
            Guard("tests/test_dilated_conv2d_and_mean.py one_of_the_outputs and cpu"),
        ),
        Fault(
            "fake mean of float64",
            "dtype = torch.promote_types(input.dtype, torch.float32)",
            "dtype = torch.float32",
        ),
        Fault("tangent of the mean", "torch.zeros_like(mean)", "torch.ones_like(mean)", TRANSFORMS),
    ],
    "deeplab_fast/ops/fused_conv2d.py": [
        Fault("padding of the other side", "2 * padding[i]", "2 * padding[0]"),
        Fault("stride across", "if tuple(stride) != (1, 1):", "if stride[0] != 1:"),
        Fault("even kernels", "size % 2 == 0 or 2 * p", "2 * p"),
        Fault(
            "in place within transforms",
            "    if _transforms.active():",
            "    if False:",
            TRANSFORMS,
        ),
    ],
    "deeplab_fast/ops/upsample_argmax.py": [
        Fault("fake labels transposed", "(logits.size(0), *size)", "(logits.size(0), *size[::-1])"),
        Fault("257 classes in a byte", "torch.uint8: 256", "torch.uint8: 257"),
        Fault(
            "size and scale_factor",
            "(size is None) == (scale_factor is None)",
            "size is None and scale_factor is None",
        ),
    ],
    "deeplab_fast/ops/upsample_cross_entropy.py": [
        Fault(
            "what is kept has a gradient",
            "ctx.mark_non_differentiable(log_sum_exp, total_weight)",
            "pass",
        ),
        Fault(
            "loss of the fake", 'if reduction == "none" else ()', 'if reduction != "sum" else ()'
        ),
        Fault("no smoothing past 0", "0.0 <= label_smoothing <= 1.0", "label_smoothing <= 1.0"),
        Fault(
            "twice the tangent", "torch.ones_like(loss)", "2 * torch.ones_like(loss)", TRANSFORMS
        ),
        Fault("weights with a tangent", "if t_weight is not None:", "if False:", TRANSFORMS),
    ],
    "deeplab_fast/training/checkpoint.py": [
        Fault("a file named before it is on the disk", "os.fsync(file.fileno())", "pass"),
        Fault("a state without its average", '"average", ', ""),
        Fault(
            "NumPy's generator not restored",
            '    np.random.set_state(("MT19937", np.array(words, dtype=np.uint32), *rest))\n',
            "",
        ),
        Fault("Python's generator not restored", '    random.setstate(state["python"])\n', ""),
        Fault("torch's generator not restored", '    torch.set_rng_state(state["torch"])\n', ""),
    ],
    "deeplab_fast/training/data.py": [
        Fault("255 may count", "{**ids, IGNORE: IGNORE}", "{IGNORE: IGNORE, **ids}"),
        Fault(
            "files in another order",
            'for image in sorted(images.rglob("*")):',
            'for image in sorted(images.rglob("*"), reverse=True):',
        ),
        Fault(
            "suffixes in upper case left out",
            "image.suffix.lower() in _IMAGES",
            "image.suffix in _IMAGES",
        ),
        Fault("hidden files taken", ' and not image.name.startswith(".")', ""),
        Fault("labels to ignore not known", " | {value: IGNORE for value in ignore}", ""),
        Fault(
            "SBD's labels for VOC's splits",
            'if split not in ("train", "val", "trainval", "test") and (root',
            "if (root",
        ),
        Fault(
            "two classes of Cityscapes exchanged",
            '24: "person", 25: "rider"',
            '24: "rider", 25: "person"',
        ),
    ],
    "deeplab_fast/training/distributed.py": [
        Fault(
            "every process writes",
            "    if rank() == 0:\n        try:",
            "    if True:\n        try:",
        ),
        Fault(
            "errors of other processes ignored",
            "        if message is not None:\n            raise",
            "        if False:\n            raise",
        ),
    ],
    "deeplab_fast/training/evaluation.py": [
        Fault(
            "all processes evaluate the same images",
            "range(distributed.rank(), len(data), distributed.world_size())",
            "range(0, len(data), distributed.world_size())",
        ),
        Fault("evaluated in training mode", "    model.eval()\n", ""),
        Fault("mode not restored", "            model.train()\n", "            pass\n"),
        Fault(
            "dtype ignored",
            "enabled=dtype != torch.float32):\n                labels",
            "enabled=False):\n                labels",
        ),
        Fault(
            "scales ignored",
            "tuple(target.shape), scales, flip, window",
            "tuple(target.shape), (1.0,), flip, window",
        ),
        Fault(
            "flip ignored",
            "tuple(target.shape), scales, flip, window",
            "tuple(target.shape), scales, False, window",
        ),
        Fault(
            "window ignored",
            "tuple(target.shape), scales, flip, window",
            "tuple(target.shape), scales, flip",
        ),
        Fault("scores of one process", "distributed.sum_over_processes(total)", "total"),
        Fault(
            "images not resized",
            "network_size(image.size, preprocessing.resize, align_corners)",
            "network_size(image.size, None, align_corners)",
        ),
        Fault(
            "sizes for align_corners ignored",
            "network_size(image.size, preprocessing.resize, align_corners)",
            "network_size(image.size, preprocessing.resize, False)",
        ),
        Fault(
            "images cropped",
            "replace(preprocessing, resize=None, crop=None)",
            "replace(preprocessing, resize=None)",
        ),
    ],
    "deeplab_fast/training/inference.py": [
        Fault(
            "mirrored images not mirrored",
            "(scaled, scaled.flip(3)) if flip",
            "(scaled, scaled) if flip",
        ),
        Fault(
            "mirrored maps not turned back",
            "maps.append((found, view is not scaled))",
            "maps.append((found, False))",
        ),
        Fault(
            "logits averaged instead of probabilities", "return logits.softmax(1)", "return logits"
        ),
        Fault(
            "overlapping windows added up",
            "return _Map(total / counts, size",
            "return _Map(total, size",
        ),
        Fault(
            "the last window counts",
            "total[:, :, rows, columns] += logits",
            "total[:, :, rows, columns] = logits",
        ),
        Fault("windows do not overlap", "window * 2 // 3 // _STEP", "window // _STEP"),
        Fault(
            "padding stretched over the image", "if seen == covered or seen == size:", "if True:"
        ),
        Fault(
            "no half pixel between the grids",
            "position = (position + 0.5) * (seen / size * low / covered) - 0.5",
            "position = position * (seen / size * low / covered)",
        ),
    ],
    "deeplab_fast/training/loader.py": [
        Fault(
            "all epochs in one order",
            "np.random.default_rng([recipe.seed, epoch])",
            "np.random.default_rng([recipe.seed, 0])",
        ),
        Fault(
            "order without the seed",
            "np.random.default_rng([recipe.seed, epoch])",
            "np.random.default_rng([0, epoch])",
        ),
        Fault(
            "all epochs augmented alike",
            "np.random.default_rng([self.recipe.seed, *key])",
            "np.random.default_rng([self.recipe.seed, key[1]])",
        ),
        Fault(
            "all images augmented alike",
            "np.random.default_rng([self.recipe.seed, *key])",
            "np.random.default_rng([self.recipe.seed, key[0]])",
        ),
        Fault(
            "augmentation without the seed",
            "np.random.default_rng([self.recipe.seed, *key])",
            "np.random.default_rng([0, *key])",
        ),
        Fault(
            "last batch dropped",
            "return -(-images // recipe.batch_size)",
            "return max(1, images // recipe.batch_size)",
        ),
        Fault("all processes see the same images", "[rank::world_size]", "[::world_size]"),
        Fault("parts overlap", "chosen[i * part : (i + 1) * part]", "chosen[:part]"),
        Fault(
            "a resumed run starts over",
            "for step in range(first_step, steps",
            "for step in range(0, steps",
        ),
        Fault("readers draw from dropout's generator", "generator=torch.Generator(),", ""),
    ],
    "deeplab_fast/training/log.py": [
        Fault("the last point of a curve drawn twice", "purge_step=step + 1", "purge_step=step"),
        Fault("scores among those of training", 'name.replace("val_", "val/")', "name"),
        Fault("pictures below one another", "axis=1)", "axis=0)"),
    ],
    "deeplab_fast/training/loop.py": [
        Fault(
            "the average is one update late",
            "        self.scaler.step(self.optimizer)\n"
            "        self.scaler.update()\n"
            "        self.optimizer.zero_grad(set_to_none=True)\n"
            "        if self.average is not None:\n"
            "            self.average.update_parameters(self.model)\n",
            "        if self.average is not None:\n"
            "            self.average.update_parameters(self.model)\n"
            "        self.scaler.step(self.optimizer)\n"
            "        self.scaler.update()\n"
            "        self.optimizer.zero_grad(set_to_none=True)\n",
        ),
        Fault(
            "the average is without batch norm's statistics",
            "multi_avg_fn=decay, use_buffers=True",
            "multi_avg_fn=decay",
        ),
        Fault(
            "the average has the default decay",
            "get_ema_multi_avg_fn(recipe.ema)",
            "get_ema_multi_avg_fn()",
        ),
        Fault(
            "the model is evaluated instead of its average",
            "            model = self._result()\n            scores",
            "            model = self.model\n            scores",
        ),
        Fault(
            "the model is kept instead of its average",
            "self._result().save_pretrained(path)",
            "self.model.save_pretrained(path)",
        ),
        Fault(
            "the model is returned instead of its average",
            "return self._result().eval()",
            "return self.model.eval()",
        ),
        Fault(
            "dropout does not depend on the seed",
            "        torch.manual_seed(self.recipe.seed + self.rank)\n",
            "",
        ),
        Fault(
            "all processes draw the same dropout",
            "self.recipe.seed + self.rank",
            "self.recipe.seed",
        ),
        Fault(
            "learning rates are not set",
            "        self.recipe.set_learning_rates(self.optimizer, self.step, self.steps)\n",
            "",
        ),
        Fault(
            "gradients are not cleared", "        self.optimizer.zero_grad(set_to_none=True)\n", ""
        ),
        Fault("the loss is not scaled", "self.scaler.scale(loss).backward()", "loss.backward()"),
        Fault("the loss scale never changes", "        self.scaler.update()\n", ""),
        Fault(
            "no autocast in training",
            "self.dtype, enabled=self.dtype != torch.float32\n                ):",
            "self.dtype, enabled=False\n                ):",
        ),
        Fault(
            "evaluated without autocast",
            "dtype=self.dtype, workers=self.workers",
            "workers=self.workers",
        ),
        Fault(
            "the workers of training ignored",
            "self.train_data, self.recipe, self.step, self.workers, self.rank",
            "self.train_data, self.recipe, self.step, 0, self.rank",
        ),
        Fault(
            "the workers of evaluation ignored",
            "dtype=self.dtype, workers=self.workers, quiet",
            "dtype=self.dtype, quiet",
        ),
        Fault(
            "all parts divided by the weight of the first",
            "weight = torch.stack([self.objective.weight_of(target) for _, target in batch]).sum()",
            "weight = self.objective.weight_of(batch[0][1])",
        ),
        Fault(
            "the loss logged is of the last part", "total += loss.detach()", "total = loss.detach()"
        ),
        Fault(
            "images not divided by the standard deviation",
            "/ 255 - self.mean) / self.std",
            "/ 255 - self.mean)",
        ),
        Fault(
            "batch norm's parameters are not frozen",
            "                norm.requires_grad_(False)\n",
            "                pass\n",
        ),
        Fault(
            "batch norm's statistics are not frozen",
            "            for norm in _batch_norms(self.model):\n                norm.eval()\n",
            "            pass\n",
        ),
        Fault(
            "not in training mode after an evaluation's pictures",
            "drawn)\n        self._train_mode()\n",
            "drawn)\n",
        ),
        Fault(
            "a tie replaces the best model",
            "scores.miou > self.best_miou",
            "scores.miou >= self.best_miou",
        ),
        Fault(
            "evaluated after every epoch",
            "every = self.steps_per_epoch * self.evaluate_every",
            "every = self.steps_per_epoch",
        ),
        Fault(
            "not evaluated at the end",
            "return self.step % every == 0 or self.step >= self.steps",
            "return self.step % every == 0",
        ),
        Fault(
            "logged at another interval",
            "log = self._is_pause() or self.step % self.log_every == 0",
            "log = self._is_pause() or self.step % (self.log_every + 1) == 0",
        ),
        Fault(
            "evaluation counts in images per second",
            "stop = distributed.any_process(stopped.is_set())\n"
            "                clock = time.perf_counter()\n",
            "stop = distributed.any_process(stopped.is_set())\n",
        ),
        Fault(
            "learning rate of the head logged",
            'self.optimizer.param_groups[0]["lr"]',
            'self.optimizer.param_groups[1]["lr"]',
        ),
        Fault(
            "one part of an update only",
            "for _ in range(self.recipe.accumulate)]",
            "for _ in range(1)]",
        ),
        Fault(
            "the weights are not restored",
            '        self.model.load_state_dict(state["model"])\n',
            "",
        ),
        Fault(
            "the average is not restored",
            '            self.average.load_state_dict(state["average"])\n',
            "            pass\n",
        ),
        Fault(
            "the momentum is not restored",
            '        self.optimizer.load_state_dict(state["optimizer"])\n',
            "",
        ),
        Fault(
            "the loss scale is not restored",
            '        self.scaler.load_state_dict(state["scaler"])\n',
            "",
        ),
        Fault(
            "the update is not restored",
            'for name in ("step", "evaluated", "loss", "best_miou"):\n            setattr',
            'for name in ("evaluated", "loss", "best_miou"):\n            setattr',
        ),
        Fault(
            "the last evaluation is not restored",
            'for name in ("step", "evaluated", "loss", "best_miou"):\n            setattr',
            'for name in ("step", "loss", "best_miou"):\n            setattr',
        ),
        Fault(
            "the loss is not restored",
            'for name in ("step", "evaluated", "loss", "best_miou"):\n            setattr',
            'for name in ("step", "evaluated", "best_miou"):\n            setattr',
        ),
        Fault(
            "the best score is not restored",
            'for name in ("step", "evaluated", "loss", "best_miou"):\n            setattr',
            'for name in ("step", "evaluated", "loss"):\n            setattr',
        ),
        Fault(
            "the random state is not restored",
            '            checkpoint.set_random_state(state["random"][self.rank], self.device)\n',
            "            pass\n",
        ),
        Fault(
            "all processes take up the state of the first",
            'state["random"][self.rank]',
            'state["random"][0]',
        ),
        Fault(
            "readers start at the first update",
            "self.train_data, self.recipe, self.step, self.workers",
            "self.train_data, self.recipe, 0, self.workers",
        ),
        Fault(
            "resumed with other epochs",
            "    if recipe.power == 0:\n        del",
            "    if True:\n        del",
        ),
        Fault(
            "signal handlers stay",
            "            signal.signal(number, handler)\n",
            "            pass\n",
        ),
        Fault(
            "not saved when stopped",
            "            if self._is_pause() or stop:\n                self._save()",
            "            if self._is_pause():\n                self._save()",
        ),
    ],
    "deeplab_fast/training/metrics.py": [
        Fault(
            "rows and columns exchanged",
            "target[counts].long() * num_classes + prediction[counts].long()",
            "prediction[counts].long() * num_classes + target[counts].long()",
        ),
        Fault(
            "the intersection twice in the union",
            "self.confusion.sum(0) + self.confusion.sum(1) - hits",
            "self.confusion.sum(0) + self.confusion.sum(1)",
        ),
        Fault(
            "precision for accuracy",
            "_divide(np.diag(self.confusion), self.confusion.sum(1))",
            "_divide(np.diag(self.confusion), self.confusion.sum(0))",
        ),
        Fault(
            "absent classes count as 0",
            "known = values[~np.isnan(values)]",
            "known = np.nan_to_num(values)",
        ),
        Fault(
            "frequency of predictions",
            "frequency = _divide(self.confusion.sum(1), self.confusion.sum())",
            "frequency = _divide(self.confusion.sum(0), self.confusion.sum())",
        ),
    ],
    "deeplab_fast/training/objective.py": [
        Fault(
            "weight of the auxiliary loss ignored",
            "self.recipe.aux_weight * self._loss",
            "0.5 * self._loss",
        ),
        Fault(
            "class weights ignored",
            "            self.class_weights,\n            ignore",
            "            None,\n            ignore",
        ),
        Fault(
            "divided by the number of pixels",
            "        return self.class_weights[target.where(counts, 0)].where(counts, 0).sum()",
            "        return counts.sum(dtype=torch.float32)",
        ),
        Fault(
            "ignored pixels count",
            "return counts.sum(dtype=torch.float32)",
            "return (target >= 0).sum(dtype=torch.float32)",
        ),
        Fault(
            "label smoothing ignored",
            "label_smoothing=self.recipe.label_smoothing,",
            "label_smoothing=0.0,",
        ),
        Fault(
            "align_corners ignored",
            "align_corners=self.model.align_corners,",
            "align_corners=False,",
        ),
        Fault("hard_pixels ignored", "int(hard * target.numel())", "int(0.25 * target.numel())"),
        Fault(
            "hard pixels of all parts add up",
            "hardest.mean() / self.recipe.accumulate",
            "hardest.mean()",
        ),
    ],
    "deeplab_fast/training/recipe.py": [
        Fault(
            "no warm-up",
            "warmup = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0",
            "warmup = 1.0",
        ),
        Fault("warm-up starts at 0", "(step + 1) / self.warmup", "step / self.warmup"),
        Fault("power ignored", "(1 - step / steps) ** self.power", "(1 - step / steps) ** 0.9"),
        Fault("momentum ignored", "momentum=self.momentum, ", "momentum=0.9, "),
        Fault("weight decay ignored", "weight_decay=self.weight_decay)", "weight_decay=1e-4)"),
        Fault(
            "Nesterov's momentum",
            "weight_decay=self.weight_decay)",
            "weight_decay=self.weight_decay, nesterov=self.momentum > 0)",
        ),
        Fault(
            "learning rate of the head ignored",
            "head_rate = self.head_learning_rate or self.learning_rate",
            "head_rate = self.learning_rate",
        ),
        Fault(
            "backbone and head exchanged",
            '(backbone if name.startswith("backbone.") else head)',
            '(head if name.startswith("backbone.") else backbone)',
        ),
        Fault(
            "learning rates multiply up",
            'group["lr"] = group["initial_lr"] * factor',
            'group["lr"] = group["lr"] * factor',
        ),
    ],
    "deeplab_fast/training/transforms.py": [
        Fault(
            "never enlarged",
            "random.uniform(*recipe.scale)",
            "random.uniform(recipe.scale[0], 1.0)",
        ),
        Fault(
            "the last crop never taken",
            "random.integers(whole - part + 1)",
            "random.integers(max(1, whole - part))",
        ),
        Fault(
            "never darker",
            "random.uniform(1 - recipe.jitter, 1 + recipe.jitter)",
            "random.uniform(1, 1 + recipe.jitter)",
        ),
        Fault(
            "no change of saturation",
            "ImageEnhance.Contrast, ImageEnhance.Color",
            "ImageEnhance.Contrast, ImageEnhance.Contrast",
        ),
        Fault(
            "labels interpolated", "Image.Resampling.NEAREST, box", "Image.Resampling.BILINEAR, box"
        ),
        Fault(
            "images not interpolated",
            "image = image.resize(size, Image.Resampling.BILINEAR, box)",
            "image = image.resize(size, Image.Resampling.NEAREST, box)",
        ),
        Fault(
            "padding is class 0",
            'Image.new("L", (width, height), IGNORE)',
            'Image.new("L", (width, height), 0)',
        ),
        Fault(
            "probability of mirroring ignored",
            "random.random() < recipe.flip",
            "random.random() < 0.5",
        ),
        Fault(
            "mirrored where the probability is 0",
            "random.random() < recipe.flip",
            "random.random() <= recipe.flip",
        ),
        Fault(
            "labels not mirrored",
            "pixels, classes = pixels[:, ::-1], classes[:, ::-1]",
            "pixels = pixels[:, ::-1]",
        ),
    ],
    "deeplab_fast/triton.py": [
        Fault(
            "versions compared as text",
            'tuple(map(int, found.split(".")[:2])) < than',
            'found < "{}.{}".format(*than)',
        ),
        Fault("the newest of several GPUs decides", "oldest = min(", "oldest = max("),
        Fault("no kernels for AMD", "    if torch.version.hip:\n        return None\n", ""),
        Fault(
            "bf16 is widened on a GPU",
            "if not _INTERPRETED:\n        return args",
            "if False:\n        return args",
        ),
        Fault(
            "the last block runs over int32", "_MAX_INDEX = 2**31 - 4096", "_MAX_INDEX = 2**31 - 1"
        ),
        Fault(
            "pixels of one branch count",
            "len(weights) * input.numel() // input.size(1)",
            "input.numel() // input.size(1)",
        ),
        Fault(
            "ASPP's projection may be empty",
            "[*weights, pool, args[1]]",
            "[*weights, pool, args[0]]",
        ),
        Fault(
            "a residual of another batch is taken",
            "if residual.shape != (input.size(0), weight.size(0), *input.shape[2:]):",
            "if residual.shape[1:] != (weight.size(0), *input.shape[2:]):",
        ),
        Fault(
            "the mask of another gradient",
            "        if output_mask[1]:\n            grad_weight = depthwise",
            "        if output_mask[0]:\n            grad_weight = depthwise",
        ),
        Fault(
            "only a residual that is the input is read first",
            "if input.untyped_storage().data_ptr() == sums.untyped_storage().data_ptr():",
            "if input is residual:",
        ),
        Fault(
            "a residual elsewhere is not written",
            "    if output is not residual:\n        residual.copy_(output)",
            "    pass",
        ),
        Fault(
            "no activation after a residual",
            "dilation, groups, sums, activation)",
            "dilation, groups, sums)",
        ),
    ],
    "deeplab_fast/triton_kernels/aspp.py": [
        Fault(
            "ReLU of the pooled branch drops NaN",
            "pool_bias.float()).relu_()",
            "pool_bias.float()).nan_to_num_(0.0).relu_()",
        ),
        Fault(
            "infinite means cut off",
            "mean = input.mean((2, 3), dtype=torch.float32)",
            "mean = input.mean((2, 3), dtype=torch.float32).clamp(-65504, 65504)",
        ),
        Fault("no activation of the pooled branch", ".relu_()", "", TRITON_ASPP),
        Fault(
            "one mean of all images",
            "input.mean((2, 3), dtype=torch.float32)",
            "input.mean((0, 2, 3), dtype=torch.float32)[None].expand(input.size(0), -1)",
            TRITON_ASPP,
        ),
        Fault(
            "the bias of images is rounded",
            "project_bias.float())",
            "project_bias.float()).to(input.dtype)",
            TRITON_ASPP,
        ),
    ],
    "deeplab_fast/triton_kernels/bilinear.py": [
        Fault(
            "the second product is not rounded",
            "return tl.fma(b_a, b_w0, b_b * b_w1)",
            "return tl.fma(b_b, b_w1, b_a * b_w0)",
        ),
        Fault(
            "source index not clamped at the end",
            "tl.minimum(o_lo + 1, size - 1), 1.0",
            "o_lo + 1, 1.0",
            ARGMAX_TRITON,
        ),
        Fault("an emulated fma that rounds twice", "tl.where(inexact, odd, total)", "total"),
        Fault(
            "source index not clamped at 0",
            "tl.where(b_src < 0, 0.0, b_src)",
            "b_src",
            ARGMAX_TRITON,
        ),
        Fault(
            "source index not clamped at the end",
            "tl.minimum(b_src.to(tl.int32), size - 1)",
            "b_src.to(tl.int32)",
            ARGMAX_TRITON,
        ),
        Fault(
            "past the last source pixel",
            "tl.minimum(o_lo + 1, size - 1)",
            "o_lo + 1",
            ARGMAX_TRITON,
        ),
        Fault(
            "weights swapped",
            "size - 1), 1.0 - b_w1, b_w1",
            "size - 1), b_w1, 1.0 - b_w1",
            ARGMAX_TRITON,
        ),
        Fault(
            "the other product rounded",
            "return _emulated_fma(b_a, b_w0, b_b * b_w1)",
            "return _emulated_fma(b_b, b_w1, b_a * b_w0)",
            ARGMAX_TRITON,
        ),
        Fault(
            "both products rounded",
            "return _emulated_fma(b_a, b_w0, b_b * b_w1)",
            "return b_a * b_w0 + b_b * b_w1",
            ARGMAX_TRITON,
        ),
        Fault(
            "rounded to nearest first",
            "return tl.where(inexact, odd, total)",
            "return total",
            ARGMAX_TRITON,
        ),
        Fault(
            "index rounded twice",
            "b_src = _emulated_fma(b_scale, b_dst + b_half, -b_half)",
            "b_src = b_scale * (b_dst + b_half) - b_half",
            ARGMAX_TRITON,
        ),
    ],
    "deeplab_fast/triton_kernels/depthwise_conv2d.py": [
        Fault(
            "NaN of the input is 0",
            "            b_sum += b_input.to(tl.float32) * b_weight.to(tl.float32)[None, :]",
            "            b_input = tl.where(b_input == b_input, b_input, 0.0)\n"
            "            b_sum += b_input.to(tl.float32) * b_weight.to(tl.float32)[None, :]",
        ),
        Fault(
            "zeros not multiplied",
            "            b_sum += b_input.to(tl.float32) * b_weight.to(tl.float32)[None, :]",
            "            b_product = b_input.to(tl.float32) * b_weight.to(tl.float32)[None, :]\n"
            "            b_sum += tl.where(b_input == 0, 0.0, b_product)",
        ),
        Fault(
            "a gradient's NaN is 0",
            "        b_sum += b_grad * b_input.to(tl.float32)",
            "        b_sum += tl.where(b_grad == b_grad, b_grad, 0.0) * b_input.to(tl.float32)",
        ),
        Fault(
            "channels past the last",
            "o_pixel < num_pixels, o_c < out_channels",
            "o_pixel < num_pixels, o_c <= out_channels",
            TRITON_DEPTHWISE,
        ),
        Fault(
            "one output of each channel",
            "for i in tl.static_range(MULTIPLIER if MIRRORED else 1):",
            "for i in tl.static_range(1):",
            TRITON_DEPTHWISE,
        ),
        Fault(
            "weights past the last",
            "mask=m_c, other=0.0)",
            "mask=m_c | True, other=0.0)",
            TRITON_DEPTHWISE,
        ),
        Fault(
            "products in half precision",
            "b_sum += b_input.to(tl.float32) * b_weight.to(tl.float32)[None, :]",
            "b_sum += (b_input * b_weight[None, :]).to(tl.float32)",
            TRITON_DEPTHWISE,
        ),
        Fault(
            "offsets of the input in int32",
            "o_input = (o_pixel + i_dy * W + i_dx).to(tl.int64)[:, None] * in_channels",
            "o_input = (o_pixel + i_dy * W + i_dx)[:, None] * in_channels",
            TRITON_DEPTHWISE,
        ),
        Fault(
            "offsets of partial sums in int32",
            "tl.program_id(0).to(tl.int64) * K",
            "tl.program_id(0) * K",
            TRITON_DEPTHWISE,
        ),
        Fault(
            "only the first block of a run is summed",
            "range(0, RUN, BLOCK_P)",
            "range(0, BLOCK_P, BLOCK_P)",
            TRITON_DEPTHWISE,
        ),
        Fault("runs that overlap", "_RUN = 2048", "_RUN = 2000", TRITON_DEPTHWISE),
        Fault("only the first run counts", "partial.sum(0)", "partial[0]", TRITON_DEPTHWISE),
        Fault(
            "partial sums in half precision",
            "new_empty((runs, R, S, K), dtype=torch.float32)",
            "new_empty((runs, R, S, K))",
            TRITON_DEPTHWISE,
        ),
        Fault(
            "rates clamped to the other side",
            "min(dilation[0], input.size(2)), min(dilation[1], input.size(3))",
            "min(dilation[0], input.size(3)), min(dilation[1], input.size(2))",
            TRITON_DEPTHWISE,
        ),
        Fault("a weight with gaps", "weight.contiguous(),", "weight,", TRITON_DEPTHWISE),
    ],
    "deeplab_fast/triton_kernels/dilated_conv2d.py": [
        Fault(
            "ReLU drops NaN",
            "b_sum = tl.where(b_sum < 0, 0.0, b_sum)  # NaN stays NaN",
            "b_sum = tl.where(b_sum > 0, b_sum, 0.0)",
        ),
        Fault(
            "ReLU6 drops NaN",
            "b_sum = tl.where(b_sum > 6, 6.0, b_sum)",
            "b_sum = tl.where(b_sum < 6, b_sum, 6.0)",
        ),
        Fault(
            "tf32 makes 0 of NaN",
            '    b_rounded = tl.where(tl.abs(b_exact) < float("inf"), b_rounded, '
            "b_exact)  # NaN stays NaN\n",
            "",
        ),
        Fault(
            "an infinite bias is not added",
            "b_sum += tl.load(p_bias + o_bias, mask=m_output, other=0.0).to(tl.float32)",
            "b_bias = tl.load(p_bias + o_bias, mask=m_output, other=0.0).to(tl.float32)\n"
            '        b_sum += tl.where(tl.abs(b_bias) < float("inf"), b_bias, 0.0)',
        ),
        Fault(
            "the residual behind the activation",
            "    if HAS_RESIDUAL:\n"
            "        b_sum += tl.load(p_residual + o_output, mask=m_output, "
            'other=0.0).to(tl.float32)\n    if ACTIVATION != "none":\n'
            "        b_sum = tl.where(b_sum < 0, 0.0, b_sum)  # NaN stays NaN\n"
            '    if ACTIVATION == "relu6":\n        b_sum = tl.where(b_sum > 6, 6.0, b_sum)\n',
            '    if ACTIVATION != "none":\n        b_sum = tl.where(b_sum < 0, 0.0, b_sum)\n'
            '    if ACTIVATION == "relu6":\n        b_sum = tl.where(b_sum > 6, 6.0, b_sum)\n'
            "    if HAS_RESIDUAL:\n"
            "        b_sum += tl.load(p_residual + o_output, mask=m_output, "
            "other=0.0).to(tl.float32)\n",
        ),
        Fault(
            "pieces that are NaN left out",
            "        b_sum += tl.load(p_partial + o_row[:, None] + o_n[None, :])",
            "        b_piece = tl.load(p_partial + o_row[:, None] + o_n[None, :])\n"
            "        b_sum += tl.where(b_piece == b_piece, b_piece, 0.0)",
        ),
        Fault(
            "a gradient's NaN is 0",
            "        b_sum = tl.dot(b_grad, b_input, b_sum, input_precision=PRECISION)",
            "        b_grad = tl.where(b_grad == b_grad, b_grad, 0.0)\n"
            "        b_sum = tl.dot(b_grad, b_input, b_sum, input_precision=PRECISION)",
        ),
        Fault(
            "split sums lose rows",
            "dilated_conv2d_reduce_kernel[(work.reductions.numel() // 4 * (blocks.m // rows),)](",
            "dilated_conv2d_reduce_kernel[(work.reductions.numel() // 4,)](",
            TRITON_DENSE,
        ),
        Fault(
            "split gradients lose rows",
            "wgrad_reduce_kernel[(work.reductions.numel() // 4 * (blocks.m // rows),)](",
            "wgrad_reduce_kernel[(work.reductions.numel() // 4,)](",
            TRITON_DENSE,
        ),
        Fault(
            "pieces of the rows above",
            "((i_first_slot + i).to(tl.int64) * BLOCK_M + o_m) * BLOCK_N",
            "((i_first_slot + i).to(tl.int64) * BLOCK_M + o_m % 16) * BLOCK_N",
            TRITON_DENSE,
        ),
        Fault(
            "one piece not added",
            "for i in range(num_slots):",
            "for i in range(num_slots - 1):",
            TRITON_DENSE,
        ),
        Fault(
            "channels past a branch",
            "m_n = o_n < (C if MIRRORED else num_channels)",
            "m_n = o_n < C",
            TRITON_DENSE,
        ),
        Fault(
            "weights past the last",
            "mask=m_k[:, None] & m_n[None, :], other=0.0)\n        i_dy",
            "mask=(m_k[:, None] | True) & m_n[None, :], other=0.0)\n        i_dy",
            TRITON_DENSE,
        ),
        Fault(
            "input past the last",
            "mask=(m_inside & m_pixel)[:, None] & m_k[None, :],",
            "mask=(m_inside & m_pixel)[:, None] & (m_k[None, :] | True),",
            TRITON_DENSE,
        ),
        Fault(
            "bias of the first image",
            "        out_channels, H * W, stride_bias, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,\n    )",
            "        out_channels, H * W, 0, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,\n    )",
            TRITON_DENSE,
        ),
        Fault(
            "gradients of a column too many",
            "tl.cdiv(C, BLOCK_N)\n    o_m = i_block // num_column_blocks * BLOCK_M + tl",
            "C // BLOCK_N + 1\n    o_m = i_block // num_column_blocks * BLOCK_M + tl",
            TRITON_DENSE,
        ),
        Fault(
            "gradient rows past the last",
            "m_m, m_n = o_m < K, o_n < C",
            "m_m, m_n = o_m >= 0, o_n < C",
            TRITON_DENSE,
        ),
        Fault(
            "pieces in half precision",
            "work.num_slots * blocks.m * blocks.n, dtype=torch.float32)\n    epilogue",
            "work.num_slots * blocks.m * blocks.n)\n    epilogue",
            TRITON_DENSE,
        ),
        Fault(
            "offsets of the output in int32",
            "o_output = o_pixel.to(tl.int64)[:, None]",
            "o_output = o_pixel[:, None]",
            TRITON_FAR,
        ),
        Fault(
            "offsets of a bias in int32",
            "o_image = (o_pixel // pixels_per_image).to(tl.int64)",
            "o_image = o_pixel // pixels_per_image",
            TRITON_FAR,
        ),
        Fault(
            "offsets of the weight in int32",
            "o_weight = (o_n.to(tl.int64) * num_taps + i_tap)[None, :]",
            "o_weight = (o_n * num_taps + i_tap)[None, :]",
            TRITON_FAR,
        ),
        Fault(
            "offsets of the mirrored weight in int32",
            "o_weight = (o_c.to(tl.int64) * num_taps + i_tap)[:, None]",
            "o_weight = (o_c * num_taps + i_tap)[:, None]",
            TRITON_FAR,
        ),
        Fault(
            "offsets of pieces in int32",
            "((i_first_slot + i).to(tl.int64) * BLOCK_M + o_m)",
            "((i_first_slot + i) * BLOCK_M + o_m)",
            TRITON_FAR,
        ),
        Fault(
            "offsets of tf32 in int32",
            "o = tl.program_id(0).to(tl.int64) * BLOCK",
            "o = tl.program_id(0) * BLOCK",
            TRITON_FAR,
        ),
        Fault(
            "tf32 past the last",
            "mask=o < num_elements, other=0.0)",
            "mask=o >= 0, other=0.0)",
            TRITON_DENSE,
        ),
        Fault("tf32 on AMD", "and not torch.version.hip", "", TRITON_DENSE),
        Fault(
            "tuning of one dtype for all",
            "_tuned.get((dtype, pinned), pinned)",
            "next((b for (_, p), b in _tuned.items() if p == pinned), pinned)",
            TRITON_DENSE,
        ),
        Fault(
            "blocks smaller than tensor cores multiply",
            "_SMALLEST = 16",
            "_SMALLEST = 8",
            TRITON_DENSE,
        ),
        Fault(
            "columns fit the depth",
            "n=fitting(columns, largest.n), k=fitting(depth, largest.k)",
            "n=fitting(depth, largest.n), k=fitting(columns, largest.k)",
            TRITON_DENSE,
        ),
        Fault(
            "more shared memory than AMD has",
            "if torch.version.hip:\n        largest",
            "if False:\n        largest",
            TRITON_DENSE,
        ),
        Fault(
            "steps of the first branch",
            "depth = max(out_channels) if mirrored",
            "depth = out_channels[0] if mirrored",
            TRITON_DENSE,
        ),
        Fault(
            "the first branch is aligned",
            "math.gcd(16, *channels)",
            "math.gcd(16, channels[0])",
            TRITON_DENSE,
        ),
        Fault(
            "no sum is split", "multi_processor_count", "multi_processor_count // 200", TRITON_DENSE
        ),
        Fault(
            "rates clamped to the other side",
            "min(vertical, H), min(horizontal, W)",
            "min(vertical, W), min(horizontal, H)",
            TRITON_DENSE,
        ),
        Fault(
            "a bias with gaps",
            "bias = given[0].contiguous() if",
            "bias = given[0] if",
            TRITON_DENSE,
        ),
    ],
    "deeplab_fast/triton_kernels/upsample_argmax.py": [
        Fault("-0 loses to +0", "tl.where(b_value == 0, 0.0, b_value).to(", "b_value.to("),
        Fault(
            "NaN by its bits",
            "b_ordered = tl.where(b_value != b_value, _NAN_KEY, b_ordered)\n",
            "b_ordered = b_ordered\n",
        ),
        Fault(
            "NaN is least",
            "_NAN_KEY = tl.constexpr(0x7FFFFFFF)",
            "_NAN_KEY = tl.constexpr(-0x7FFFFFFF)",
        ),
        Fault(
            "negative values in reverse",
            "b_ordered = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)",
            "b_ordered = b_bits",
        ),
        Fault(
            "ties by a byte of the class",
            "| (0x7FFFFFFF - o_class).to(tl.int64)",
            "| (0x7FFFFFFF - o_class % 256).to(tl.int64)",
        ),
        Fault(
            "no key below any other",
            "_NO_KEY = tl.constexpr(-(2**63))",
            "_NO_KEY = tl.constexpr(-(2**62))",
        ),
        Fault(
            "a corner less to win at",
            "    b_can_win |= b_d > _losing_bound(p_d + o_winner, m_cell)[None, :]\n",
            "",
        ),
        Fault("no margin", "b_logit - (tl.abs(b_logit) * 2.0**-18 + 2.0**-118)", "b_logit"),
        Fault(
            "no margin for denormals",
            "b_logit - (tl.abs(b_logit) * 2.0**-18 + 2.0**-118)",
            "b_logit - tl.abs(b_logit) * 2.0**-18",
        ),
        Fault("margin of the sign", "tl.abs(b_logit) * 2.0**-18", "b_logit * 2.0**-18"),
        Fault("anything is finite", "(tl.abs(b_logit) < 2.0**126)", "(b_logit == b_logit)"),
        Fault(
            "NaN is finite",
            "(tl.abs(b_logit) < 2.0**126)",
            "((tl.abs(b_logit) < 2.0**126) | (b_logit != b_logit))",
        ),
        Fault(
            "only the last block of classes is finite",
            "b_finite &= _is_finite(b_a)",
            "b_finite = _is_finite(b_a)",
        ),
        Fault(
            "a corner's infinity missed", "& _is_finite(b_c) & _is_finite(b_d)", "& _is_finite(b_c)"
        ),
        Fault(
            "classes past the last read",
            "o_c = tl.minimum(i_c + tl.arange(0, BLOCK_C), C - 1)[:, None]",
            "o_c = (i_c + tl.arange(0, BLOCK_C))[:, None]",
        ),
        Fault(
            "classes past the last listed",
            "m_class = (o_c < C) & m_cell[None, :]",
            "m_class = (o_c <= C) & m_cell[None, :]",
        ),
        Fault(
            "the last class never listed",
            "m_class = (o_c < C) & m_cell[None, :]",
            "m_class = (o_c < C - 1) & m_cell[None, :]",
        ),
        Fault("next row past the last", "(tl.minimum(o_lo_y + 1, H - 1) - o_lo_y)", "1"),
        Fault(
            "next column past the last",
            "o_hi_x = tl.minimum(o_lo_x + 1, W - 1)",
            "o_hi_x = o_lo_x + 1",
        ),
        Fault(
            "cells of the first image", "(o_cell // W // H) * stride_n", "(o_cell // W // H) * 0"
        ),
        Fault(
            "cells past the last counted",
            "tl.store(p_counts + o_cell, b_count, mask=m_cell)",
            "tl.store(p_counts + o_cell, b_count)",
        ),
        Fault(
            "a candidate more than fits",
            "mask=m_win & (o_slot < _MAX_CANDIDATES)",
            "mask=m_win & (o_slot <= _MAX_CANDIDATES)",
        ),
        Fault(
            "candidates of a block over those of the one before",
            "o_slot = b_count[None, :] + tl.cumsum",
            "o_slot = tl.cumsum",
        ),
        Fault(
            "a cell that is not finite listed",
            "tl.where(b_finite != 0, b_count, _MAX_CANDIDATES + 1)",
            "b_count",
        ),
        Fault(
            "a cell of too many listed",
            "m_listed = b_count <= _MAX_CANDIDATES",
            "m_listed = b_count <= _MAX_CANDIDATES + 1",
        ),
        Fault("two candidates are one", "m_open = b_count > 1", "m_open = b_count > 2"),
        Fault(
            "a candidate too few",
            "m_c = (o_c < b_num[None, :]) & m_open",
            "m_c = (o_c < b_num[None, :] - 1) & m_open",
        ),
        Fault(
            "candidates of another image",
            "o_cell = (i_n * H + o_y_lo) * W + o_x_lo",
            "o_cell = o_y_lo * W + o_x_lo",
        ),
        Fault(
            "the last class left out",
            "            m_c = o_c < C\n",
            "            m_c = o_c < C - 1\n",
        ),
        Fault(
            "classes past the last win",
            "b_key = tl.where(m_c, _key(b_value, o_c), _NO_KEY)",
            "b_key = _key(b_value, o_c)",
        ),
        Fault(
            "rows exchanged",
            "b_value = interpolate(b_top, b_bottom, b_h0",
            "b_value = interpolate(b_bottom, b_top, b_h0",
        ),
        Fault(
            "images over one another",
            "p_label = p_labels + i_n * num_pixels + o_p",
            "p_label = p_labels + o_p",
        ),
        Fault(
            "pixels past the image",
            "    o_p = tl.where(m_p, o_p, 0)\n",
            "    m_p = o_p <= num_pixels\n",
        ),
        Fault(
            "int32 offsets of images",
            "i_n = (tl.program_id(0) // num_blocks).to(tl.int64)",
            "i_n = tl.program_id(0) // num_blocks",
        ),
        Fault(
            "int32 offsets of rows",
            "p_hi_row = p_image + o_y_hi.to(tl.int64) * stride_h",
            "p_hi_row = p_image + o_y_hi * stride_h",
        ),
        Fault(
            "int32 offsets of columns",
            "p_hi_row + o_x_hi.to(tl.int64) * stride_w",
            "p_hi_row + o_x_hi * stride_w",
        ),
        Fault(
            "int32 offsets of winners",
            "o_winner_d = _class_of(b_key_d).to(tl.int64) * stride_c",
            "o_winner_d = _class_of(b_key_d) * stride_c",
        ),
        Fault(
            "as many blocks as pixels fill",
            "(N * triton.cdiv(out_H * out_W, block_p),)",
            "(max(1, N * (out_H * out_W // block_p)),)",
        ),
        Fault(
            "as many blocks as cells fill",
            "triton.cdiv(num_cells, block_s)",
            "max(1, num_cells // block_s)",
        ),
        Fault(
            "scales exchanged",
            "        scale_h,\n        scale_w,\n        PRUNED",
            "        scale_w,\n        scale_h,\n        PRUNED",
        ),
    ],
    "deeplab_fast/triton_kernels/upsample_cross_entropy.py": [
        Fault("triton: last cell not written", "mask=o_cell <= size)", "mask=o_cell < size)"),
        Fault(
            "triton: a halving too few", "out_size.bit_length(),", "(out_size - 1).bit_length(),"
        ),
        Fault(
            "triton: no block for the last cell's begin",
            "[(triton.cdiv(size + 1, block),)]",
            "[(triton.cdiv(size, block),)]",
        ),
        Fault(
            "triton: last classes forgotten",
            "triton.cdiv(num_cells, block_s), triton.cdiv(C, block_c)",
            "triton.cdiv(num_cells, block_s), max(C // block_c, 1)",
        ),
        Fault(
            "triton: last cells forgotten",
            "triton.cdiv(num_cells, block_s), triton.cdiv(C, block_c)",
            "max(num_cells // block_s, 1), triton.cdiv(C, block_c)",
        ),
        Fault(
            "triton: last elements forgotten",
            "(triton.cdiv(logits.numel(), block),)",
            "(max(logits.numel() // block, 1),)",
        ),
        Fault(
            "triton: last pixels forgotten",
            "num_blocks = N * triton.cdiv(out_H * out_W, block_p)",
            "num_blocks = N * max(out_H * out_W // block_p, 1)",
        ),
        Fault("triton: an element past the last", "m = o < num_logits", "m = o <= num_logits"),
        Fault(
            "triton: pixels past the last written",
            "tl.store(p_log_sum_exp + o_pixel, b_log_sum_exp, mask=m_p)",
            "tl.store(\n"
            "        p_log_sum_exp + i_n * num_pixels + tl.program_id(0) % num_blocks * BLOCK_P\n"
            "        + tl.arange(0, BLOCK_P),\n"
            "        b_log_sum_exp,\n"
            "    )",
        ),
        Fault(
            "triton: one block of a cell's columns",
            "range(0, tl.max(b_width, axis=0), BLOCK_X)",
            "range(0, 1, BLOCK_X)",
        ),
        Fault(
            "triton: no NaN for a bad target",
            'tl.where(m_counted & (m_known == 0), float("nan"), b_grad)',
            "b_grad",
        ),
        Fault(
            "triton: unused infinite weight",
            'MEAN=reduction == "mean",\n        SMOOTH=label_smoothing > 0,',
            'MEAN=reduction == "mean",\n        SMOOTH=True,',
        ),
        Fault(
            "triton: ignored pixels' NaN forgotten",
            "tl.where(m_pixel[None, :], b_grad_logit, 0.0)",
            "tl.where(m_counted[None, :], b_grad_logit, 0.0)",
        ),
        Fault(
            "triton: weights of ignored pixels count",
            "tl.where(m_counted, b_weight, 0.0)",
            "tl.where(m_p, b_weight, 0.0)",
        ),
        Fault(
            "triton: strided log-sum-exp as if contiguous",
            "log_sum_exp.contiguous(),",
            "log_sum_exp,",
        ),
    ],
}


def check_texts() -> None:
    """Raises AssertionError unless every fault can be put into its file in one way."""
    for path, faults in FAULTS.items():
        text = (ROOT / path).read_text()
        for fault in faults:
            count = text.count(fault.sound)
            assert count == 1, f"{fault.name}: {fault.sound!r} is {count} times in {path}, not once"
            assert fault.sound != fault.faulty, fault.name
