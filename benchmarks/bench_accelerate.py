"""Benchmark deeplab_fast.accelerate on models of torchvision, smp and transformers.

Each model has two cases: from images to labels, and one training step: forward, loss and backward,
without an optimizer. Variants:

* the original, eager, in both memory formats;
* "again": a copy of the faster of these. Its time relative to that one shows the noise;
* accelerate(model, inference=True).predict, or the accelerated model in deferred_upsampling with
  UpsampleCrossEntropyLoss;
* with --full, torch.compile of the original and of the accelerated model.

A ratio is the median, over the rounds, of a variant's time relative to that of the original's
better memory format in the same round. The goal is a ratio of at most 1.02 plus the noise. From
images to labels a DeepLab must reach 1 / 1.05, and the time of the compiled original plus the
noise.

With --full the images have 512x512 pixels instead of 256x256, and all encoders of smp are measured.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from bench_model import TOLERANCE, regret
from common import harness, networks
from common.timing import Run, seconds, synchronized
from common.variants import compiled
from torch import Tensor, nn

import deeplab_fast
from deeplab_fast.nn import UpsampleCrossEntropyLoss

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
AGAIN = "again"  # suffix of the copy that shows the noise
COMPILED = ", compiled"

# Rounding changes the sign of some activations of deep networks with random weights, which changes
# whole gradients. So gradient_error() may be twice that between the memory formats of the original,
# plus FLOOR. A tolerance above LIMIT would detect nothing.
FLOOR, LIMIT = 1e-4, 0.2
LOSS_TOLERANCE = 1e-4

COLUMNS = ("ratio", "ratio_to_compiled", "noise_percent", "goal")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help="models whose names contain one of these texts"
    )
    parser.add_argument("--size", type=int, help="height and width; default: 256; 512 with --full")
    args = harness.arguments(__doc__, argv, gpu_dtypes=("fp32",), parents=[parser])
    size = args.size or (64 if args.tiny else 512 if args.full else 256)
    report = harness.Report("accelerate", args, COLUMNS)
    missing = set()
    for name in selected(parser, args):
        try:
            model = networks.network(name).to(report.device)
        except ImportError as error:
            missing.add(error.name)
            continue
        for dtype in args.dtype:
            for batch in args.batch:
                inference(report, name, size, dtype, batch, model)
                if harness.DTYPES[dtype] == torch.float32:  # half precision is for autocast
                    training(report, name, size, dtype, max(2, batch), model)
    for package in sorted(missing):
        print(f"{package} is not installed, so its models are left out")
    report.finish()


def selected(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    if args.only:
        names = [name for name in networks.BUILD if any(text in name for text in args.only)]
        if not names:
            parser.error(f"--only: expected a part of {', '.join(networks.BUILD)}, got {args.only}")
        return names
    return networks.TINY if args.tiny else list(networks.BUILD) if args.full else networks.DEFAULT


@torch.no_grad()
def inference(
    report: harness.Report, name: str, size: int, dtype: str, batch: int, model: nn.Module
) -> None:
    """A case from images to int64 labels of the same size."""
    kind = harness.DTYPES[dtype]
    images = torch.randn(batch, 3, size, size, device=report.device)
    model = copy.deepcopy(model).eval()

    def labels(model: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: networks.resized(networks.logits_of(model(x)), x.shape[2:]).argmax(1)

    def variant(memory_format: torch.memory_format, compile: bool = False) -> Run:
        network = copy.deepcopy(model).to(kind, memory_format=memory_format)
        x = images.to(kind, memory_format=memory_format)
        function = labels(network)
        if compile:
            function = compiled(function, report.device, fullgraph=False, freezing=True)
        return lambda: function(x)

    baselines, best = eager(variant, report)
    accelerated = deeplab_fast.accelerate(copy.deepcopy(model).to(kind), inference=True)
    x = images.to(kind, memory_format=torch.channels_last)
    ours: dict[str, Run] = {"accelerated": lambda: accelerated.predict(x)}
    if report.args.full:
        baselines["original" + COMPILED] = variant(FORMATS[best], compile=True)
        predict = compiled(accelerated.predict, report.device, fullgraph=False)
        ours["accelerated" + COMPILED] = lambda: predict(x)
    report.case(
        f"{name} {size}, labels",
        batch=batch,
        dtype=dtype,
        reference=lambda: networks.resized(networks.logits_of(model(images)), images.shape[2:]),
        ours=ours,
        baselines=baselines,
        error=regret,
        tolerance=TOLERANCE[dtype],
        flops=networks.flops(model, images),
        graphs=False,
        columns=lambda samples: verdict(samples, networks.is_deeplab(name)),
    )


@torch.enable_grad()
def training(
    report: harness.Report, name: str, size: int, dtype: str, batch: int, model: nn.Module
) -> None:
    """A case of a training step; outputs are the loss and all gradients."""
    images = torch.randn(batch, 3, size, size, device=report.device)
    target = torch.randint(networks.CLASSES, (batch, size, size), device=report.device)
    target[:, : size // 8] = 255
    plain, fused = (
        kind(ignore_index=255) for kind in (nn.CrossEntropyLoss, UpsampleCrossEntropyLoss)
    )

    def loss(network: nn.Module, x: Tensor) -> Tensor:
        return plain(networks.resized(networks.logits_of(network(x)), target.shape[1:]), target)

    def accelerated_loss(network: nn.Module, x: Tensor) -> Tensor:
        with deeplab_fast.deferred_upsampling():
            return fused(networks.logits_of(network(x)), target)

    def variant(
        memory_format: torch.memory_format, compile: bool = False, accelerate: bool = False
    ) -> Run:
        network = copy.deepcopy(model).to(memory_format=memory_format).train()
        if accelerate:
            network = deeplab_fast.accelerate(network)
        x = images.to(memory_format=memory_format)
        function: Callable[..., Tensor] = accelerated_loss if accelerate else loss
        if compile:
            function = compiled(function, report.device, fullgraph=False)
        return lambda: step(network, function, x)

    baselines, best = eager(variant, report)
    nchw, channels_last, _ = (run() for run in baselines.values())
    tolerance = min(LIMIT, 2 * gradient_error(channels_last, nchw) + FLOOR)
    ours = {"accelerated": variant(FORMATS[best], accelerate=True)}
    if report.args.full:
        baselines["original" + COMPILED] = variant(FORMATS[best], compile=True)
        ours["accelerated" + COMPILED] = variant(FORMATS[best], compile=True, accelerate=True)
    reference = copy.deepcopy(model).train()
    report.case(
        f"{name} {size}, training step",
        batch=batch,
        dtype=dtype,
        reference=lambda: step(reference, loss, images),
        ours=ours,
        baselines=baselines,
        error=gradient_error,
        tolerance=tolerance,
        flops=3 * networks.flops(model, images),
        graphs=False,
        columns=lambda samples: verdict(samples, False),
    )


def eager(variant: Callable[..., Run], report: harness.Report) -> tuple[dict[str, Run], str]:
    """The original in both memory formats, a copy of the faster one, and the latter's format."""
    runs = {name: variant(format) for name, format in FORMATS.items()}
    best = min(runs, key=lambda name: seconds(synchronized(runs[name], report.device)))
    baselines = {f"original {name}": run for name, run in runs.items()}
    baselines[f"original {best} {AGAIN}"] = variant(FORMATS[best])
    return baselines, best


