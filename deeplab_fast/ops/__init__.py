"""The public ops, one file each: schema, fake, gradient and public function."""

from .aspp import aspp
from .dilated_conv2d import dilated_conv2d, parallel_dilated_conv2d
from .upsample_argmax import upsample_argmax
from .upsample_cross_entropy import upsample_cross_entropy

__all__ = [
    "aspp",
    "dilated_conv2d",
    "parallel_dilated_conv2d",
    "upsample_argmax",
    "upsample_cross_entropy",
]
