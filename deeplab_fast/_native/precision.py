"""Precision of fp32 convolutions: torch's own switch."""

from __future__ import annotations

import torch


def tf32_is_allowed() -> bool:
    """True if torch lets convolutions round fp32 operands to TF32.

    ``torch.backends.cudnn.allow_tf32`` raises an error once ``conv.fp32_precision`` was used.
    """
    conv = getattr(torch.backends.cudnn, "conv", None)
    if conv is None:
        return torch.backends.cudnn.allow_tf32
    return bool(conv.fp32_precision == "tf32")
