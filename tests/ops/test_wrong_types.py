"""Values of wrong types in public functions: the error names the argument and what it expects."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import deeplab_fast
from deeplab_fast import (
    ASPP,
    DeepLabV3,
    accelerate,
    dilated_conv2d,
    parallel_dilated_conv2d,
    restore,
    upsample_argmax,
    upsample_cross_entropy,
)
from deeplab_fast.nn import UpsampleCrossEntropyLoss, UpsampleDiceLoss, UpsampleFocalLoss
from deeplab_fast.nn.mmsegmentation import UpsampleCrossEntropyLoss as LossOfMmsegmentation

LOGITS, TARGET = torch.randn(2, 3, 4, 4), torch.zeros(2, 9, 9, dtype=torch.int64)
WEIGHT = torch.randn(4, 3, 3, 3)
VALUES = {
    "None": None,
    "str": "photo.jpg",
    "int": 1,
    "float": 33.5,
    "bool": True,
    "list": [1, 2],
    "floats": (33.0, 33),
    "array": np.zeros((2, 3, 9, 9), np.float32),
    "image": Image.new("RGB", (9, 9)),
    "dict": {"a": 1},
    "tensors": [LOGITS],
    "vector": torch.zeros(7),
    "object": object(),
}
MODEL = DeepLabV3("resnet18", 3, 16).eval()
PREPARED = MODEL.prepare_for_inference()
ACCELERATED = accelerate(
    nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), inference=True
)
IMAGES = torch.zeros(1, 3, 33, 33)
# Functions of the wrong value
CALLS = {
    "preprocessing": MODEL.preprocessing,
    "predict": MODEL.predict,
    "predict of a prepared model": PREPARED.predict,
    "predict of an accelerated model": ACCELERATED.predict,
    "predict, size": lambda value: MODEL.predict(IMAGES, size=value),
    "predict, dtype": lambda value: MODEL.predict(IMAGES, dtype=value),
    "predict of an accelerated model, size": lambda value: ACCELERATED.predict(IMAGES, value),
    "predict of an accelerated model, dtype": lambda v: ACCELERATED.predict(IMAGES, None, v),
    "forward": MODEL,
    "forward of a prepared model": PREPARED,
    "logits": MODEL.logits,
    "tune": MODEL.tune,
    "segment": MODEL.segment,
    "prepare_for_inference": MODEL.prepare_for_inference,
    "ASPP": MODEL.classifier[0],
    "ASPP, in_channels": lambda value: ASPP(value, (6,)),
    "ASPP, atrous_rates": lambda value: ASPP(8, value),
    "ASPP, out_channels": lambda value: ASPP(8, (6,), value),
    "DeepLabV3, backbone": DeepLabV3,
    "DeepLabV3, num_classes": lambda value: DeepLabV3("resnet18", value),
    "DeepLabV3, output_stride": lambda value: DeepLabV3("resnet18", 3, value),
    "argmax, logits": lambda value: upsample_argmax(value, (33, 33)),
    "argmax, size": lambda value: upsample_argmax(LOGITS, value),
    "argmax, scale_factor": lambda value: upsample_argmax(LOGITS, scale_factor=value),
    "argmax, align_corners": lambda value: upsample_argmax(LOGITS, 9, align_corners=value),
    "argmax, dtype": lambda value: upsample_argmax(LOGITS, 9, dtype=value),
    "cross entropy, logits": lambda value: upsample_cross_entropy(value, TARGET),
    "cross entropy, target": lambda value: upsample_cross_entropy(LOGITS, value),
    "cross entropy, weight": lambda value: upsample_cross_entropy(LOGITS, TARGET, value),
    "cross entropy, ignore_index": lambda v: upsample_cross_entropy(LOGITS, TARGET, None, v),
    "cross entropy, reduction": lambda v: upsample_cross_entropy(LOGITS, TARGET, reduction=v),
    "loss, weight": UpsampleCrossEntropyLoss,
    "loss, ignore_index": lambda value: UpsampleCrossEntropyLoss(ignore_index=value),
    "loss, reduction": lambda value: UpsampleCrossEntropyLoss(reduction=value),
    "loss, label_smoothing": lambda value: UpsampleCrossEntropyLoss(label_smoothing=value),
    "loss, logits": lambda value: UpsampleCrossEntropyLoss()(value, TARGET),
    "loss, target": lambda value: UpsampleCrossEntropyLoss()(LOGITS, value),
    "focal loss, gamma": UpsampleFocalLoss,
    "focal loss, target": lambda value: UpsampleFocalLoss()(LOGITS, value),
    "Dice loss, classes": UpsampleDiceLoss,
    "Dice loss, smooth": lambda value: UpsampleDiceLoss(smooth=value),
    "Dice loss, ignore_index": lambda value: UpsampleDiceLoss(ignore_index=value),
    "Dice loss, logits": lambda value: UpsampleDiceLoss()(value, TARGET),
    "mmsegmentation's loss, class_weight": lambda v: LossOfMmsegmentation(class_weight=v),
    "mmsegmentation's loss, weight": lambda v: LossOfMmsegmentation()(LOGITS, TARGET, v),
    "mmsegmentation's loss, avg_factor": lambda v: LossOfMmsegmentation()(LOGITS, TARGET, None, v),
    "convolution, input": lambda value: dilated_conv2d(value, WEIGHT),
    "convolution, weight": lambda value: dilated_conv2d(LOGITS, value),
    "convolution, bias": lambda value: dilated_conv2d(LOGITS, WEIGHT, value),
    "convolution, dilation": lambda value: dilated_conv2d(LOGITS, WEIGHT, None, value),
    "convolution, groups": lambda value: dilated_conv2d(LOGITS, WEIGHT, groups=value),
    "convolutions, weights": lambda value: parallel_dilated_conv2d(LOGITS, value, None, [1]),
    "convolutions, dilations": lambda v: parallel_dilated_conv2d(LOGITS, [WEIGHT], None, v),
    "backend": deeplab_fast.backend,
    "accelerate": accelerate,
    "restore": restore,
}
# Values that PyTorch, not this package, rejects, because they have the right type
SHAPES = {("mmsegmentation's loss, weight", "vector")}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_types(name):
    for kind, value in VALUES.items():
        try:
            CALLS[name](value)
        except Exception as error:
            if (name, kind) not in SHAPES:
                assert isinstance(error, (TypeError, ValueError)), (kind, error)
                assert "expected" in str(error), (kind, error)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MODEL.preprocessing(np.zeros((9, 9, 3), np.uint8)),
         r"image: expected a PIL image \(model.segment takes paths and arrays.*got a ndarray"),
        (lambda: MODEL.preprocessing("photo.jpg"), "image: expected a PIL image .*'photo.jpg'"),
        (lambda: MODEL.preprocessing(IMAGES), "image: expected a PIL image .*got a Tensor"),
        (lambda: MODEL.predict(np.zeros((1, 3, 9, 9), np.float32)),
         r"images: expected a tensor \[N, C, H, W\] \(see model.preprocessing; model.segment"),
        (lambda: PREPARED.predict(Image.new("RGB", (9, 9))), "model.segment takes.*Image"),
        (lambda: ACCELERATED.predict("photo.jpg"), "images: expected a tensor .*'photo.jpg'"),
        (lambda: upsample_cross_entropy(LOGITS, TARGET, weight=[1.0, 1.0, 1.0]),
         "weight: expected a tensor, got a list"),
        (lambda: upsample_argmax(LOGITS, size=(33.0, 33)), "size: expected an int, got 33.0"),
        (lambda: DeepLabV3("resnet18", True), "num_classes: expected an int, got True"),
    ],
)  # fmt: skip
def test_messages(call, message):
    with pytest.raises(TypeError, match=message):
        call()
