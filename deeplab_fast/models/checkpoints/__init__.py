"""Checkpoints of this and of other projects."""

from .checkpoint import Checkpoint
from .folder import write_folder
from .pretrained import read_pretrained
from .safetensors_file import write_checkpoint

__all__ = ["Checkpoint", "read_pretrained", "write_checkpoint", "write_folder"]
