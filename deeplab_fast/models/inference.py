"""Networks prepared for inference: batch norms folded, convolutions fused."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

from ..ops import _transforms
from ..ops.nan_of_images import with_nan_of
from .cuda_graphs import CudaGraphs
from .fusion import fuse
from .segmentation import SegmentationModel

_T = TypeVar("_T", Tensor, OrderedDict[str, Tensor])


class InferenceModel(SegmentationModel):
    """Model that ``DeepLabV3.prepare_for_inference`` returns. It cannot be trained or saved.

    Residual blocks overwrite their input, so a hook that keeps an activation has to copy it. The
    logits of an image with NaN or Inf are NaN. This also holds on a CPU, although oneDNN's ReLU
    turns NaN into 0.

    On a GPU, ``forward`` and ``predict`` replay CUDA graphs; see
    ``DeepLabV3.prepare_for_inference``. Copies and pickles of the model have none yet.
    """

    finite_weights = True

    def __init__(self, *args: Any, cuda_graphs: bool = True) -> None:
        super().__init__(*args)
        self._cuda_graphs = CudaGraphs() if cuda_graphs else None

    def train(self, mode: bool = True) -> InferenceModel:
        """Keep evaluation mode, whatever ``mode`` is."""
        super().train(False)
        return self

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return self._replayed(super().forward, images)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._drop_cuda_graphs()
        result = super().load_state_dict(*args, **kwargs)
        self.finite_weights = _are_finite(self)
        return result

    def _predict(
        self, images: Tensor, size: tuple[int, int] | None, dtype: torch.dtype | None
    ) -> Tensor:
        return self._replayed(super()._predict, images, size, dtype)

    def _replayed(self, method: Callable[..., _T], images: Tensor, *options: Any) -> _T:
        if self._cuda_graphs is None:
            return method(images, *options)
        return self._cuda_graphs(self, method, images, *options)

    def _apply(self, *args: Any, **kwargs: Any) -> InferenceModel:
        self._drop_cuda_graphs()
        return super()._apply(*args, **kwargs)

    def _drop_cuda_graphs(self) -> None:
        if self._cuda_graphs is not None:
            self._cuda_graphs.clear()

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        if isinstance(images, fx.Proxy):
            raise TraceError(
                "torch.fx cannot trace a model prepared for inference: trace the model on which "
                "prepare_for_inference() was called"
            )
        self._check(images)
        weight = next(self.parameters())
        if images.device != weight.device:
            raise ValueError(
                f"images: expected on {weight.device}, like the weights, got {images.device}"
            )
        if not _transforms.active():  # vmap has no memory formats
            images = images.contiguous(memory_format=torch.channels_last)
        features: dict[str, Tensor] = self.backbone(images.to(weight.dtype))
        return features

    def _classify(self, features: dict[str, Tensor], images: Tensor) -> Tensor:
        logits = super()._classify(features, images)
        if images.device.type != "cpu" and self.finite_weights:
            return logits
        return with_nan_of(logits, [images], self.finite_weights)


def prepare(
    model: SegmentationModel, dtype: torch.dtype | None, cuda_graphs: bool
) -> InferenceModel:
    """Fold and fuse a model; see ``DeepLabV3.prepare_for_inference``."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: expected a floating-point torch.dtype or None, got {dtype!r}")
    prepared: Any = InferenceModel(
        fuse(model.backbone, model.head_inputs),
        fuse(model.classifier),
        None,
        model.align_corners,
        model.preprocessing,
        model.categories,
        cuda_graphs=cuda_graphs,
    )
    prepared.in_channels, prepared.head_inputs = model.in_channels, model.head_inputs
    prepared.to(dtype=dtype, memory_format=torch.channels_last)
    prepared.finite_weights = _are_finite(prepared)
    return prepared.eval()


def _are_finite(model: nn.Module) -> bool:
    """True if all weights are finite but those of the last layer, which shows its own."""
    layers = [[*layer.parameters(False), *layer.buffers(False)] for layer in model.modules()]
    *earlier, _ = filter(None, layers)
    sums = [tensor.sum(dtype=torch.float64) for tensor in itertools.chain(*earlier)]
    total = torch.stack(sums).sum()  # read once, because each read waits for the device
    return total.is_meta or bool(total.isfinite())
