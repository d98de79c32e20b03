"""Faults to put into the kernels, for mutate.py. The tests must catch every one."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

ARGMAX = "tests/test_upsample_argmax.py emulated"
CONV = (
    "tests/test_convolution_kernel.py tests/test_dilated_conv2d.py convolution_kernel or emulated_"
)
SM90 = "tests/test_dilated_conv2d_sm90.py seeds_agree or pipeline or epilogue"
ASPP = "tests/test_aspp.py tests/test_prepared_kernels.py prepared_kernels or emulated"
DEPTHWISE = "tests/test_dilated_conv2d.py tests/test_fused_conv2d.py emulated and depthwise"
ENTROPY = "tests/test_upsample_cross_entropy.py emulated and not (compile or export or opcheck)"
WGRAD = "tests/test_dilated_conv2d_backward.py"
WGRAD_SM90 = "tests/test_dilated_conv2d_wgrad_sm90.py not compiler"
ZONES = "tests/test_zones.py"


class Fault(NamedTuple):
    path: str
    name: str
    sound: str  # occurs once in the file
    faulty: str
    tests: str  # files, and what -k selects in them
    module: str = "_emulated"  # the one to compile; the work lists are made by _C


def checked(fault: Fault) -> Fault:
    count = (ROOT / fault.path).read_text().count(fault.sound)
    assert count == 1, f"{fault.name}: {fault.sound!r} is {count} times in {fault.path}, not once"
    assert fault.sound != fault.faulty, fault.name
    return fault


def of_bilinear(name: str, sound: str, faulty: str) -> Fault:
    return Fault("csrc/common/bilinear.h", name, sound, faulty, ARGMAX)


def of_cells(name: str, sound: str, faulty: str) -> Fault:
    return Fault("csrc/cuda/cells.cuh", name, sound, faulty, ARGMAX)


def of_argmax(name: str, sound: str, faulty: str) -> Fault:
    return Fault("csrc/cuda/upsample_argmax.cu", name, sound, faulty, ARGMAX)


def of_gemm(name: str, sound: str, faulty: str) -> Fault:
    return Fault("csrc/cuda/implicit_gemm.cuh", name, sound, faulty, CONV)


def of_conv(name: str, sound: str, faulty: str) -> Fault:
    return Fault("csrc/cuda/dilated_conv2d.cu", name, sound, faulty, CONV)


def of_epilogue(name: str, sound: str, faulty: str) -> Fault:
    return Fault("csrc/cuda/conv_epilogue.cuh", name, sound, faulty, CONV)


def of_sm90(name: str, sound: str, faulty: str) -> Fault:
    return Fault("csrc/cuda/dilated_conv2d_sm90.cu", name, sound, faulty, SM90)


def of_aspp(name: str, sound: str, faulty: str) -> Fault:
    return Fault("csrc/cuda/aspp.cu", name, sound, faulty, ASPP)


def of_depthwise(name: str, sound: str, faulty: str) -> Fault:
    return Fault("csrc/cuda/depthwise_conv2d.cu", name, sound, faulty, DEPTHWISE)


def of_depthwise_shared(name: str, sound: str, faulty: str) -> Fault:
    return Fault("csrc/cuda/depthwise.cuh", name, sound, faulty, DEPTHWISE)


def of_depthwise_wgrad(name: str, sound: str, faulty: str) -> Fault:
    return Fault("csrc/cuda/depthwise_conv2d_wgrad.cu", name, sound, faulty, DEPTHWISE)


def of_entropy(name: str, sound: str, faulty: str) -> Fault:
    return Fault("csrc/cuda/upsample_cross_entropy.cu", name, sound, faulty, ENTROPY)


def of_wgrad(name: str, sound: str, faulty: str) -> Fault:
    return Fault("csrc/cuda/dilated_conv2d_wgrad.cu", name, sound, faulty, WGRAD)


def of_wgrad_sm90(name: str, sound: str, faulty: str) -> Fault:
    return Fault("csrc/cuda/dilated_conv2d_wgrad_sm90.cu", name, sound, faulty, WGRAD_SM90)


def of_wgrad_reduce(name: str, sound: str, faulty: str) -> Fault:
    return Fault("csrc/cuda/wgrad_reduce.cuh", name, sound, faulty, WGRAD_SM90)


def of_zones(name: str, sound: str, faulty: str) -> Fault:
    return Fault("csrc/common/zones.h", name, sound, faulty, ZONES, "_C")


FAULTS = [
    of_bilinear("ties to the highest class", "value > best ||", "value >= best ||"),
    of_bilinear("the last NaN wins", "(value != value && best == best)", "(value != value)"),
    of_bilinear(
        "no margin for rounding",
        "return x - fma_rn(0x1p-18f, x < 0.0f ? -x : x, 0x1p-118f);",
        "return x;",
    ),
    of_bilinear("no margin for denormals", "0x1p-118f);", "0.0f);"),
    of_bilinear("source index not clamped at 0", "src = src < 0.0f ? 0.0f : src;", ""),
    of_bilinear("source index not clamped at the end", "if (pair.lo > size - 1)", "if (false)"),
    of_bilinear(
        "another order of operations",
        "return fma_rn(a, w0, mul_rn(b, w1));",
        "return fma_rn(b, w1, mul_rn(a, w0));",
    ),
    of_bilinear(
        "pixel centres off by half", "static_cast<float>(dst) + 0.5f", "static_cast<float>(dst)"
    ),
    of_cells("first pixel of a cell off by one", "begin[mine] = i;", "begin[mine] = i + 1;"),
    of_cells("weights swapped", "make_float2(pair.w0, pair.w1)", "make_float2(pair.w1, pair.w0)"),
    of_cells(
        "last cell of a tile one pixel short",
        "begin[mine + 1] = count = n;",
        "begin[mine + 1] = n - 1;\n      count = n;",
    ),
    of_cells(
        "past the last row",
        "y + 1 < shape.H ? shape.stride_H : 0",
        "shape.stride_H",
    ),
    of_cells(
        "past the last column",
        "x + 1 < shape.W ? shape.stride_W : 0",
        "shape.stride_W",
    ),
    of_argmax("infinity counts as finite", "finite &= fabsf(value) < 0x1p126f;", ""),
    of_argmax(
        "ties between lanes not seen",
        "second = fmaxf(fmaxf(second, other_second), fminf(best, other));",
        "second = fmaxf(second, other_second);",
    ),
    of_argmax("second best forgotten", "second = fmaxf(second, fminf(value, best));", ""),
    of_argmax(
        "every winner is safe",
        "return second <= losing_bound(best) ? winner : kUnsure - winner;",
        "return winner;",
    ),
    of_argmax("no wait for the bounds", "__syncwarp();\n  int count = 0;", "int count = 0;"),
    of_argmax("no wait for the list", "__syncwarp();\n  return count;", "return count;"),
    of_argmax(
        "one corner's bound is enough",
        "x.x > bound.x || x.y > bound.y || x.z > bound.z || x.w > bound.w",
        "x.x > bound.x || x.y > bound.y || x.z > bound.z",
    ),
    of_argmax(
        "one more candidate than fits",
        "if (count <= kMaxCandidates) {",
        "if (count <= kMaxCandidates + 1) {",
    ),
    of_argmax("lower corners not looked at", "(i + lane / 2 % 2) * (tile", "i * (tile"),
    of_argmax("rows below the cell written", "if (y + r * kCellLanesH < y_end) tile", "tile"),
    of_argmax("bytes of a vector overlap", "<< byte % 4 * 8;", "<< byte % 4 * 4;"),
    of_argmax(
        "a cell inside a vector skipped",
        "for (int c = first_cell; c < last_cell; ++c)",
        "for (int c = first_cell + 1; c < last_cell; ++c)",
    ),
    of_argmax("a vector of one pixel's label", "tile.label[y][x + e];", "tile.label[y][x];"),
    of_argmax("columns past the tile stored", "if (x >= tile.cols.count) return;", ""),
    of_argmax("no barrier before the ranks", "__syncthreads();\n\n  // Ranks", "\n  // Ranks"),
    of_argmax("no barrier after the ranks", "__syncthreads();\n\n  // Labels", "\n  // Labels"),
    of_argmax(
        "no barrier before contested cells",
        "__syncthreads();\n\n  for (int i = warp;",
        "\n  for (int i = warp;",
    ),
    of_argmax(
        "no barrier before the stores",
        "__syncthreads();\n\n  constexpr int kVector",
        "\n  constexpr int kVector",
    ),
    of_argmax(
        "three corners agree",
        "&& below[0] == rank[0] && below[1] == rank[0];",
        "&& below[0] == rank[0];",
    ),
    of_argmax("unsure winners agree", "rank[0] >= 0 && rank[1]", "rank[1]"),
    of_argmax(
        "images over one another",
        "labels += (blockIdx.z * shape.out_H + y)",
        "labels += y",
    ),
    of_argmax(
        "lanes leave before a shuffle",
        "i - lane < pixels * kLanesPerPixel",
        "i < pixels * kLanesPerPixel",
    ),
    of_argmax("stale contested count", "if (threadIdx.x == 0) tile.num_contested = 0;", ""),
    of_zones("zone edge off by one", "d < 0 ? -d : size - d", "d < 0 ? -d : size - d - 1"),
    of_zones("zone edge of negative taps off by one", "d < 0 ? -d :", "d < 0 ? 1 - d :"),
    of_zones("input gradient with the forward's signs", "mirrored ? -forward : forward", "forward"),
    of_zones(
        "rates swapped",
        "offset(r, kernel_H, dilation_H, H), offset(s, kernel_W, dilation_W, W)",
        "offset(r, kernel_H, dilation_W, H), offset(s, kernel_W, dilation_H, W)",
    ),
    of_zones("tap index by columns", "r * kernel_W + s}", "r * kernel_H + s}"),
    of_zones("a tile's taps not united", "open[i] |= zone.taps[i];", "open[i] = zone.taps[i];"),
    of_zones("last partial tile lost", "if (fill > 0) emit(", "if (false) emit("),
    of_zones(
        "a piece of a split sum skipped",
        "for (int64_t p = 0; p < pieces; ++p)",
        "for (int64_t p = 1; p < pieces; ++p)",
    ),
    of_zones(
        "a slot of a split sum not added",
        "first_slot, static_cast<int32_t>(pieces)}",
        "first_slot, static_cast<int32_t>(pieces - 1)}",
    ),
    of_zones("pieces overlap", "begin = steps * p / pieces", "begin = steps * p / (pieces + 1)"),
    of_zones(
        "shortest items first",
        "return a.num_steps > b.num_steps;",
        "return a.num_steps < b.num_steps;",
    ),
    of_zones("rectangle on the wrong side", "std::max(0, -tap.dy)", "std::max(0, tap.dy)"),
    of_zones("pixels of another image", "(n * H + y) * W + x);", "(n * W + y) * W + x);"),
    of_zones(
        "far taps not clipped",
        "std::clamp<int64_t>(mirrored ? -forward : forward, -size, size)",
        "mirrored ? -forward : forward",
    ),
    of_zones("rows backwards", "if (i % 2 == 1) std::reverse", "if (i % 2 == 2) std::reverse"),
    Fault(
        "csrc/common/zones.h",
        "the row below the map is inside",
        "static_cast<uint32_t>(tap.dy) < static_cast<uint32_t>(H)",
        "static_cast<uint32_t>(tap.dy) <= static_cast<uint32_t>(H)",
        CONV,
    ),
    of_gemm(
        "tap sign of rows",
        "(static_cast<int64_t>(tap.dy) * shape.W + tap.dx)",
        "(-static_cast<int64_t>(tap.dy) * shape.W + tap.dx)",
    ),
    of_gemm(
        "tap sign of columns",
        "* shape.W + tap.dx) * shape.in_channels",
        "* shape.W - tap.dx) * shape.in_channels",
    ),
    of_gemm(
        "weights of the tap before",
        "static_cast<int64_t>(tap.index) * source.C",
        "static_cast<int64_t>(tap.index - 1) * source.C",
    ),
    of_gemm(
        "padding not zero-filled",
        "const bool has_input = has_channels && is_inside(tap, y[i], x[i], shape.H, shape.W);",
        "const bool has_input = has_channels && y[i] >= 0;",
    ),
    of_gemm(
        "channels past the last copied",
        "const bool has_channels = next_c + chunk * kChunk<T> < source.C;",
        "const bool has_channels = true;",
    ),
    of_gemm(
        "rows and columns of a pixel swapped", "x[i] = pixel % shape.W;", "x[i] = pixel % shape.H;"
    ),
    of_gemm(
        "image of a pixel not left out",
        "pixel / shape.W % shape.H : INT_MIN",
        "pixel / shape.W : INT_MIN",
    ),
    of_gemm(
        "a split sum starts at its first tap",
        "int next_tap = item.first_step % tile.num_taps;",
        "int next_tap = 0;",
    ),
    of_gemm(
        "a split sum starts at its first channel",
        "int next_c = item.first_step / tile.num_taps * kBlockK<T>;",
        "int next_c = 0;",
    ),
    of_gemm("channels do not advance", "next_c += kBlockK<T>;", ""),
    of_gemm(
        "waits for a stage too few",
        "ptx::cp_async_wait_group<kStages - 2>();",
        "ptx::cp_async_wait_group<kStages - 1>();",
    ),
    of_gemm("no wait for copies", "ptx::cp_async_wait_group<kStages - 2>();", ""),
    of_gemm(
        "no barrier between steps",
        "__syncthreads();  // the stage is here, and all are done with the one before",
        "",
    ),
    of_gemm("no barrier before the sums", "__syncthreads();  // all are done with the stages", ""),
    of_gemm("no barrier after the sums", "__syncthreads();\n  return sums;", "return sums;"),
    of_gemm(
        "refills the stage in use",
        "copy_next_step(ahead % kStages);",
        "copy_next_step(step % kStages);",
    ),
    of_gemm(
        "no group for a step without copies",
        "copy_next_step(ahead % kStages);\n    ptx::cp_async_commit_group();",
        "{\n copy_next_step(ahead % kStages);\n ptx::cp_async_commit_group();\n }",
    ),
    of_gemm(
        "prologue one step short",
        "for (int step = 0; step < kStages - 1; ++step) {",
        "for (int step = 1; step < kStages - 1; ++step) {",
    ),
    of_gemm(
        "the last step missing",
        "for (int step = 0; step < item.num_steps; ++step) {",
        "for (int step = 0; step + 1 < item.num_steps; ++step) {",
    ),
    of_gemm(
        "chunks of reader and writer differ",
        "input_at[k] = swizzled<T>(warp_row + lane % 16, 2 * k + lane / 16);",
        "input_at[k] = swizzled<T>(warp_row + lane % 16, 2 * k + 1 - lane / 16);",
    ),
    of_gemm(
        "matrices of b swapped",
        "b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]",
        "b[j / 2][j % 2 * 2 + 1], b[j / 2][j % 2 * 2]",
    ),
    of_gemm(
        "tf32 cut off instead of rounded",
        "for (uint32_t& bits : r) bits = ptx::cvt_rna_tf32(__uint_as_float(bits));",
        "",
    ),
    of_gemm(
        "a warp idles early",
        "const bool has_work = warp_row < tile.num_pixels &&",
        "const bool has_work = warp_row + 1 < tile.num_pixels &&",
    ),
    of_epilogue("bias not added", "value[i] += bias[i] + residual[i];", "value[i] += residual[i];"),
    of_epilogue("residual not added", "value[i] += bias[i] + residual[i];", "value[i] += bias[i];"),
    of_epilogue(
        "bias of the first image for all",
        "int64_t{pixel / (shape.H * shape.W)} * output.K + k",
        "k",
    ),
    Fault(
        "csrc/cuda/conv_epilogue.cuh",
        "bias of an image left out of the gradient",
        "if (image_bias != nullptr && i < count) value[i] += image_bias[i];",
        "",
        "tests/test_dilated_conv2d_and_mean.py emulated",
    ),
    of_epilogue(
        "NaN becomes the bound",
        "if (value[i] < terms.low) value[i] = terms.low;",
        "if (!(value[i] >= terms.low)) value[i] = terms.low;",
    ),
    of_epilogue("no upper bound", "if (value[i] > terms.high) value[i] = terms.high;", ""),
    of_epilogue(
        "vectors at odd channels",
        "count == 4 && (shape.out_channels | output.first_channel) % 4 == 0",
        "count == 4",
    ),
    of_epilogue(
        "channels past the branch's last written",
        "if (i < count) round_to(p[i], value[i]);",
        "round_to(p[i], value[i]);",
    ),
    of_epilogue(
        "first channel of a branch forgotten",
        "* shape.out_channels + output.first_channel + k",
        "* shape.out_channels + k",
    ),
    of_conv("a partial sum stored as if whole", "if (item.slot >= 0) {", "if (item.slot > 0) {"),
    of_epilogue(
        "a piece left out of the reduction",
        "for (int i = 0; i < reduction.num_slots; ++i) {",
        "for (int i = 1; i < reduction.num_slots; ++i) {",
    ),
    of_epilogue(
        "bias not added to split sums",
        "  epilogue.finish(pixel, sum);\n  epilogue.write(pixel, sum);",
        "  epilogue.write(pixel, sum);",
    ),
    of_epilogue(
        "reduction of the rows above",
        "const int row = blockIdx.x % kBlocks * kRows + threadIdx.x / kRowThreads;",
        "const int row = blockIdx.x % kBlocks * kRows;",
    ),
    of_epilogue(
        "no split reduced",
        "if (work.num_reductions == 0) return {};",
        "return {};",
    ),
    of_sm90("no fence between the proxies", "    ptx::fence_proxy_async();\n", ""),
    of_sm90(
        "fence before the copies are waited for",
        "        ptx::cp_async_wait_group<kLag>();\n        announce();",
        "        announce();\n        ptx::cp_async_wait_group<kLag>();",
    ),
    of_sm90(
        "one group of copies not waited for",
        "ptx::cp_async_wait_group<kLag>();",
        "ptx::cp_async_wait_group<kLag + 1>();",
    ),
    of_sm90(
        "a stage filled while it is read",
        "      wait(&barriers.empty[place.stage], place.parity ^ 1);\n",
        "",
    ),
    of_sm90(
        "a stage is empty when its own block has read it",
        "kBlocks * kConsumers * 4);",
        "kConsumers * 4);",
    ),
    of_sm90(
        "a stage released while products read it",
        "if (previous >= 0) release(previous);\n      previous",
        "release(place.stage);\n      previous",
    ),
    of_sm90(
        "a stage released a product too early",
        "ptx::wgmma_wait_group<1>();",
        "ptx::wgmma_wait_group<2>();",
    ),
    of_sm90(
        "sums stored before they are there",
        "    ptx::wgmma_wait_group<0>();\n",
        "",
    ),
    of_sm90(
        "a block leaves before the other",
        "    ptx::cluster_arrive();  // the other block may still have something for this one\n"
        "    ptx::cluster_wait();\n",
        "",
    ),
    of_sm90(
        "barriers of the other block used before they are there",
        "    ptx::cluster_arrive();\n    ptx::cluster_wait();\n    const int worker",
        "    __syncthreads();\n    const int worker",
    ),
    of_sm90("barriers not shown to copies", "      ptx::fence_mbarrier_init();\n", ""),
    of_sm90("pixels not swizzled", "(chunk ^ first_row % 8) * 16", "chunk * 16"),
    of_sm90("weights for one block only", "(1 << kBlocks) - 1);", "1 << rank);"),
    of_sm90(
        "staged sums read too early",
        "    __syncwarp();\n#pragma unroll 2",
        "#pragma unroll 2",
    ),
    of_sm90(
        "staged sums overwritten too early",
        "    __syncwarp();  // what was staged before has been read\n",
        "",
    ),
    of_sm90("last stages not announced", "  while (under_way > 0) announce();\n", ""),
    of_aspp(
        "the last run of pixels is short",
        "const int64_t end = (i_run + 1) * shape.num_pixels / shape.num_runs;",
        "const int64_t end = (i_run + 1) * (shape.num_pixels - 1) / shape.num_runs;",
    ),
    of_aspp(
        "one warp's sum missing",
        "for (int w = 0; w < kWarps; ++w) total",
        "for (int w = 1; w < kWarps; ++w) total",
    ),
    of_aspp(
        "no barrier before warps are added",
        "__syncthreads();\n  const int c = threadIdx.x;",
        "const int c = threadIdx.x;",
    ),
    of_aspp(
        "no barrier before the vector is read",
        "__syncthreads();\n\n  constexpr int kSize",
        "constexpr int kSize",
    ),
    of_aspp("mean without its divisor", "vector[c] = sum * scale;", "vector[c] = sum;"),
    of_aspp(
        "only the first run",
        "for (int run = 0; run < num_runs; ++run) sum",
        "for (int run = 0; run < 1; ++run) sum",
    ),
    of_aspp("half a warp's sums", "for (int distance = 16;", "for (int distance = 8;"),
    of_aspp("linear without bias", "sum += to_float(bias[k]);", ""),
    of_aspp("pooled branch without ReLU", "relu && sum < 0.0f ? 0.0f : sum;", "sum;"),
    of_depthwise(
        "pixels left of the map",
        "has_column[s] = x >= 0 && x < shape.W;",
        "has_column[s] = x < shape.W;",
    ),
    of_depthwise(
        "pixels right of the map",
        "has_column[s] = x >= 0 && x < shape.W;",
        "has_column[s] = x >= 0;",
    ),
    of_depthwise(
        "rows below the map",
        "const bool has_next = j + 1 < rows && y >= 0 && y < shape.H;",
        "const bool has_next = j + 1 < rows && y >= 0;",
    ),
    of_depthwise(
        "weights transposed",
        "taps[at % kTaps][at / kTaps] = part[j];",
        "taps[at / kVector][at % kVector] = part[j];",
    ),
    of_depthwise(
        "columns not mirrored",
        "const int step_W = shape.mirrored ? -shape.rate_W : shape.rate_W;",
        "const int step_W = shape.rate_W;",
    ),
    of_depthwise(
        "rates swapped",
        "const int step_W = shape.mirrored ? -shape.rate_W : shape.rate_W;",
        "const int step_W = shape.mirrored ? -shape.rate_H : shape.rate_H;",
    ),
    of_depthwise(
        "sums start without bias",
        "for (int e = 0; e < kVector; ++e) sum[0][e] = start[e];",
        "for (int e = 0; e < kVector; ++e) sum[0][e] = 0.0f;",
    ),
    of_depthwise("output a row off", "at - (kR / 2 + 1) * stride", "at - kR / 2 * stride"),
    of_depthwise(
        "no barrier before the weights",
        "  __syncthreads();\n\n  const int vector",
        "  const int vector",
    ),
    of_depthwise("residual not added", "value[e] += residual[e];", ";"),
    of_depthwise_shared(
        "a residue has one pixel too few",
        "const int in_longer = num_longer * (shorter + 1);",
        "const int in_longer = num_longer * shorter;",
    ),
    of_depthwise_shared(
        "strips overlap",
        "min(begin + shape.strip_rows, shape.H)}",
        "min(begin + shape.strip_rows - 1, shape.H)}",
    ),
    of_depthwise_wgrad(
        "no barrier before the sums", "__syncthreads();\n  const int num_taps", "const int num_taps"
    ),
    of_depthwise_wgrad(
        "one column not added",
        "for (int column = 0; column < split.columns; ++column) total",
        "for (int column = 1; column < split.columns; ++column) total",
    ),
    of_depthwise_wgrad(
        "one part not added",
        "for (int part = 0; part < num_parts; ++part) sum",
        "for (int part = 1; part < num_parts; ++part) sum",
    ),
    of_depthwise_wgrad(
        "taps by channel", "grad_weight + c * num_taps + tap", "grad_weight + tap * C + c"
    ),
    of_depthwise_wgrad(
        "zeros around a run multiplied",
        "add_products([&](int i) { return i <= j && j - i < run.count; });",
        "add_products([](int) { return true; });",
    ),
    of_entropy(
        "first row of a cell off",
        "cell_of(middle, size, scale, align_corners) >= cell",
        "cell_of(middle, size, scale, align_corners) > cell",
    ),
    of_entropy(
        "clamped pixels in the first cell",
        "pair.lo == 0 && pair.w1 == 0.0f ? 0 : pair.lo + 1",
        "pair.lo + 1",
    ),
    of_entropy(
        "one maximum for both rows",
        "maxima[i] = make_float2(top.x, bottom.x);",
        "maxima[i] = make_float2(top.x, top.x);",
    ),
    of_entropy(
        "wild blocks not seen", "if (!(fminf(top.y, bottom.y) >= kTame)) atomicMax(&wild, 1);", ""
    ),
    of_entropy(
        "no barrier after the maxima",
        "atomicMax(&wild, 1);\n    }\n    __syncthreads();",
        "atomicMax(&wild, 1);\n    }",
    ),
    of_entropy(
        "rows replaced while read", "__syncthreads();  // the rows before are no longer read", ""
    ),
    of_entropy(
        "classes replaced while read",
        "__syncthreads();  // the classes before are no longer read",
        "",
    ),
    of_entropy("exponentials not stepped", "e = mul_rn(e, ratio);", ""),
    of_entropy("ignored pixels count", "if (target == terms.ignore_index) return kIgnored;", ""),
    of_entropy(
        "a target past the last class",
        "target < 0 || target >= C ? kBad",
        "target < 0 || target > C ? kBad",
    ),
    of_entropy(
        "no smoothing term",
        "loss = (target_part * weight * hit + smooth_part * smooth) * kLn2;",
        "loss = target_part * weight * hit * kLn2;",
    ),
    of_entropy(
        "idle threads add their loss", "if (active) {\n        sums.loss", "{\n        sums.loss"
    ),
    of_entropy("rows past the cell stored", "if (active && r < num_rows) {", "if (active) {"),
    of_entropy(
        "no barrier before warps are added",
        "if (threadIdx.x % 32 == 0) tile.warps[threadIdx.x / 32] = sums;\n  __syncthreads();",
        "if (threadIdx.x % 32 == 0) tile.warps[threadIdx.x / 32] = sums;",
    ),
    of_entropy(
        "mean over all pixels' weights", "mean ? sums.loss / sums.weight : sums.loss", "sums.loss"
    ),
    of_wgrad(
        "sign of the tap",
        "const int tap_offset = tap.dy * shape.W + tap.dx;",
        "const int tap_offset = -tap.dy * shape.W - tap.dx;",
    ),
    of_wgrad(
        "pixels past the rectangle",
        "const bool has_pixel = i * kCopyRows < pixels_left;",
        "const bool has_pixel = true;",
    ),
    of_wgrad_sm90(
        "the gradient one row off",
        "{first_k + chunk * kChunk, x, y, n}",
        "{first_k + chunk * kChunk, x, y + 1, n}",
    ),
    of_wgrad_sm90("sign of the tap", "x + tap.dx, y + tap.dy, n}", "x - tap.dx, y - tap.dy, n}"),
    of_wgrad_sm90(
        "no wait for a full stage", "wait(&barriers.full[place.stage], place.parity);", ""
    ),
    of_wgrad_sm90(
        "no wait for an empty stage", "wait(&barriers.empty[place.stage], place.parity ^ 1);", ""
    ),
    of_wgrad_sm90(
        "a stage is free without the other block",
        "kBlocks * kConsumers * 4);",
        "kConsumers * 4);",
    ),
    of_wgrad_sm90("barriers not shown to copies", "ptx::fence_mbarrier_init();", ""),
    of_wgrad_sm90("no fence before products", "ptx::wgmma_fence();", ""),
    of_wgrad_sm90("sums read too early", "ptx::wgmma_wait_group<0>();", ""),
    of_wgrad_sm90(
        "a stage freed while read",
        "ptx::wgmma_wait_group<1>();\n      if (previous >= 0) release(previous);",
        "if (previous >= 0) release(previous);\n      ptx::wgmma_wait_group<1>();",
    ),
    of_wgrad_sm90(
        "offsets of the descriptor exchanged", "1024, kChunkBytes);", "kChunkBytes, 1024);"
    ),
    of_wgrad_sm90(
        "gradient not transposed",
        "ptx::wgmma_m64k16<T, kBlockN, true, true>",
        "ptx::wgmma_m64k16<T, kBlockN, false, true>",
    ),
    of_wgrad_sm90(
        "input not transposed",
        "ptx::wgmma_m64k16<T, kBlockN, true, true>",
        "ptx::wgmma_m64k16<T, kBlockN, true, false>",
    ),
    of_wgrad_sm90("next pixels as in rows of k", "kNext = 16 * kRowBytes / 16;", "kNext = 2;"),
    of_wgrad_sm90("one image at a time", "n += work.box_n;", "n += 1;"),
    of_wgrad_sm90("rows too far apart", "row * work.box_y, x =", "row * work.box_x, x ="),
    of_wgrad_sm90("a piece starts half as far in", "item.first_step * kBoxes;", "item.first_step;"),
    of_wgrad_sm90("channels of the first branch", "branches.of[tap.branch].first_channel", "0"),
    of_wgrad_sm90(
        "both blocks store the same", "* kConvTileSm90 + rank * kBlockM;", "* kConvTileSm90;"
    ),
    of_wgrad_sm90(
        "both blocks bring the same half",
        "const int first_chunk = rank * (kChunksN / kBlocks);",
        "const int first_chunk = 0;",
    ),
    of_wgrad_sm90("rows of the next branch stored", "if (k >= branch.K) continue;", ""),
    of_wgrad_sm90(
        "a block leaves while the other needs it",
        "    ptx::cluster_arrive();  // the other block may still have something for this one\n"
        "    ptx::cluster_wait();\n",
        "",
    ),
    of_wgrad_reduce(
        "one piece not added", "i < reduction.num_slots; ++i", "i + 1 < reduction.num_slots; ++i"
    ),
]
