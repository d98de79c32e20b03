"""Faults: DeepLab-v3+, separable convolutions and the options of the models."""

from __future__ import annotations

from .guards import Fault

FAULTS: dict[str, list[Fault]] = {
    "deeplab_fast/models/deeplabv3plus.py": [
        Fault(
            "align_corners of the decoder ignored",
            "(low.size(2), low.size(3)), self.align_corners)",
            "(low.size(2), low.size(3)), False)",
        ),
        Fault(
            "align_corners of the logits alone",
            "self.classifier[0].align_corners = value",
            "pass",
        ),
        Fault("low-level features first", "torch.cat([out, low]", "torch.cat([low, out]"),
        Fault(
            "low-level features not reduced by batch norm and ReLU",
            'self.low_level(features["low"])',
            'self.low_level[0](features["low"])',
        ),
        Fault(
            "one convolution in the decoder",
            'widths = [channels + low_level_channels] + [channels] * config["decoder_convs"]',
            "widths = [channels + low_level_channels] + [channels]",
        ),
        Fault(
            "separable_decoder ignored",
            'separable = config["separable_decoder"], config["depthwise_norm"]',
            'separable = config["separable"], config["depthwise_norm"]',
        ),
        Fault(
            "dense decoder of a separable model",
            "separable_decoder = separable if separable_decoder is None else separable_decoder",
            "separable_decoder = bool(separable_decoder)",
        ),
        Fault("aspp_conv ignored", 'if config["aspp_conv"]:', "if False:"),
        Fault(
            "output stride 8 by default",
            "output_stride: int = 16",
            "output_stride: int = 8",
        ),
    ],
    "deeplab_fast/models/deeplab.py": [
        Fault(
            "files named after a derived class",
            "next(kind.__name__ for kind in type(self).__mro__ if DeepLab in kind.__bases__)",
            "type(self).__name__",
        ),
        Fault(
            "a derived class loads its base",
            "        if issubclass(cls, found):\n            return cls\n",
            "",
        ),
        Fault(
            "any class loads any file",
            "        if not issubclass(found, cls):",
            "        if False:",
        ),
        Fault("dropout not checked", 'if not 0 <= config["dropout"] <= 1:', "if False:"),
        Fault("dropout above 1", '<= config["dropout"] <= 1', '<= config["dropout"]'),
        Fault("types are not checked", "config[name] = convert(config[name], name)", "pass"),
        Fault(
            "dropout of ASPP ignored",
            '("separable", "depthwise_norm", "project_size", "dropout")',
            '("separable", "depthwise_norm", "project_size")',
        ),
    ],
    "deeplab_fast/nn/aspp.py": [
        Fault("even projections", "project_size not in (1, 3)", "project_size not in (1, 2, 3)"),
        Fault(
            "1x1 path for a 3x3 projection",
            "            and self.project[0].kernel_size == (1, 1)\n",
            "",
        ),
        Fault(
            "dense branches",
            "3, rate, separable, depthwise_norm)",
            "3, rate, False, depthwise_norm)",
        ),
        Fault("path of DeepLabV3 only", "model.classifier[0].aspp.convs[-1]", "model.aspp"),
    ],
    "deeplab_fast/nn/conv.py": [
        Fault(
            "dilated layers on cuDNN only",
            "_trains_in_half_on_cpu(input, weight) or self._has_gpu_kernels(input)",
            "_trains_in_half_on_cpu(input, weight)",
        ),
        Fault("grouped layers on a GPU", "self.groups in (1, self.in_channels)", "True"),
        Fault("dense layers on cuDNN only", "(1, self.in_channels)", "(self.in_channels,)"),
        Fault("our op on every device", ' and input.device.type == "cuda"', ""),
        Fault("depthwise convolution not dilated", "            dilation=dilation,\n", ""),
        Fault(
            "depthwise_norm without ReLU",
            "[nn.BatchNorm2d(in_channels), nn.ReLU()]",
            "[nn.BatchNorm2d(in_channels), nn.Identity()]",
        ),
        Fault(
            "proxies of torch.fx in our op",
            "return is_supported and isinstance(input, Tensor) and input",
            "return is_supported and input",
        ),
    ],
}
