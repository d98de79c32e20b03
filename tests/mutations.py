"""Faults to put into the kernels and the package, for mutate.py. The tests must catch every one."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Guard(NamedTuple):
    """Of a source: the tests that must notice."""

    tests: str  # files, and what -k selects in them
    module: str = "_emulated"  # the one to compile, for csrc; the work lists are made by _C


ARGMAX = Guard("tests/test_upsample_argmax.py emulated")
ASPP = Guard("tests/test_aspp.py tests/test_prepared_kernels.py prepared_kernels or emulated")
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
MEASURED = Guard("tests/test_measured.py")
MEAN = Guard("tests/test_dilated_conv2d_and_mean.py emulated")
WGRAD_SM90 = Guard("tests/test_dilated_conv2d_wgrad_sm90.py not compiler")

GUARDS = {
    "csrc/common/bilinear.h": ARGMAX,
    "csrc/common/zones.h": Guard("tests/test_zones.py", "_C"),
    "csrc/cpu/exp2_log2.h": ENTROPY_CPU,
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
    "csrc/cuda/implicit_gemm.cuh": CONV,
    "csrc/cuda/pixel_means.cu": ASPP,
    "csrc/cuda/tensor_map.cuh": Guard("tests/test_dilated_conv2d_sm90.py same_address"),
    "csrc/cuda/upsample_argmax.cu": ARGMAX,
    "csrc/cuda/upsample_cross_entropy.cu": ENTROPY,
    "csrc/cuda/upsample_cross_entropy.cuh": ENTROPY,
    "csrc/cuda/upsample_cross_entropy_bwd.cu": ENTROPY,
    "csrc/cuda/upsample_cross_entropy_prepare.cu": ENTROPY,
    "csrc/cuda/wgrad_reduce.cuh": WGRAD_SM90,
    "deeplab_fast/cuda_kernels/upsample_cross_entropy.py": ENTROPY,
    "deeplab_fast/measured.py": MEASURED,
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
    ],
    "csrc/cuda/tensor_map.cuh": [
        Fault(
            "the description of a smaller weight at the same address",
            "  std::copy_n(dims, kRank, key.begin() + kRank);\n",
            "",
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
    ],
    "csrc/cuda/dilated_conv2d.cu": [
        Fault("a partial sum stored as if whole", "if (item.slot >= 0) {", "if (item.slot > 0) {"),
    ],
    # Staged sums read too early are seen by ThreadSanitizer alone: lanes happen to wait for each
    # other in the shuffle that follows.
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
    ],
    "csrc/cpu/exp2_log2.h": [
        Fault("2^x: a coefficient off", "0x1.5f7276p-10f", "0x1.4f7276p-10f"),
        Fault("log2: a coefficient off", "0x1.ec70e6p-1f", "0x1.ec9000p-1f"),
    ],
    "csrc/cpu/upsample_cross_entropy.cpp": [
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
