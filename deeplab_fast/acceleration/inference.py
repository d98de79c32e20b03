"""Copies of models for inference: :class:`AcceleratedModel`."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map_only

from ..backends import registry
from ..models.deeplab import DeepLab
from ..models.fusion import FoldedASPP, FusedModule, fuse_without_copy
from ..models.inference import InferenceModel
from ..models.segmentation import check_images
from ..nn.deferred import deferred_upsampling
from ..ops import _transforms
from ..ops.nan_of_images import with_nan_of
from .labels import labels_of, logits_of
from .report import Entry, Report
from .summary import entries_of
from .training import restore_parts
from .trial import Trial, in_format, trial_of


class AcceleratedModel(nn.Module):
    """A copy of a model for inference: the same outputs, and the method :meth:`predict`.

    Batch norms are folded and convolutions fused (:func:`deeplab_fast.models.fusion.fuse`). Images
    are converted to channels_last, so 4-D outputs are in channels_last too. The copy shares nothing
    with the original. It cannot be trained or differentiated, and :meth:`train` leaves it in
    evaluation mode.

    NaN and Inf in images or weights give what they give in the original: such a call runs without
    the fused ReLU of oneDNN, which would turn NaN into 0. In a graph of torch.compile, torch.export
    or torch.jit, and in torch.func, all outputs of such an image are NaN instead. Values that
    overflow within the network are not detected.

    Attributes:
        network: the fused network.
        trial: what a run without data showed of the output.
    """

    def __init__(self, network: nn.Module, trial: Trial) -> None:
        super().__init__()
        self.network = network
        self.trial = trial
        self._has_finite_weights = _are_finite(network)
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the original model in evaluation mode."""
        if isinstance(args, fx.Proxy) or any(isinstance(value, fx.Proxy) for value in args):
            raise TraceError(
                "torch.fx cannot trace an AcceleratedModel: trace the model on which accelerate() "
                "was called"
            )
        return self._run(self.network, *args, **kwargs)

    @torch.no_grad()
    def predict(
        self,
        images: Tensor,
        size: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.int64,
    ) -> Tensor:
        """The class of every pixel, computed without full-resolution logits where possible.

        If the model ends with a bilinear resize, that resize and the argmax run as one
        :func:`deeplab_fast.upsample_argmax`. If it returns logits that are smaller than the images,
        as those of transformers do, they are resized to the size of the images with
        ``align_corners=False``, as transformers' ``post_process_semantic_segmentation`` does.
        Otherwise the labels are the argmax of the output.

        A model with one output channel is binary: its labels are 1 where the output is above 0, or
        above 0.5 if it ends with a sigmoid, and 0 elsewhere.

        The logits are the output itself, the entry "out" or "logits" of a dict or ModelOutput, or
        the first four-dimensional tensor of a tuple or list.

        Args:
            images: [N, C, H, W] or [C, H, W], the first argument of the model.
            size: (height, width) of the labels, to which the logits are resized directly; by
                default the size of the model's own resize, or that of the images.
            dtype: torch.int64, torch.int32 or torch.uint8.

        Returns:
            [N, height, width] labels, or [height, width] for a single image.

        Raises:
            TypeError: ``images`` is not a tensor, the model's output holds no logits, ``dtype`` is
                not supported, or a binary model cannot run on meta tensors.
            ValueError: ``images`` has another number of dimensions, ``size`` is not positive, or
                ``dtype`` cannot hold the labels.

        >>> labels = model.predict(images, dtype=torch.uint8)
        """
        check_images(images)
        if images.dim() == 3:
            return self.predict(images[None], size, dtype)[0]
        if images.dim() != 4:
            raise ValueError(
                f"images: expected [N, C, H, W] or [C, H, W], got {tuple(images.shape)}"
            )
        if size is not None and torch.compiler.is_compiling():
            # Within a graph no resize is deferred. As a decorator, disable would take a second to
            # import torch._dynamo and Triton with this package.
            return torch.compiler.disable(self.predict)(images, size, dtype)
        network = self.network
        with deferred_upsampling():
            output = self._run(
                network.main_output if isinstance(network, FusedModule) else network, images
            )
            logits = logits_of(output)
        return labels_of(logits, images, size, dtype, self.trial.ends_with_sigmoid)

    def _run(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """``function(*args, **kwargs)``, with NaN where the original has NaN."""
        tensors = [x for x in tree_leaves((args, kwargs)) if _is_image(x)]
        in_channels_last = self.trial.in_channels_last
        args, kwargs = tree_map_only(
            Tensor, lambda x: in_format(x, in_channels_last) if _is_image(x) else x, (args, kwargs)
        )
        if not any(x.device.type == "cpu" for x in tensors):
            return function(*args, **kwargs)
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or _transforms.active():
            return self._with_nan_of(tensors, function(*args, **kwargs))
        is_finite = self._has_finite_weights and all(
            bool(x.sum(dtype=torch.float32).isfinite()) for x in tensors
        )
        with contextlib.nullcontext() if is_finite else registry.backend("reference"):
            return function(*args, **kwargs)

    def _with_nan_of(self, images: list[Tensor], output: Any) -> Any:
        def with_nan(x: Tensor) -> Tensor:
            if not x.is_floating_point() or x.dim() == 0 or x.size(0) != images[0].size(0):
                return x
            return with_nan_of(x, images, self._has_finite_weights)

        return tree_map_only(Tensor, with_nan, output)

    def train(self, mode: bool = True) -> AcceleratedModel:
        """Keep evaluation mode, whatever ``mode`` is."""
        return super().train(False)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        result = super().load_state_dict(*args, **kwargs)
        self._has_finite_weights = _are_finite(self)
        return result

    def _apply(self, *args: Any, **kwargs: Any) -> AcceleratedModel:
        super()._apply(*args, **kwargs)
        self._has_finite_weights = _are_finite(self)
        return self


def _is_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point()


def _are_finite(model: nn.Module) -> bool:
    # Inf in other buffers than those of norms has a purpose, such as -inf in a mask.
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    others = {*map(id, model.buffers())} - {id(x) for norm in norms for x in norm.buffers()}
    tensors = [
        x.nan_to_num(torch.nan, 0, 0) if id(x) in others else x
        for x in (*model.parameters(), *model.buffers())
        if x.is_floating_point()
    ]
    if not tensors or any(x.is_meta for x in tensors):
        return True
    return bool(torch.stack([x.sum(dtype=torch.float64).cpu() for x in tensors]).isfinite().all())


def prepare(model: nn.Module) -> tuple[nn.Module, Report]:
    """A copy of ``model`` for inference, or ``model`` itself if nothing can be fused.

    A :class:`DeepLabV3` or :class:`DeepLabV3Plus` is prepared by its own
    ``prepare_for_inference``. Any other model becomes an :class:`AcceleratedModel`.
    """
    if isinstance(model, (AcceleratedModel, InferenceModel)):
        return model, Report([Entry("", "model", None, "prepared for inference already")])
    try:
        original = copy.deepcopy(model)
    except Exception as error:
        reason = f"it cannot be copied: {error}"
        return model, Report([Entry("", "model", None, reason.partition("\n")[0])])
    restore_parts(original)
    if isinstance(original, DeepLab):
        prepared = original.prepare_for_inference()
        return prepared, Report([Entry("", "model", "prepare_for_inference()")])
    counts = {name: type(module) for name, module in original.named_modules()}
    network, fused = fuse_without_copy(original)
    if not fused.fused:
        return model, Report(entries_of(counts, network, fused, None))
    for module in network.modules():
        # Code of other modules may call view.
        if type(module) in (nn.Conv2d, nn.ConvTranspose2d, FoldedASPP):
            module.to(memory_format=torch.channels_last)
    trial = trial_of(network)
    report = Report(entries_of(counts, network, fused, trial))
    return AcceleratedModel(network, trial), report
