"""The coordinates of textures: pixel grids, waves and noise, with the same bits on every machine."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Grid = npt.NDArray[np.floating[Any]]
_STEPS = 1024
# A table, since vectorised sines differ in the last bit between processors.
_SINE = np.array([round(math.sin(2 * math.pi * i / _STEPS), 6) for i in range(_STEPS)], dtype=np.float32)


def turn(degrees: float) -> tuple[float, float]:
    """Return cosine and sine, rounded so that they are the same everywhere."""
    return round(math.cos(math.radians(degrees)), 9), round(math.sin(math.radians(degrees)), 9)


def wave(turns: Grid) -> Grid:
    """Return the sine of 2 pi `turns`, in [-1, 1]."""
    rows: npt.NDArray[np.int32] = np.floor(turns * np.float32(_STEPS)).astype(np.int32) & (_STEPS - 1)
    return _SINE[rows]


def saw(turns: Grid) -> Grid:
    """Return the fractional part of `turns`, in [0, 1)."""
    return turns - np.floor(turns)


def soft(value: Grid, gain: float) -> Grid:
    """Return a ramp from 0 to 1 around 0, `1 / gain` wide."""
    return (value * np.float32(gain) + np.float32(0.5)).clip(0, 1)


@dataclass(frozen=True)
class Frame:
    """A grid of pixels in a texture's own units: u = a x + b y + c, v = d x + e y + f at pixel centres."""

    width: int
    height: int
    a: float
    b: float
    c: float
    d: float
    e: float
    f: float

    def coordinates(self) -> tuple[Grid, Grid]:
        """Return the texture units (u, v) of each pixel, each (height, width) float32."""
        x = np.arange(self.width, dtype=np.float32) + np.float32(0.5)
        y = (np.arange(self.height, dtype=np.float32) + np.float32(0.5))[:, None]
        return x * self.a + y * self.b + self.c, x * self.d + y * self.e + self.f

    def turned(self, degrees: float, scale: float = 1.0, u: float = 0.0, v: float = 0.0) -> "Frame":
        """Return the same pixels in rotated units, `scale` times larger and shifted by (u, v)."""
        cos, sin = turn(degrees)
        cos, sin = cos / scale, sin / scale
        return Frame(
            self.width, self.height,
            cos * self.a - sin * self.d, cos * self.b - sin * self.e, cos * self.c - sin * self.f + u,
            sin * self.a + cos * self.d, sin * self.b + cos * self.e, sin * self.c + cos * self.f + v,
        )  # fmt: skip

    def noise(self, rng: np.random.Generator, cell_u: float, cell_v: float) -> Grid:
        """Return smooth noise, (height, width) float32 mostly in [0, 1], with bumps of the given size in units."""
        corners = [(x, y) for x in (0, self.width) for y in (0, self.height)]
        us = [self.a * x + self.b * y + self.c for x, y in corners]
        vs = [self.d * x + self.e * y + self.f for x, y in corners]
        # The bicubic filter reads two cells more on each side.
        shape = (math.ceil((max(vs) - min(vs)) / cell_v) + 5, math.ceil((max(us) - min(us)) / cell_u) + 5)
        grid = Image.fromarray(rng.random(shape, dtype=np.float32))
        to_grid = (
            self.a / cell_u, self.b / cell_u, (self.c - min(us)) / cell_u + 2,
            self.d / cell_v, self.e / cell_v, (self.f - min(vs)) / cell_v + 2,
        )  # fmt: skip
        size = (self.width, self.height)
        return np.asarray(grid.transform(size, Image.Transform.AFFINE, to_grid, Image.Resampling.BICUBIC))
