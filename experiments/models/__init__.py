"""Networks."""

from experiments.models.action_unit_network import ActionUnitNetwork
from experiments.models.heads import AU_NORMS, PerAUHead, SharedHead
from experiments.models.inception import InceptionV3Encoder
from experiments.models.resnet20 import ResNet20
from experiments.models.small_encoder import SmallEncoder

__all__ = [
    "AU_NORMS",
    "ActionUnitNetwork",
    "InceptionV3Encoder",
    "PerAUHead",
    "ResNet20",
    "SharedHead",
    "SmallEncoder",
]
