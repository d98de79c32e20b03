"""Training and evaluation in plain PyTorch."""

from ..models.sliding_window import predict_labels
from .coco import coco
from .coco_stuff import coco_stuff
from .colors import read_colors
from .data import IGNORE, SegmentationData
from .errors import Interrupted, TrainingError
from .evaluation import evaluate
from .layouts import ade20k, cityscapes, folder, voc
from .loop import train
from .metrics import Scores, confusion_matrix
from .objective import Objective
from .recipe import Recipe

__all__ = [
    "IGNORE",
    "Interrupted",
    "Objective",
    "Recipe",
    "Scores",
    "SegmentationData",
    "TrainingError",
    "ade20k",
    "cityscapes",
    "coco",
    "coco_stuff",
    "confusion_matrix",
    "evaluate",
    "folder",
    "predict_labels",
    "read_colors",
    "train",
    "voc",
]
