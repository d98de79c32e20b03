"""Faults in the deferred upsampling and in the losses of logits before the upsampling."""

from __future__ import annotations

from .guards import LOSSES, Fault

FAULTS: dict[str, list[Fault]] = {
    "deeplab_fast/nn/deferred.py": [
        Fault(
            "another function's gradient is skipped",
            "has_own_gradient = self.grad_fn is self._node",
            "has_own_gradient = True",
        ),
        Fault(
            "a leaf gets no gradient",
            "is_recorded = self.requires_grad == (self._node is not None)",
            "is_recorded = True",
        ),
        Fault(
            "views leave it pending",
            "value._is_exposed |= exposes",
            "pass",
        ),
        Fault(
            "hooks miss the gradient",
            "elif func in _HOOKS:\n            args[0]._is_exposed = True",
            "elif func in _HOOKS:\n            pass",
        ),
        Fault(
            "the shape stays after transpose_",
            "if changes_shape:",
            "if False:",
        ),
        Fault("the input can be changed", "output.dtype, copy=True", "output.dtype"),
        Fault(
            "dtype of autocast ignored",
            "input.to(output.dtype, copy=True",
            "input.to(input.dtype, copy=True",
        ),
        Fault(
            "scale of a factor ignored",
            "if all(1 / f == n / out for",
            "if all(True for",
        ),
        Fault(
            "scale of a factor ignored in the gradient",
            "scales = scale_factors or (None, None)",
            "scales = (None, None)",
        ),
        Fault("recompute_scale_factor ignored", 'and not kwargs["recompute_scale_factor"]', ""),
        Fault("antialias ignored", "        and not antialias\n", ""),
        Fault("nothing is traced", "torch._C._get_tracing_state() is None", "True"),
        Fault("transforms see a deferred tensor", "and not _transforms.active()", ""),
        Fault(
            "strides of channels_last",
            "memory_format = suggest_memory_format(input)",
            "memory_format = torch.contiguous_format",
        ),
    ],
    "deeplab_fast/nn/dice.py": [
        Fault("absent classes count", "loss = loss * (pixels > 0)", "loss = loss * 1"),
        Fault("no smooth in the divisor", "/ 2 + self.smooth", "/ 2"),
        Fault("no smallest score", "-score.clamp(min=self.eps).log()", "-score.log()"),
        Fault("no smallest divisor", ".clamp(min=self.eps)\n", "\n"),
        Fault("ignored pixels have a class", "target[target != self.ignore_index]", "target % 5"),
    ],
    "deeplab_fast/nn/loss.py": [
        Fault(
            "weights of logits of full size",
            "                None if self.weight is None else self.weight.float(),\n",
            "",
            LOSSES,
        ),
        Fault(
            "the weight is no buffer",
            'self.register_buffer("weight", weight)',
            "self.weight = weight",
        ),
        Fault("weight ignored", "            self.weight,\n", "            None,\n"),
        Fault("ignore_index ignored", "            self.ignore_index,\n", "            -100,\n"),
        Fault("reduction ignored", "            self.reduction,\n", '            "mean",\n'),
        Fault("smoothing ignored", "            self.label_smoothing,\n", "            0.0,\n"),
        Fault("align_corners ignored", "            align_corners,\n", "            False,\n"),
        Fault("ignored pixels give NaN", ".clamp(min=tiny)", "", LOSSES),
        Fault(
            "result of another scale",
            "if logits.is_pending and logits.interpolation.scale_factors is None:",
            "if logits.is_pending:",
            LOSSES,
        ),
        Fault(
            "changed values ignored",
            "if logits.is_pending and logits.interpolation.scale_factors is None:",
            "if logits.interpolation.scale_factors is None:",
            LOSSES,
        ),
        Fault(
            "align_corners of the loss",
            "align_corners, logits = logits.interpolation.align_corners, logits.logits",
            "logits = logits.logits",
            LOSSES,
        ),
        Fault("any size of the target", "target.shape[1:] != logits.shape[2:]", "False", LOSSES),
    ],
    "deeplab_fast/nn/mmsegmentation.py": [
        Fault("ignored pixels always count", "counts &= label != ignore_index", "pass"),
        Fault("loss_weight ignored", "return self.loss_weight * loss", "return loss"),
        Fault("avg_factor ignored", "if avg_factor is None:", "if True:"),
        Fault("weight ignored", "loss = loss * weight.float()", "pass"),
    ],
    "deeplab_fast/ops/upsample_class_sums.py": [
        Fault(
            "ignored pixels in the sum",
            "gather(0, stripe.target) * stripe.counts",
            "gather(0, stripe.target)",
        ),
        Fault("gradient of ignored pixels", "        grad_logits *= stripe.counts\n", ""),
        Fault(
            "last row of the next stripe",
            "rows = slice(begin, begin + step)",
            "rows = slice(begin, begin + step + 1)",
        ),
        Fault("later stripes replace the gradient", "stripe.sources] += ", "stripe.sources] = "),
    ],
}
