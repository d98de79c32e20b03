"""DeepLab-v3 networks, for training and for inference."""

from .deeplabv3 import DeepLabV3
from .inference import InferenceModel
from .preprocessing import Preprocessing

__all__ = ["DeepLabV3", "InferenceModel", "Preprocessing"]
