"""Interface of all segmentation networks, for training and prepared for inference."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..backends import tuning
from ..ops._arguments import boolean, wrong_type
from ..ops.upsample import upsample
from ..ops.upsample_argmax import upsample_argmax
from ..ops.upsample_cross_entropy import with_background
from .photos import Photo, photo_of_argument
from .preprocessing import Preprocessing, network_input
from .sliding_window import ImageLogits, check_views, predict_labels


def check_images(images: Tensor) -> None:
    if not isinstance(images, Tensor):
        expected = "a tensor [N, C, H, W] (see model.preprocessing; model.segment takes photos)"
        raise wrong_type("images", expected, images)


class SegmentationModel(nn.Module):
    """A backbone, a classifier of its last features and an optional auxiliary classifier.

    A model with one output channel is binary: its labels are 1 where the upsampled logit is above
    0, and 0 elsewhere.

    Args:
        backbone: maps images to {"out": features, "aux": earlier features}.
        classifier: maps the features "out" to logits, or what :attr:`head_inputs` names.
        aux_classifier: maps the features "aux" to logits, or None.
        align_corners: convention of the bilinear upsampling of the logits, as in F.interpolate.
        preprocessing: conversion of an image into the network's input.
        categories: names of the classes, or None.
    """

    # Names of the features that the classifier takes. Several are passed as a dict.
    head_inputs: tuple[str, ...] = ("out",)

    def __init__(
        self,
        backbone: nn.Module,
        classifier: nn.Module,
        aux_classifier: nn.Module | None,
        align_corners: bool,
        preprocessing: Preprocessing,
        categories: tuple[str, ...] | None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier: Any = classifier
        self.aux_classifier = aux_classifier
        self.align_corners = align_corners
        self.preprocessing = preprocessing
        self.categories = categories
        self.in_channels = 3

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """Names of the labels: :attr:`categories`, with "background" before a single one."""
        if self.categories is None or len(self.categories) > 1:
            return self.categories
        return "background", *self.categories

    def logits(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Logits at the resolution of the features, for ops that upsample them.

        Args:
            images: [N, in_channels, H, W], normalised.

        Returns:
            "out" and, with an auxiliary classifier, "aux": [N, num_classes, h, w].

        Raises:
            ValueError: ``images`` has another shape.

        >>> logits = model.logits(images)
        >>> loss = upsample_cross_entropy(logits["out"], target, ignore_index=255)
        """
        features = self._features(images)
        logits = OrderedDict(out=self._classify(features, images))
        if self.aux_classifier is not None:
            logits["aux"] = self.aux_classifier(features["aux"])
        return logits

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """:meth:`logits` upsampled to the size of ``images``, as torchvision's models return them.

        Labels and losses do not need full-size logits: see :meth:`predict` and :meth:`logits`.
        """
        logits = self.logits(images)
        size = images.size(2), images.size(3)
        return OrderedDict(
            (name, upsample(x, size, self.align_corners)) for name, x in logits.items()
        )

    @torch.no_grad()
    def predict(
        self,
        images: Tensor,
        size: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.int64,
    ) -> Tensor:
        """The class of every pixel, computed without full-resolution logits and without gradients.

        Args:
            images: [N, in_channels, H, W] or [in_channels, H, W], normalised as by
                :attr:`preprocessing`.
            size: (height, width) of the labels; that of ``images`` by default.
            dtype: torch.int64, torch.int32 or torch.uint8.

        Returns:
            [N, height, width] labels, or [height, width] for a single image.

        Raises:
            RuntimeError: the model is in training mode, where batch norm would use the statistics
                of these images.
            ValueError, TypeError: ``images`` has another shape or is not floating-point.

        >>> labels = model.eval().predict(images, dtype=torch.uint8)
        """
        if self.training:
            raise RuntimeError("predict: expected evaluation mode: call model.eval() first")
        check_images(images)
        if images.dim() == 3:
            return self.predict(images[None], size, dtype)[0]
        return self._predict(images, size, dtype)

    def segment(
        self,
        image: Photo,
        *,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        window: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """The class of every pixel of a photo, as ``deeplab-fast segment`` computes it.

        The photo is turned upright as its EXIF orientation says, resized as :attr:`preprocessing`
        says, and with ``align_corners`` to sides of 16 k + 1. The labels are as large as the
        upright photo.

        Args:
            image: a PIL image of any mode, the path of an image file, or a uint8 array of shape
                [H, W, 3] (RGB; for OpenCV's BGR pass ``image[:, :, ::-1]``) or [H, W] (grey).
            scales: factors by which the resized photo is resized again; probabilities are averaged.
            flip: also average over the mirrored photo at each scale.
            window: (height, width) of overlapping windows into which the resized photo is divided,
                to save memory: multiples of 16, plus 1 with ``align_corners``.

        Returns:
            uint8 labels, or int32 with more than 256 classes: [H, W].

        Raises:
            RuntimeError: the model is in training mode.
            TypeError: ``image`` is something else, such as a tensor or an array of floats, or an
                option has another type.
            ValueError: the image cannot be read, ``scales`` or ``window`` is out of range, or the
                model does not take photos.

        >>> labels = model.eval().segment("photo.jpg")

        The frames of a video, with PyAV (``pip install av``):

        >>> with av.open("clip.mp4") as video:
        ...     for frame in video.decode(video=0):
        ...         labels = model.segment(frame.to_ndarray(format="rgb24"))
        """
        pixels, size = self._input_of(image, scales, flip, window)
        if flip or window is not None or tuple(scales) != (1.0,):
            labels = predict_labels(self, pixels, size, scales, flip, window)
        else:  # as predict, which is faster on a GPU
            with torch.no_grad():
                labels = self._predict(pixels, size, None)[0]
        return labels.cpu().numpy()

    def segment_with_probabilities(
        self,
        image: Photo,
        *,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        window: tuple[int, int] | None = None,
    ) -> tuple[np.ndarray, Iterator[np.ndarray]]:
        """:meth:`segment`, and the probabilities of all classes in strips of rows.

        The probabilities of a large photo would take much memory: 1 GB for 12 megapixels and 21
        classes. So they are computed while you go through the strips.

        Returns:
            The labels of :meth:`segment`, and an iterator over float32 arrays [C, rows, W], from
            top to bottom.

        >>> labels, strips = model.segment_with_probabilities("photo.jpg")
        >>> confidence = np.concatenate([strip.max(0) for strip in strips])  # [H, W]
        """
        pixels, size = self._input_of(image, scales, flip, window)
        logits = ImageLogits(self, pixels, scales, flip, window)
        strips = (strip.cpu().numpy() for strip in logits.probabilities(size))
        return logits.labels(size).cpu().numpy(), strips

    def _input_of(
        self,
        image: Photo,
        scales: Sequence[float],
        flip: bool,
        window: tuple[int, int] | None,
    ) -> tuple[Tensor, tuple[int, int]]:
        """The input for a photo and the photo's size, after a check of all arguments."""
        if self.training:
            raise RuntimeError("segment: expected evaluation mode: call model.eval() first")
        check_views(self, scales, window)
        boolean(flip, "flip")
        photo = photo_of_argument(image)
        self.preprocessing.check_takes_photos()
        pixels = network_input(photo, self.preprocessing, self.align_corners)
        weight = next(self.parameters())
        return pixels.to(weight.device, weight.dtype), (photo.height, photo.width)

    def _predict(
        self, images: Tensor, size: tuple[int, int] | None, dtype: torch.dtype | None
    ) -> Tensor:
        """Labels of a batch; without a dtype in uint8, or int32 with more than 256 classes."""
        logits = with_background(self._classify(self._features(images), images))
        size = (images.size(2), images.size(3)) if size is None else size
        if dtype is None:
            dtype = torch.uint8 if logits.size(1) <= 256 else torch.int32
        return upsample_argmax(logits, size, align_corners=self.align_corners, dtype=dtype)

    def tune(self, images: Tensor) -> tuning.Tuning:
        """Measure which kernels are the fastest for :meth:`predict` on images of this shape.

        Each distinct convolution is timed on our kernels and on cuDNN. The times go to the dispatch
        table in the user's cache folder, from which kernels are chosen from then on, in this
        process and in later ones. If it is interrupted, the next call goes on where it stopped. A
        model prepared for inference has other convolutions than the model it was made from: tune
        the one that you run. Training is not covered; :func:`deeplab_fast.backends.tune`
        measures any function, such as a training step.

        Args:
            images: as for :meth:`predict`; only their shape, dtype and device matter.

        Returns:
            The times; ``str()`` of them is a table. On a CPU there is nothing to measure.

        Raises:
            RuntimeError: the model is in training mode, or deterministic algorithms are on.
            ValueError, TypeError: ``images`` has another shape or is not floating-point.
            OSError: the dispatch table cannot be written.

        >>> print(model.eval().tune(torch.zeros(8, 3, 513, 513, device="cuda")))
        """
        if self.training:
            raise RuntimeError("tune: expected evaluation mode: call model.eval() first")
        check_images(images)
        return tuning.tune(lambda: self.predict(images), images.device, self)

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        if not isinstance(images, fx.Proxy):
            self._check(images)
        features: dict[str, Tensor] = self.backbone(images)
        return features

    def _check(self, images: Tensor) -> None:
        check_images(images)
        if images.dim() != 4 or images.size(1) != self.in_channels or 0 in images.shape[2:]:
            raise ValueError(
                f"images: expected [N, {self.in_channels}, H, W] with H and W of at least 1, got "
                f"shape {tuple(images.shape)}"
            )
        if not images.is_floating_point():
            raise TypeError(
                f"images: expected normalised floats (see model.preprocessing), got {images.dtype}"
            )

    def _classify(self, features: dict[str, Tensor], images: Tensor) -> Tensor:
        """Logits "out" of the features of some images."""
        logits: Tensor = self.classifier(
            features if len(self.head_inputs) > 1 else features[self.head_inputs[0]]
        )
        return logits
