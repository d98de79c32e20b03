"""Checkpoints of this and of other projects."""

from .backbone_weights import read_backbone
from .checkpoint import Checkpoint, state_for
from .folder import write_folder
from .pretrained import read_pretrained
from .safetensors_file import write_checkpoint
from .torchvision import options as torchvision_options
from .torchvision import write_torchvision

__all__ = [
    "Checkpoint",
    "read_backbone",
    "read_pretrained",
    "state_for",
    "torchvision_options",
    "write_checkpoint",
    "write_folder",
    "write_torchvision",
]
