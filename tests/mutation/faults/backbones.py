"""Faults: Backbones, their input channels and their ImageNet weights."""

from __future__ import annotations

from .guards import Fault, Guard

FAULTS: dict[str, list[Fault]] = {
    "deeplab_fast/models/backbones/resnet.py": [
        Fault(
            "first block of a dilated stage",
            "if not VARIANTS[variant]:",
            "if VARIANTS[variant]:",
        ),
        Fault(
            "second convolution of a basic block is not dilated",
            "Conv2d(width, width, 3, 1, dilation, dilation, bias=False)",
            "Conv2d(width, width, 3, 1, 1, 1, bias=False)",
        ),
        Fault(
            "stride of the deep stem in its second convolution",
            "_conv_norm_relu(in_channels, 32, stride=2),\n"
            "                *_conv_norm_relu(32, 32, stride=1),",
            "_conv_norm_relu(in_channels, 32, stride=1),\n"
            "                *_conv_norm_relu(32, 32, stride=2),",
        ),
        Fault("no random numbers for the classifier", "nn.Linear(channels, 1000)", "pass"),
        Fault("jfzhang95's first block is not dilated", '"jfzhang95": True', '"jfzhang95": False'),
        Fault("multi_grid of another stage", "if i == 3 and", "if i == 2 and"),
    ],
    "deeplab_fast/models/backbones/mobilenet_v2.py": [
        Fault(
            "padding before the expansion ignores the dilation",
            "self.input_padding = dilation if",
            "self.input_padding = 1 if",
        ),
        Fault(
            "dilation begins in the same stage",
            "undilated_blocks=4",
            "undilated_blocks=1",
        ),
        Fault(
            "VainF's stem is padded",
            "Rules(pad_before_expansion=True, pad_stem=False)",
            "Rules(pad_before_expansion=True)",
        ),
        Fault(
            "TensorFlow pads as PyTorch",
            "Rules(same_padding=True)",
            "Rules()",
            Guard("test_weights.py transformers_network"),
        ),
        Fault(
            "segmentation_models_pytorch keeps the first dilation",
            "Rules(undilated_blocks=0, last_conv=True)",
            "Rules(last_conv=True)",
        ),
    ],
    "deeplab_fast/models/backbones/mobilenet_v3.py": [
        Fault("auxiliary features of another layer", "_LOW, _AUX = 3, 4", "_LOW, _AUX = 3, 5"),
        Fault("squeezed channels are not rounded", "_multiple_of_8(width // 4)", "width // 4"),
        Fault("momentum of batch norm", "eps=1e-3, momentum=0.01", "eps=1e-3"),
        Fault("classifier is not initialised", "nn.init.normal_(linear.weight, 0, 0.01)", "pass"),
    ],
    "deeplab_fast/models/backbones/timm_features.py": [
        Fault(
            "reported strides are believed",
            "strides = [_SIZE // shape[-1] for shape in shapes]",
            "strides = model.feature_info.reduction()",
        ),
        Fault("buffers stay on meta", "if torch.empty(0).is_meta:", "if False:"),
        Fault("first features for the decoder", "low_index = max(", "low_index = 0 * max("),
    ],
    "deeplab_fast/models/backbones/imagenet.py": [
        Fault("one channel gets the mean over RGB", "weight.sum(1,", "weight.mean(1,"),
        Fault("repeated weights are not scaled", "repeated * (3 / channels)", "repeated"),
        Fault(
            "statistics of ImageNet for all of timm",
            "return Preprocessing(tuple(published.mean), tuple(published.std))",
            "return Preprocessing()",
        ),
    ],
}
