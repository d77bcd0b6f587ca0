"""Networks."""

from experiments.models.resnet20 import ResNet20

__all__ = ["ResNet20"]
