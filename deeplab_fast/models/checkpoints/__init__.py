"""Checkpoints of this and of other projects."""

from .checkpoint import Checkpoint, state_for
from .pretrained import read_pretrained
from .safetensors_file import write_checkpoint

__all__ = ["Checkpoint", "read_pretrained", "state_for", "write_checkpoint"]
