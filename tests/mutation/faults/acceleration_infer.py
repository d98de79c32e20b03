"""Faults: the inference form of models of other projects."""

from __future__ import annotations

from .guards import Fault

FAULTS: dict[str, list[Fault]] = {
    "deeplab_fast/acceleration/inference.py": [
        Fault(
            "NaN becomes 0",
            'if is_finite else registry.backend("reference")',
            "",
        ),
        Fault(
            "NaN becomes 0 in a graph",
            "return with_nan_of(x, images, self._has_finite_weights)",
            "return x",
        ),
        Fault(
            "new weights are taken for finite",
            "= _are_finite(self)\n        return result",
            "= True\n        return result",
        ),
        Fault(
            "predict runs all outputs",
            "network.main_output if isinstance(network, FusedModule) else network",
            "network",
        ),
        Fault(
            "the copy can be trained", "return super().train(False)", "return super().train(mode)"
        ),
        Fault("the original is changed", "original = copy.deepcopy(model)", "original = model"),
        Fault(
            "a graph resizes twice",
            "if size is not None and torch.compiler.is_compiling():",
            "if False:",
        ),
    ],
    "deeplab_fast/acceleration/labels.py": [
        Fault(
            "scale factors are rounded",
            "logits, **resize.target, align_corners=resize.align_corners, dtype",
            "logits, resize.size, align_corners=resize.align_corners, dtype",
        ),
        Fault("a changed resize is pending", "if logits.is_pending:", "if True:"),
        Fault(
            "align_corners is forgotten",
            "align_corners=resize.align_corners, dtype=dtype",
            "dtype=dtype",
        ),
        Fault("binary models have one class", "if logits.size(1) == 1:", "if False:"),
        Fault("probabilities are logits", "(0.5 if ends_with_sigmoid else 0)", "0"),
    ],
    "deeplab_fast/acceleration/trial.py": [
        Fault(
            "resized probabilities are logits",
            "if any(input is other for other in self.probabilities):",
            "if False:",
        ),
        Fault(
            "every format is right",
            "for in_channels_last in (True, False):",
            "for in_channels_last in (True,):",
        ),
        Fault(
            "a fixed size is the images'",
            "if to == size and wide in (None, (height, 2 * width)):",
            "if to == size:",
        ),
    ],
}
