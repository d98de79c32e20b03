"""Faults to put into the kernels, for mutate.py. The tests must catch every one."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

ARGMAX = "tests/test_upsample_argmax.py emulated"
CONV = "tests/test_dilated_conv2d.py emulated"
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
    of_zones("far taps not clipped", "std::clamp<int64_t>(mirrored", "std::max<int64_t>(mirrored"),
    of_zones("rows backwards", "if (i % 2 == 1) std::reverse", "if (i % 2 == 2) std::reverse"),
    Fault(
        "csrc/common/zones.h",
        "the row below the map is inside",
        "static_cast<uint32_t>(tap.dy) < static_cast<uint32_t>(H)",
        "static_cast<uint32_t>(tap.dy) <= static_cast<uint32_t>(H)",
        CONV,
    ),
]
