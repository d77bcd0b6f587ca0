"""A classifier on top of units between 0 and 1, which give binary codes (Lin et al. 2015)."""

from torch import Tensor, nn


class LatentClassifier(nn.Module):
    """From features `[B, D]` over a layer of sigmoids to logits `[B, C]`. The code of a sample has
    a bit for each of them: whether it is 0.5 or more."""

    def __init__(self, features: int, bits: int, classes: int) -> None:
        super().__init__()
        self.latent = nn.Linear(features, bits)
        self.classifier = nn.Linear(bits, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.latent(x).sigmoid())


def add_latent_layer_(model: nn.Module, bits: int) -> nn.Module:
    """Puts a `LatentClassifier` in the place of a network's layer `classifier`; returns it."""
    layer = getattr(model, "classifier", None)
    if type(layer) is not nn.Linear:
        raise ValueError(
            f"model: got {type(model).__name__} with {type(layer).__name__} as its classifier; "
            "takes a network whose last layer is a linear one of this name"
        )
    model.classifier = LatentClassifier(layer.in_features, bits, layer.out_features)
    return model


def activations(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The features that the classifier sees, and the latent units between 0 and 1."""
    seen: list[Tensor] = []

    def see(_: nn.Module, args: tuple[Tensor], latent: Tensor) -> None:
        seen.extend((args[0], latent.sigmoid()))

    classifier = model.classifier
    assert isinstance(classifier, LatentClassifier)
    hook = classifier.latent.register_forward_hook(see)
    try:
        model(inputs)
    finally:
        hook.remove()
    return seen[0], seen[1]


def codes(latent: Tensor) -> Tensor:
    """Bits `[N, bits]`, as bool."""
    return latent >= 0.5
