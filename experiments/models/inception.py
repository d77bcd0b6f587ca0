"""InceptionV3 (Szegedy et al. 2015, arXiv 1512.00567) as an encoder."""

from torch import Tensor, nn

_NOT_OF_THE_ENCODER = ("AuxLogits", "avgpool", "dropout", "fc")


class InceptionV3Encoder(nn.Module):
    """torchvision's InceptionV3 up to Mixed_7c, then the maximum over the picture.

    Takes `[B, 3, H, W]` with `H` and `W` from 75, 299 as published; returns `[B, 2048]`.

    Args:
        pretrained: starts from ImageNet weights, which torchvision fetches, 104 MB, unless they are
            in torch's cache. They were trained on pictures scaled from -1 to 1.

    Raises:
        ValueError: torchvision is missing, or was built for another torch.
    """

    features = 2048

    def __init__(self, pretrained: bool) -> None:
        super().__init__()
        try:
            from torchvision.models import Inception_V3_Weights, inception_v3
        except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
            raise ValueError(
                "--encoder: got inception_v3, which needs torchvision; "
                "pip install 'noisyq_fast[vision]'"
            ) from error
        network = inception_v3(init_weights=not pretrained)
        if pretrained:
            weights = Inception_V3_Weights.IMAGENET1K_V1
            state = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
            network.load_state_dict(state)
        for name, layer in network.named_children():  # in the order of the forward
            if name not in _NOT_OF_THE_ENCODER:
                self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x.amax((2, 3))
