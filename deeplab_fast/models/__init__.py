"""DeepLab-v3 and DeepLab-v3+ networks, for training and for inference."""

from .deeplab import DeepLab
from .deeplabv3 import DeepLabV3
from .deeplabv3plus import DeepLabV3Plus
from .inference import InferenceModel
from .preprocessing import Preprocessing

__all__ = ["DeepLab", "DeepLabV3", "DeepLabV3Plus", "InferenceModel", "Preprocessing"]
