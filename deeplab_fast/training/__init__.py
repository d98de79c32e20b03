"""Training and evaluation in plain PyTorch."""

from ..models.sliding_window import predict_labels
from .checks import check_labels
from .coco import coco
from .coco_stuff import coco_stuff
from .colors import read_colors
from .data import IGNORE, SegmentationData
from .errors import Interrupted, TrainingError
from .evaluation import evaluate
from .label_counts import LabelCounts, balanced_class_weights, count_labels
from .layouts import ade20k, cityscapes, folder, voc
from .loop import train
from .metrics import Scores, confusion_matrix
from .objective import Objective
from .recipe import Recipe

__all__ = [
    "IGNORE",
    "Interrupted",
    "LabelCounts",
    "Objective",
    "Recipe",
    "Scores",
    "SegmentationData",
    "TrainingError",
    "ade20k",
    "balanced_class_weights",
    "check_labels",
    "cityscapes",
    "coco",
    "coco_stuff",
    "confusion_matrix",
    "count_labels",
    "evaluate",
    "folder",
    "predict_labels",
    "read_colors",
    "train",
    "voc",
]
