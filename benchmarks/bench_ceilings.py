"""Measure the rates that a machine reaches: matrix products, a copy and, on a GPU, L2 reads.

They put the times of the other benchmarks into proportion. GFLOP / ms is the rate in TFLOP/s,
MB / ms the rate in GB/s.
"""

from __future__ import annotations

import torch
from common import harness

# Largest harness.relative_error against fp32.
TOLERANCE = {"fp32": 1e-5, "tf32": 5e-3, "fp16": 5e-3, "bf16": 2e-2}
L2_PASSES = 32  # enough to make the first pass, from DRAM, and the launch negligible


def main(argv: list[str] | None = None) -> None:
    args = harness.arguments(__doc__, argv, gpu_dtypes=("bf16", "fp16", "tf32", "fp32"))
    report = harness.Report("ceilings", args)
    for dtype in args.dtype:
        matrix_product(report, dtype)
    copy(report)
    if args.device.type == "cuda":
        l2_reads(report)
    report.finish()


def matrix_product(report: harness.Report, dtype: str) -> None:
    size = (8192 if report.device.type == "cuda" else 2048) >> 3 * report.args.tiny
    a, b = (torch.randn(size, size, device=report.device) for _ in range(2))
    a, b = a.to(harness.DTYPES[dtype]), b.to(harness.DTYPES[dtype])
    report.case(
        f"matrix product {size}^3",
        batch=1,
        dtype=dtype,
        reference=lambda: a.float() @ b.float(),
        ours={},
        baselines={"PyTorch": lambda: a @ b},
        tolerance=TOLERANCE[dtype],
        flops=2 * size**3,
    )


def copy(report: harness.Report) -> None:
    mebibytes = (1024 if report.device.type == "cuda" else 256) >> 8 * report.args.tiny
    source = torch.randn(max(1, mebibytes) << 18, device=report.device)
    target = torch.empty_like(source)
    report.case(
        f"copy of {max(1, mebibytes)} MiB",
        batch=1,
        dtype="fp32",
        reference=source.clone,
        ours={},
        baselines={"PyTorch": lambda: target.copy_(source)},
        error=harness.wrong_fraction,
        tolerance=0,
        bytes=2 * source.nbytes,
    )


def l2_reads(report: harness.Report) -> None:
    """Read a quarter of the L2 cache: it may hold two copies of a line, one per half of the SMs."""
    from common import l2_read  # needs Triton

    properties = torch.cuda.get_device_properties(report.device)
    num_programs = 4 * properties.multi_processor_count
    size = l2_read.buffer_size(properties.L2_cache_size // 4, num_programs)
    buffer = torch.randint(1 << 16, (size,), dtype=torch.int32, device=report.device)
    report.case(
        f"L2 reads of {buffer.nbytes / 2**20:.1f} MiB",
        batch=1,
        dtype="fp32",
        reference=lambda: L2_PASSES * buffer.sum(),
        ours={},
        baselines={"Triton": lambda: l2_read.l2_read(buffer, L2_PASSES, num_programs)},
        error=lambda sums, expected: float(sums.sum(dtype=torch.int32) != expected.int()),
        tolerance=0,
        bytes=L2_PASSES * buffer.nbytes,
    )


if __name__ == "__main__":
    main()
