"""Squares cut out of pictures so that faces are level and equally large.

Landmarks are those of OpenFace's CSV: 68 points in pixels, of which 36 to 41 are about the eye on
the left of the picture and 42 to 47 about the other. The line between the centres of the eyes
becomes horizontal; the square is centred on the box about the levelled landmarks, and its side is
1.45 times the larger side of the box. (BP4D's own landmarks, 2DFeatures, are not read.)
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from PIL import Image

from experiments.data.au.faults import Faults
from experiments.data.au.table import Table

MALFORMED = "malformed landmarks"
_POINTS = 68
_EYES = slice(36, 42), slice(42, 48)
_MARGIN = 1.45


class Crop(NamedTuple):
    """A square, turned about its centre."""

    angle: float
    """By which the square is turned, in radians, clockwise on the picture."""
    x: float
    """Centre, in pixels from the left edge."""
    y: float
    """Centre, in pixels from the upper edge."""
    side: float
    """In pixels."""

    @classmethod
    def middle(cls, image: Image.Image) -> Crop:
        """The largest one in the middle of a picture."""
        return cls(0.0, image.width / 2, image.height / 2, min(image.size))


def crops(points: np.ndarray) -> np.ndarray:
    """`Crop`s `[F, 4]` of landmarks `[F, 68, 2]`; NaN where these are no face."""
    left, right = (points[:, eye].mean(1) for eye in _EYES)
    dx, dy = (right - left).T
    angle = np.arctan2(dy, dx)
    cos, sin = np.cos(angle), np.sin(angle)
    level = np.stack([np.stack([cos, sin], 1), np.stack([-sin, cos], 1)], 1)  # turns by -angle
    turned = np.einsum("fij,fpj->fpi", level, points)
    low, high = turned.min(1), turned.max(1)
    x, y = np.einsum("fji,fj->fi", level, (low + high) / 2).T
    side = _MARGIN * (high - low).max(1)
    squares = np.stack([angle, x, y, side], 1)
    squares[~(np.hypot(dx, dy) > 0)] = np.nan
    return squares


def read_crops(path: Path, faults: Faults) -> pl.DataFrame | None:
    """`line`, `frame` Int64 and the fields of `Crop` Float32, null where the landmarks are bad.

    The file has the columns frame, x_0 .. x_67 and y_0 .. y_67, as OpenFace writes them. `frame` is
    the number in the name of the picture, which is not OpenFace's count of pictures if these
    begin with another number than 1 or have gaps. None stands for a file that cannot be used.
    """
    table = Table.read(path, MALFORMED, faults)
    if table is None:
        return None
    names = ["frame", *(f"{axis}_{point}" for axis in "xy" for point in range(_POINTS))]
    missing = [name for name in names if name not in table.header]
    if missing:
        faults.add(MALFORMED, path, f"its header has no {missing[0]}")
        return None
    texts = table.select({name: table.header.index(name) for name in names})
    frames = texts.select("line", pl.col("frame").cast(pl.Int64, strict=False))
    numbers = texts.select(pl.col(names[1:]).cast(pl.Float64, strict=False)).to_numpy()
    with np.errstate(invalid="ignore"):  # not finite, and so told as no face
        squares = crops(numbers.reshape(-1, 2, _POINTS).transpose(0, 2, 1))
    squares[~np.isfinite(squares).all(1) | frames["frame"].is_duplicated().to_numpy()] = np.nan
    fields = pl.DataFrame(squares, schema=dict.fromkeys(Crop._fields, pl.Float64))
    return pl.concat([frames, fields.cast(pl.Float32).fill_nan(None)], how="horizontal").unique(
        "frame", keep="first", maintain_order=True
    )


def cut(image: Image.Image, crop: Crop | None, size: int) -> np.ndarray:
    """What `crop` shows, or the middle of a picture that has none: uint8 `[size, size, 3]`.

    Interpolated bicubically, black outside of the picture. A truncated picture raises an OSError.
    """
    image = image.convert("RGB")
    crop = crop or Crop.middle(image)
    # Interpolation looks at 4 x 4 pixels only, which would leave most of a large square out.
    factor = max(1, int(crop.side / size))
    scale = crop.side / size / factor
    image = image.reduce(factor)
    a, b = scale * np.cos(crop.angle), -scale * np.sin(crop.angle)
    x, y = crop.x / factor, crop.y / factor
    middle = size / 2
    matrix = (a, b, x - (a + b) * middle, -b, a, y - (a - b) * middle)
    return np.asarray(
        image.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    )
