"""Training and evaluation in plain PyTorch."""

from ..models.sliding_window import predict_labels
from .data import IGNORE, SegmentationData
from .errors import Interrupted, TrainingError
from .evaluation import evaluate
from .layouts import cityscapes, folder, voc
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
    "cityscapes",
    "confusion_matrix",
    "evaluate",
    "folder",
    "predict_labels",
    "train",
    "voc",
]
