"""From faces to action units (AUs)."""

from torch import Tensor, nn

from experiments.models.heads import PerAUHead, SharedHead
from noisyq_fast.layers.grouped import PER_GROUP


class ActionUnitNetwork(nn.Module):
    """An encoder, from pictures `[B, C, H, W]` to `[B, encoder.features]`, and a head on top of it,
    to logits `[B, aus]`.

    Attributes:
        input_ranges: as for `noisyq_fast.quantize_model_`: "shared" where the head's norm is, else
            one for each AU.
    """

    def __init__(self, encoder: nn.Module, head: SharedHead | PerAUHead) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        shared = isinstance(head, PerAUHead) and head.norm == "shared"
        self.input_ranges = "shared" if shared else PER_GROUP

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))
