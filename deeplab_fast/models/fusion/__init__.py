"""Fusion of convolutions with the batch norms, activations and sums that follow them."""

from .fusing import Report, fuse, fuse_with_report, fuse_without_copy
from .layers import FoldedASPP, FusedConv2d
from .module import FusedModule

__all__ = [
    "FoldedASPP",
    "FusedConv2d",
    "FusedModule",
    "Report",
    "fuse",
    "fuse_with_report",
    "fuse_without_copy",
]
