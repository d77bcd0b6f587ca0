"""Networks; those for images with a class by the name that `--model` takes."""

from collections.abc import Callable

from torch import nn

from experiments.models.action_unit_network import ActionUnitNetwork
from experiments.models.heads import AU_NORMS, PerAUHead, SharedHead
from experiments.models.inception import InceptionV3Encoder
from experiments.models.resnet18 import ResNet18Cifar
from experiments.models.resnet20 import ResNet20
from experiments.models.small_encoder import SmallEncoder

__all__ = [
    "AU_NORMS",
    "MODELS",
    "ActionUnitNetwork",
    "InceptionV3Encoder",
    "PerAUHead",
    "ResNet18Cifar",
    "ResNet20",
    "SharedHead",
    "SmallEncoder",
]

MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet20": ResNet20,
    "resnet18_cifar": ResNet18Cifar,
}
"""Made of the channels of the images and the number of classes."""
