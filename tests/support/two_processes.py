"""Script that test_training_step.py starts with torchrun: a step and a run in two gloo processes.

Usage: python two_processes.py FOLDER DATA. Started without torchrun, it writes the results of one
process, which those of two must agree with.

torch.nn.SyncBatchNorm has kernels for GPUs only. Here its five ATen functions are written in
PyTorch, and the two checks of the device are patched out, so that its autograd function and
collectives run on a CPU, with gloo.
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from deeplab_fast import DeepLabV3, DeepLabV3Plus
from deeplab_fast.models import DeepLab, Preprocessing
from deeplab_fast.training import (
    Objective,
    Recipe,
    SegmentationData,
    TrainingError,
    count_labels,
    distributed,
    evaluate,
    folder,
    train,
)
from deeplab_fast.training.loader import keys

DIMS = (0, 2, 3)


def channels(x):
    return x[:, None, None]


def batch_norm_stats(input, eps):
    variance, mean = torch.var_mean(input, DIMS, correction=0)
    return mean, (variance + eps).rsqrt()


def batch_norm_gather_stats_with_counts(
    input, means, invstds, running_mean, running_var, momentum, eps, counts
):
    total = counts.sum()
    mean = (means * counts[:, None]).sum(0) / total
    squares = invstds**-2 - eps + (means - mean) ** 2
    variance = (squares * counts[:, None]).sum(0) / total
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(variance * total / (total - 1), momentum)
    return mean, (variance + eps).rsqrt()


def batch_norm_elemt(input, weight, bias, mean, invstd, eps):
    return (input - channels(mean)) * channels(invstd * weight) + channels(bias)


def batch_norm_backward_reduce(grad, input, mean, invstd, weight, *needs):
    sum_dy = grad.sum(DIMS)
    sum_dy_xmu = (grad * (input - channels(mean))).sum(DIMS)
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy


def batch_norm_backward_elemt(grad, input, mean, invstd, weight, sum_dy, sum_dy_xmu, counts):
    total = counts.sum()
    centred = (input - channels(mean)) * channels(invstd**2 * sum_dy_xmu / total)
    return (grad - channels(sum_dy / total) - centred) * channels(invstd * weight)


KERNELS = {
    kernel.__name__: kernel
    for kernel in (
        batch_norm_stats,
        batch_norm_gather_stats_with_counts,
        batch_norm_elemt,
        batch_norm_backward_reduce,
        batch_norm_backward_elemt,
    )
}


def network(atrous_rates=()) -> DeepLabV3:
    """A small network without dropout, which each process would draw for itself."""
    torch.manual_seed(0)
    return without_dropout(
        DeepLabV3("mobilenet_v2", 3, 16, atrous_rates, aux_loss=True, head_conv=False)
    )


def network_plus() -> DeepLabV3Plus:
    """A small DeepLab-v3+ without dropout."""
    torch.manual_seed(0)
    small = {"aspp_channels": 8, "low_level_channels": 4}
    return without_dropout(DeepLabV3Plus("mobilenet_v2", 3, 16, (1, 2), aux_loss=True, **small))


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def step(path: Path, model: DeepLab) -> None:
    """Write gradients and running statistics of one step on four images, with all ASPP branches."""
    rank, processes = distributed.rank(), distributed.world_size()
    torch.manual_seed(1)
    images = torch.randn(4, 3, 33, 49, dtype=torch.float64)
    target = torch.randint(3, (4, 33, 49))
    target[0, :30] = 255  # the processes have different numbers of labelled pixels
    model.double()
    if processes > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    objective = Objective(model, Recipe())
    parallel = objective
    if processes > 1:
        with mock.patch.object(DistributedDataParallel, "_passing_sync_batchnorm_handle"):
            parallel = DistributedDataParallel(objective)
    weight = objective.loss_normalizer(target) / processes
    device_check = mock.patch.object(torch._C, "_get_privateuse1_backend_name", lambda: "cpu")
    gather = mock.patch.object(dist, "all_gather", wraps=dist.all_gather)
    with mock.patch.multiple(torch, **KERNELS), device_check, gather as gathered:
        parallel(images[rank::processes], target[rank::processes], weight).backward()
    if processes > 1:  # the three branches of ASPP share one gather
        norms = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
        assert gathered.call_count == len(norms) - 2, (gathered.call_count, len(norms))
    if rank == 0:
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        torch.save((gradients, dict(model.named_buffers())), path)


class Colours(nn.Module):
    """Predicts red and blue from the colours, so that labels do not depend on rounding."""

    align_corners = False
    preprocessing = Preprocessing()

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))  # evaluate() takes the device from it

    def logits(self, images):
        red, _, blue = images[0]
        return {"out": torch.stack([torch.full_like(red, 0.7), red - blue, blue - red])[None]}


def count(path: Path, data: Path) -> None:
    """Write the scores of five images: three of one process, two of the other."""
    whole = folder(data, "train")
    five = SegmentationData(whole.pairs[:5], whole.classes)
    counts = count_labels(five, workers=0, quiet=True)
    expected = [five.read(index)[1] for index in range(5)]
    assert counts.pixels.tolist() == [sum((x == i).sum() for x in expected) for i in range(3)]
    scores = evaluate(Colours(), five, workers=0, quiet=True)
    # Every process has the scores of all images.
    assert len({scores.confusion.tobytes() for scores in distributed.gather(scores)}) == 1
    if distributed.rank() == 0:
        torch.save(torch.from_numpy(scores.confusion), path)


def fail(output: Path, data: Path) -> None:
    """Damage a file that only the second process reads: both raise the error and save the state.

    The first file is a training image of the second update; the second one, with the first file
    restored, is a validation image.
    """
    recipe = Recipe(epochs=1, batch_size=2, crop_size=(32, 32), freeze_batch_norm=True)
    (((_, index),), *_) = keys(6, recipe, 1, rank=1, world_size=2)
    for bad, updates in ((data / f"images/train/{index}.png", 1), (data / "images/val/1.png", 3)):
        content = bad.read_bytes()
        distributed.gather(None)  # a barrier
        if distributed.rank() == 0:
            bad.write_bytes(content[:200])
        distributed.gather(None)
        try:
            train(
                network(), folder(data, "train"), folder(data, "val"), recipe,
                output, workers=0, resume=True,
            )  # fmt: skip
        except TrainingError as error:
            assert str(error).startswith(f"{bad}: "), error
        else:
            raise AssertionError(f"{bad} was read")
        assert torch.load(output / "last.pt", weights_only=True)["step"] == updates
        if distributed.rank() == 0:
            bad.write_bytes(content)


def main() -> None:
    output, data = Path(sys.argv[1]), Path(sys.argv[2])
    sys.modules["torch.utils.tensorboard"] = None  # type: ignore[assignment]  # slow to import
    torch.set_num_threads(1)
    distributed.start(torch.device("cpu"))
    step(output / "step.pt", network(atrous_rates=(1, 2)))
    step(output / "step_plus.pt", network_plus())
    count(output / "scores.pt", data)
    recipe = Recipe(
        epochs=2, batch_size=4, crop_size=(32, 32), freeze_batch_norm=True, grad_accum_steps=2,
        learning_rate=0.05, class_weights=(0.5, 2.0, 2.0),
    )  # fmt: skip
    train(
        network(), folder(data, "train"), folder(data, "val"), recipe,
        output / "run", workers=0, log_every=1,
    )  # fmt: skip
    # Each process has its own dropout, in a resumed run too.
    assert distributed.gather(torch.initial_seed()) == list(range(distributed.world_size()))
    if distributed.rank() == 0:
        saved = torch.load(output / "run/last.pt", weights_only=True)["random"]
        assert len({state["torch"].numpy().tobytes() for state in saved}) == len(saved)
        assert len(saved) == distributed.world_size()
    assert distributed.any_process(distributed.rank() == 0)
    assert not distributed.any_process(False)
    if dist.is_initialized():
        fail(output / "failed", data)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