def step(
    network: nn.Module, function: Callable[[nn.Module, Tensor], Tensor], x: Tensor
) -> list[Tensor]:
    """The loss and the gradients of all parameters that have one."""
    torch.manual_seed(0)  # stochastic depth of some encoders
    network.zero_grad(set_to_none=True)
    loss = function(network, x)
    loss.backward()
    grads = [p.grad for p in network.parameters() if p.grad is not None]
    return [loss.detach(), torch.cat([grad.flatten() for grad in grads])]


def gradient_error(output: list[Tensor], expected: list[Tensor]) -> float:
    """Relative error of the vector of all gradients, in the Euclidean norm; inf for a wrong loss.

    Errors of single elements say nothing: the gradient of a bias before a batch norm is rounding
    error.
    """
    if [x.shape for x in output] != [x.shape for x in expected]:
        return float("inf")
    loss, gradient = (((a - b).norm() / b.norm()).item() for a, b in zip(output, expected))
    return gradient if loss <= LOSS_TOLERANCE else float("inf")


def verdict(samples: dict[str, list[float]], must_gain: bool) -> dict[str, dict[str, Any]]:
    """The values of COLUMNS for each variant, from its seconds in each round."""
    eager = [f"original {name}" for name in FORMATS if f"original {name}" in samples]
    if not eager:
        return {}

    def ratio(variant: str, other: str) -> float:
        pairs = zip(samples[variant], samples[other])
        return statistics.median(time / other_time for time, other_time in pairs)

    best = min(eager, key=lambda name: statistics.median(samples[name]))
    noise = max(
        (
            abs(ratio(name, name.removesuffix(f" {AGAIN}")) - 1)
            for name in samples
            if name.endswith(AGAIN)
        ),
        default=0.0,
    )
    peer = "original" + COMPILED
    columns = {}
    for name in samples:
        to_best = ratio(name, best)
        to_compiled = ratio(name, peer) if peer in samples else None
        goal = None
        if name == "accelerated":
            allowed = 1 / 1.05 if must_gain else 1.02 + noise
            is_met = to_best <= allowed
            if must_gain and to_compiled is not None:
                is_met = is_met and to_compiled <= 1 + noise
            goal = "met" if is_met else "missed"
        columns[name] = dict(zip(COLUMNS, (to_best, to_compiled, 100 * noise, goal), strict=True))
    return columns


if __name__ == "__main__":
    main()
