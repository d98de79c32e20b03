"""Models as functions from images to one tensor, and their export by torch.export."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..acceleration.counting import channels_of_images
from ..acceleration.inference import AcceleratedModel
from ..acceleration.inference import prepare as accelerate_for_inference
from ..acceleration.labels import labels_of, logits_of, resize_of
from ..models.inference import InferenceModel, prepare
from ..models.segmentation import SegmentationModel
from ..ops._arguments import integer, positive_pair, wrong_type
from ..ops.upsample_cross_entropy import with_background
from .check import Comparison, Result, compare

LABEL_DTYPES = (torch.int64, torch.int32, torch.uint8)

# Shapes of the images that a model is traced with and checked on: (batch, height, width). Our
# networks take any size, so theirs are not multiples of 16. Many other networks need multiples.
_OUR_SHAPES = ((2, 65, 81), (1, 97, 48), (2, 33, 129))
_OTHER_SHAPES = ((2, 64, 96), (1, 128, 64), (2, 96, 160))


class Exportable(nn.Module):
    """A segmentation model as a function from images to one tensor.

    Args:
        model: a :class:`DeepLabV3`, a model prepared for inference or any other model whose output
            has logits, in evaluation mode.
        result: "labels" [N, H, W], or "logits" [N, K, H, W] as large as the images.
        dtype: dtype of the labels.
    """

    def __init__(self, model: nn.Module, result: Result, dtype: torch.dtype) -> None:
        super().__init__()
        self.model: Any = model
        self.result, self.dtype = result, dtype
        self.training = False  # eval() would change the mode of modules that the caller still uses

    def forward(self, images: Tensor) -> Tensor:
        if self.result == "logits":
            return self.logits(images)
        if isinstance(self.model, (SegmentationModel, AcceleratedModel)):
            return self.model.predict(images, dtype=self.dtype)
        return labels_of(logits_of(self.model(images)), images, None, self.dtype, None)

    def logits(self, images: Tensor) -> Tensor:
        """Logits as large as the images."""
        logits, resize = resize_of(logits_of(self.model(images)), images)
        if resize is None:
            return logits
        options: dict[str, Any] = {"mode": "bilinear", "align_corners": resize.align_corners}
        return F.interpolate(logits, **resize.target, **options)

    @property
    def threshold(self) -> float:
        """Output above which the label of a model with one output channel is 1."""
        is_sigmoid = isinstance(self.model, AcceleratedModel) and self.model.trial.ends_with_sigmoid
        return 0.5 if is_sigmoid else 0.0


class Job(NamedTuple):
    """A model to export, and the images to trace and check it with.

    Attributes:
        original: the model that the export is compared with.
        prepared: its form for inference, which is exported.
        shapes: shapes of images [N, C, H, W]. The first one is that of the trace.
        fixed: whether each of these four sizes is fixed.
    """

    original: Exportable
    prepared: Exportable
    shapes: list[tuple[int, ...]]
    fixed: tuple[bool, ...]

    def compare(self, engine: Callable[[np.ndarray], np.ndarray]) -> Comparison:
        """Compare an exported model with the original; see :func:`compare`."""
        result, threshold = self.prepared.result, self.prepared.threshold
        return compare(engine, self.original.logits, result, self.shapes, threshold)

    def compare_logits(
        self, engine: Callable[[np.ndarray], np.ndarray], comparison: Comparison
    ) -> Comparison:
        """Compare the logits within an exported model of labels with the original's.

        Args:
            engine: from images to the logits of which the labels are the argmax.
            comparison: that of the labels.
        """

        def expected(images: Tensor) -> Tensor:
            return with_background(self.original.logits(images))

        logits = compare(engine, expected, "logits", self.shapes)
        return comparison._replace(largest_difference=logits.largest_difference)


def job_of(
    model: nn.Module,
    result: Result,
    dtype: torch.dtype,
    size: tuple[int, int] | None,
    batch: int | None,
) -> Job:
    """Check the arguments of an export, and prepare the model for inference, on the CPU.

    Raises:
        TypeError, ValueError, RuntimeError: see :func:`export_onnx`.
    """
    if not isinstance(model, nn.Module):
        raise wrong_type("model", "an nn.Module", model)
    for name, module in model.named_modules():
        if module.training:
            part = f" of {name}" if name else ""
            raise RuntimeError(f"model: expected evaluation mode{part}: call model.eval() first")
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_meta:
            raise ValueError("model: expected weights, got tensors on the device meta: load some")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise TypeError(
                f"model: expected weights of float32, got {tensor.dtype}: export model.float(); "
                "the engine that runs the file chooses its precision"
            )
    if result not in ("labels", "logits"):
        raise ValueError(f'result: expected "labels" or "logits", got {result!r}')
    if dtype not in LABEL_DTYPES:
        raise wrong_type("dtype", "torch.int64, torch.int32 or torch.uint8", dtype)
    if size is not None:
        size = positive_pair(size, "size", integer)
    if batch is not None and integer(batch, "batch") < 1:
        raise ValueError(f"batch: expected a positive int or None, got {batch}")
    if any(tensor.device.type != "cpu" for tensor in (*model.parameters(), *model.buffers())):
        model = copy.deepcopy(model).cpu()
    is_ours = isinstance(model, SegmentationModel)
    channels = model.in_channels if is_ours else channels_of_images(model)
    if channels is None:
        raise ValueError("model: expected a convolution, which gives the channels of the images")
    shapes = [
        (batch or n, channels, *(size or sides))
        for n, *sides in (_OUR_SHAPES if is_ours else _OTHER_SHAPES)
    ]
    return Job(
        Exportable(model, result, dtype),
        Exportable(_prepared(model), result, dtype),
        list(dict.fromkeys(shapes)),
        (batch is not None, True, size is not None, size is not None),
    )


def _prepared(model: nn.Module) -> nn.Module:
    if isinstance(model, (InferenceModel, AcceleratedModel)):
        return model
    if isinstance(model, SegmentationModel):
        return prepare(model, None, cuda_graphs=False)
    return accelerate_for_inference(model)[0]


def program_of(job: Job) -> ExportedProgram:
    """The prepared model as a program of torch.export with one input, ``images``."""
    dynamic = {i: Dim.DYNAMIC for i, fixed in enumerate(job.fixed) if not fixed}
    with torch.no_grad():
        return torch.export.export(
            job.prepared,
            (torch.zeros(job.shapes[0]),),
            dynamic_shapes={"images": dynamic},
            strict=False,
        )


def with_standard_operators(program: ExportedProgram) -> ExportedProgram:
    """``program`` with PyTorch's operators in place of ours."""
    ours = {
        op: function
        for op, function in torch._decomp.decomposition_table.items()
        if op.name().startswith("deeplab_fast::")
    }
    return program.run_decompositions(ours)


def logits_within(program: ExportedProgram) -> Callable[[Tensor], Tensor] | None:
    """The part of a program of labels up to the logits of which they are the argmax.

    Args:
        program: with PyTorch's operators, of labels.

    Returns:
        None if the program has not exactly one argmax.
    """
    module: Any = program.module()
    argmax = [n for n in module.graph.nodes if n.target is torch.ops.aten.argmax.default]
    if len(argmax) != 1:
        return None
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    output.args = ((argmax[0].args[0],),)
    module.graph._codegen = torch.fx.graph.CodeGen()
    module.recompile()
    return lambda images: module(images)[0]
