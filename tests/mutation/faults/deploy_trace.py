"""Faults in tracing, integer targets and models with one output channel."""

from __future__ import annotations

from .guards import Fault, Guard

TRACING = Guard("test_tracing.py not mobilenet")
BINARY = Guard("test_binary.py")
TARGETS = Guard("test_upsample_cross_entropy.py integer or any_size")

FAULTS: dict[str, list[Fault]] = {
    "deeplab_fast/nn/conv.py": [
        Fault(
            "torch.fx looks into convolutions",
            "conv.__module__ = nn.Conv2d.__module__",
            "pass",
            TRACING,
        ),
        Fault(
            "a class with another forward is nn.Conv2d",
            "return (cls.forward, cls._conv_forward) == (nn.Conv2d.forward, Conv2d._conv_forward)",
            "return True",
            TRACING,
        ),
    ],
    "deeplab_fast/nn/aspp.py": [
        Fault(
            "joint branches in a graph of torch.fx",
            "if is_traced or not self._is_unmodified():",
            "if not self._is_unmodified():",
            TRACING,
        ),
    ],
    "deeplab_fast/ops/upsample_argmax.py": [
        Fault("a number beyond int64", "2**63 - 1}", "2**63}", TRACING),
        Fault(
            "a size that a trace keeps",
            "return value if is_traced else integer(value, name)",
            "return integer(value, name)",
            TRACING,
        ),
        Fault("sizes of a trace in fp32", "n.double() * s", "n.float() * s", TRACING),
    ],
    "deeplab_fast/ops/upsample_cross_entropy.py": [
        Fault("the one channel is class 0", "(0, 0, 0, 0, 1, 0)", "(0, 0, 0, 0, 0, 1)", BINARY),
        Fault("targets of other integers", "return target.long()", "return target", TARGETS),
    ],
    "deeplab_fast/models/segmentation.py": [
        Fault(
            "always class 0",
            "logits = with_background(self._classify(self._features(images), images))",
            "logits = self._classify(self._features(images), images)",
            BINARY,
        ),
    ],
    "deeplab_fast/models/sliding_window.py": [
        Fault(
            "views of a binary model",
            'return with_background(model.logits(image)["out"].float())',
            'return model.logits(image)["out"].float()',
            BINARY,
        ),
    ],
    "deeplab_fast/ops/_decomposition.py": [
        Fault(
            "the decomposition as the fake of symbolic sizes",
            'register_decomposition(op, type="meta")(fake_that_prepares_inductor)',
            "pass",
            TARGETS,
        ),
    ],
}
