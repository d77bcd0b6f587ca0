"""The options of runs on facial action units (AUs)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from experiments.checks import Choice, require, require_choice, require_whole
from experiments.data.au import AU_DATASETS, SYNTHETIC
from experiments.models import AU_NORMS
from experiments.tasks.options import Recipe, TaskOptions

if TYPE_CHECKING:
    from experiments.config import RunConfig

ANNOTATORS = "annotators"
# Tallec et al. 2023, arXiv 2303.11803, section 4.2, for InceptionV3.
_INCEPTION = Recipe(
    epochs=10,
    batch_size=64,
    lr=1e-4,
    schedule="exponential",
    noise=None,
    noise_kind=ANNOTATORS,
    weight_decay=1e-4,
    validation=0.2,
)

_ENCODERS = ("small", "inception_v3")
_HEADS = ("per-au", "shared")
_CHOICES = {"encoder": _ENCODERS, "au_head": _HEADS, "au_norm": AU_NORMS}


@dataclass(frozen=True)
class ActionUnitOptions(TaskOptions):
    """Data sets of faces only."""

    DATASETS: ClassVar[tuple[str, ...]] = AU_DATASETS
    NOISE_KINDS: ClassVar[tuple[str, ...]] = (ANNOTATORS,)
    SELECTS_EPOCH: ClassVar[bool] = True
    TRAINED_ON: ClassVar[tuple[str, ...]] = (*TaskOptions.TRAINED_ON, "fold", "frames_per_subject")
    ON_THE_MACHINE: ClassVar[tuple[str, ...]] = ("encoder",)

    fold: int | None = None
    """Which third of the people the network is tested on, 1, 2 or 3; it is trained on those of the
    other two, so that nobody is in both. If not given: 1."""

    encoder: Choice[str, _ENCODERS] | None = None
    """What sees the face. small: eight convolutions. inception_v3: as in the paper (pip install
    'noisyq_fast[vision]'). If not given: inception_v3 for bp4d and disfa on a GPU and with
    --pretrained, else small."""

    pretrained: bool = False
    """Start inception_v3 from ImageNet weights (fetched by torchvision, 104 MB)."""

    au_head: Choice[str, _HEADS] | None = None
    """Layers of its own for each action unit, or shared by all. If not given: per-au."""

    au_norm: Choice[str, AU_NORMS] | None = None
    """Batch norm in the head. per-au: for each action unit and feature; shared: for each
    feature, and one activation range for all; folded: per-au, but multiplied into the weights
    before they are quantized. If not given: per-au."""

    image_size: int | None = None
    """Height and width in pixels, 32 to 1,024. If not given: 64 for small, 299 for inception_v3."""

    frames_per_subject: int | None = None
    """synthetic-au: pictures of each of the 41 subjects, a multiple of 32; together at most half of
    the machine's memory. If not given: 256."""

    strict: bool = False
    """bp4d, disfa: stop at the first faults in the files, rather than leave those frames out."""

    cache_dir: Path | None = None
    """bp4d, disfa: where the decoded pictures are kept; bp4d at 299 pixels takes 39 GB. If not
    given: noisyq_fast in --data-dir."""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value is not None:
                require_choice(name, value, choices)
        fold, frames = self.fold, self.frames_per_subject
        require("fold", fold, fold in (None, 1, 2, 3), "1, 2 or 3")
        require_whole("image_size", self.image_size, 32, 1024)
        accepted = frames is None or (frames > 0 and frames % 32 == 0)
        require("frames_per_subject", frames, accepted, "a multiple of 32")
        if self.pretrained and self.encoder == "small":
            raise ValueError("--pretrained: got --encoder small, takes inception_v3")
        if self.au_head == "shared" and self.au_norm is not None:
            raise ValueError(f"--au-norm: got {self.au_norm} with --au-head shared, takes per-au")

    def check(self, config: RunConfig) -> None:
        takes = "a finite number from 0 to 1,000"
        require("noise", config.noise, config.noise is None or 0 <= config.noise <= 1000, takes)
        if config.noise_kind not in (None, ANNOTATORS):
            raise ValueError(
                f"--noise-kind: got {config.noise_kind} with faces, takes {ANNOTATORS}"
            )
        if config.train_size is not None:
            raise ValueError(
                f"--train-size: got {config.train_size} with faces, which are all taken"
            )
        if config.batch_size == 1:
            raise ValueError("--batch-size: got 1 with faces, takes 2 or more, as batch norm needs")
        if self.au_norm == "folded" and "dropout" in config.methods:
            raise ValueError("--au-norm: got folded with dropout, whose zeros it would move")
        made = {
            "noise": config.noise,
            "noise-seed": config.noise_seed or None,
            "frames-per-subject": self.frames_per_subject,
        }
        filmed = {"strict": self.strict or None, "cache-dir": self.cache_dir}
        without_effect = filmed if config.dataset == SYNTHETIC else made
        for name, value in without_effect.items():
            if value is not None:
                takes = f"takes no effect with {config.dataset}"
                raise ValueError(f"--{name}: got {value}, {takes}")

    def resolved(self, config: RunConfig, gpu: bool) -> ActionUnitOptions:
        synthetic = config.dataset == SYNTHETIC
        large = self.pretrained or (gpu and not synthetic)
        encoder = self.encoder or ("inception_v3" if large else "small")
        head = self.au_head or "per-au"
        size = self.image_size or (64 if encoder == "small" else 299)
        takes = "a whole number from 75 with inception_v3"
        require("image_size", size, encoder == "small" or size >= 75, takes)
        return dataclasses.replace(
            self,
            fold=self.fold or 1,
            encoder=encoder,
            au_head=head,
            au_norm=self.au_norm or ("per-au" if head == "per-au" else None),
            image_size=size,
            frames_per_subject=self.frames_per_subject or (256 if synthetic else None),
        )

    def recipe(self, config: RunConfig) -> Recipe:
        noise = 1.0 if config.dataset == SYNTHETIC else None
        recipe = dataclasses.replace(_INCEPTION, noise=noise)
        if self.encoder == "small":  # starts from nothing
            return dataclasses.replace(recipe, epochs=20, lr=1e-3, schedule="cosine")
        return recipe

    def evaluation_options(self) -> dict[str, Any]:
        names = ("encoder", "pretrained", "au_head", "au_norm", "image_size")
        return {name: getattr(self, name) for name in names}

    @property
    def part(self) -> str:
        return f"fold{self.fold}"
