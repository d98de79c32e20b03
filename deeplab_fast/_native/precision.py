"""Precision of fp32 convolutions, which torch's own setting controls."""

from __future__ import annotations

import torch


def tf32_is_allowed() -> bool:
    """True if torch lets convolutions round fp32 operands to TF32.

    ``torch.backends.cudnn.allow_tf32`` raises an error if ``conv.fp32_precision`` was set before.
    """
    conv = getattr(torch.backends.cudnn, "conv", None)
    if conv is None:
        return torch.backends.cudnn.allow_tf32
    return bool(conv.fp32_precision == "tf32")
