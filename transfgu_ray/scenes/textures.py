"""Surfaces as luminance patterns: 12 for objects, 4 for stuff, 3 for clutter.

Each takes a generator and a frame and returns (height, width) float32 in [0, 1], which blends two colours. Object
patterns are in units of half the object's side, the others in scene pixels.
"""

import colorsys
from collections.abc import Callable

import numpy as np

from transfgu_ray.scenes.frame import Frame, Grid, saw, soft, wave

Texture = Callable[[np.random.Generator, Frame], Grid]
_LUMA = np.array([0.299, 0.587, 0.114])


def stripes(rng: np.random.Generator, frame: Frame) -> Grid:
    """Draw upright stripes that bend."""
    u, _ = frame.coordinates()
    bend = frame.noise(rng, 0.55, 0.55) * rng.uniform(0.5, 0.9)
    return soft(wave(u / rng.uniform(0.3, 0.42) + bend), 2.5)


def cells(rng: np.random.Generator, frame: Frame) -> Grid:
    """Draw blotches separated by gaps of even width."""
    u, v = frame.coordinates()
    pitch = rng.uniform(0.42, 0.56)
    far = np.float32(99)
    nearest, second = np.full_like(u, far), np.full_like(u, far)
    for row in range(-3, 4):
        for column in range(-3, 4):
            du, dv = rng.uniform(-0.32, 0.32, 2)
            distance = np.square(u - (column + du + 0.5 * (row % 2)) * pitch) + np.square(v - (row + dv) * pitch)
            second = np.minimum(second, np.maximum(nearest, distance))
            nearest = np.minimum(nearest, distance)
    return soft(np.sqrt(second) - np.sqrt(nearest) - 0.09, 14)


def scales(rng: np.random.Generator, frame: Frame) -> Grid:
    """Draw overlapping scales, each darker towards its rim."""
    u, v = frame.coordinates()
    pitch = rng.uniform(0.3, 0.4)
    rows = v / (0.5 * pitch)
    row = np.floor(rows)
    here = np.square(saw(u / pitch + 0.5 * (row % 2)) - 0.5) + np.square(0.5 * (rows - row))
    above = np.square(saw(u / pitch + 0.5 * ((row + 1) % 2)) - 0.5) + np.square(0.5 * (rows - row + 1))
    # A scale of the row above covers this one where they overlap.
    distance = np.sqrt(np.where(above < 0.36, above, here + 0.12))
    shade: Grid = np.clip(1.15 - 1.9 * np.square(distance) - soft(distance - 0.53, 16), 0, 1)
    return shade


def checks(rng: np.random.Generator, frame: Frame) -> Grid:
    """Draw a checkerboard."""
    u, v = frame.coordinates()
    period = rng.uniform(0.42, 0.56)
    return soft(wave(u / period + rng.uniform()) * wave(v / period + rng.uniform()), 4)


def bands(rng: np.random.Generator, frame: Frame) -> Grid:
    """Draw level bands, alternately wide and thin."""
    _, v = frame.coordinates()
    phase = saw(v / rng.uniform(0.44, 0.6) + rng.uniform())
    return np.maximum(soft(0.23 - abs(phase - 0.28), 12), soft(0.07 - abs(phase - 0.75), 12))


def zigzag(rng: np.random.Generator, frame: Frame) -> Grid:
    """Draw level bands that zigzag sharply."""
    u, v = frame.coordinates()
    tooth = abs(saw(u / rng.uniform(0.44, 0.6)) - 0.5)
    return soft(wave(v / rng.uniform(0.34, 0.44) + 1.4 * tooth), 2.5)


def diamonds(rng: np.random.Generator, frame: Frame) -> Grid:
    """Draw a slanted lattice of lines with a button where they cross."""
    u, v = frame.coordinates()
    period = rng.uniform(0.4, 0.52)
    one, other = abs(saw((u + v) / period) - 0.5), abs(saw((u - v) / period) - 0.5)
    line = soft(np.maximum(one, other) - 0.41, 14)
    return np.maximum(line, soft(np.minimum(one, other) - 0.35, 14))


def panels(rng: np.random.Generator, frame: Frame) -> Grid:
    """Draw tall frames around recessed boards."""
    u, v = frame.coordinates()
    width = rng.uniform(0.55, 0.75)
    rim = np.maximum(abs(saw(u / width) - 0.5), abs(saw(v / (width * rng.uniform(1.1, 1.4)) + rng.uniform()) - 0.5))
    return np.clip(0.25 + 0.75 * soft(rim - 0.27, 14) - soft(rim - 0.43, 18), 0, 1)


def rings(rng: np.random.Generator, frame: Frame) -> Grid:
    """Draw circles around the middle."""
    u, v = frame.coordinates()
    return soft(wave(np.sqrt(u * u + v * v) / rng.uniform(0.3, 0.4) + rng.uniform()), 2.5)


def ribs(rng: np.random.Generator, frame: Frame) -> Grid:
    """Draw narrow upright ridges, each with a row of spines."""
    u, v = frame.coordinates()
    pitch = rng.uniform(0.22, 0.28)
    across = saw(u / pitch + 0.5) - 0.5
    ridge = 1 - 4 * np.square(across)
    spine = soft(0.2 - np.maximum(abs(across), abs(saw(v / (0.8 * pitch)) - 0.5)), 8)
    shade: Grid = np.clip(0.85 * ridge * (1 - spine), 0, 1)
    return shade


def rays(rng: np.random.Generator, frame: Frame) -> Grid:
    """Draw spokes from the middle."""
    u, v = frame.coordinates()
    radius = np.sqrt(u * u + v * v) + np.float32(1e-3)
    step = cos, sin = u / radius, v / radius
    # Angle sums instead of an arctangent keep the bits the same everywhere.
    for _ in range(int(rng.integers(7, 12))):
        cos, sin = cos * step[0] - sin * step[1], sin * step[0] + cos * step[1]
    return soft(cos, 1.8)


def dots(rng: np.random.Generator, frame: Frame) -> Grid:
    """Draw round dots in staggered rows."""
    u, v = frame.coordinates()
    pitch = rng.uniform(0.4, 0.54)
    rows = v / (0.8 * pitch) + rng.uniform()
    row = np.floor(rows)
    across = saw(u / pitch + 0.5 * (row % 2)) - 0.5
    return soft(0.31 - np.sqrt(np.square(across) + np.square(0.8 * (rows - row - 0.5))), 9)


SURFACES: dict[str, Texture] = {
    each.__name__: each
    for each in (stripes, cells, scales, checks, bands, zigzag, diamonds, panels, rings, ribs, rays, dots)
}


def grass(rng: np.random.Generator, frame: Frame) -> Grid:
    """Draw blades that lean two ways."""
    lean = rng.uniform(8, 20)
    left, right = frame.turned(lean).noise(rng, 3.4, 17), frame.turned(-lean).noise(rng, 3.4, 17)
    return soft(np.maximum(left, right) - 0.6, 1.9)


def water(rng: np.random.Generator, frame: Frame) -> Grid:
    """Draw level ripples that run into one another."""
    _, v = frame.coordinates()
    swell = frame.noise(rng, 46, 15) * rng.uniform(1.3, 1.9)
    crest = wave(v / rng.uniform(13, 18) + swell)
    shade: Grid = np.clip(0.45 + 0.3 * crest + 0.9 * np.maximum(crest - 0.6, 0), 0, 1)
    return shade


def brick(rng: np.random.Generator, frame: Frame) -> Grid:
    """Draw courses of bricks, each with its own shade, in bright mortar."""
    u, v = frame.coordinates()
    rows = v / rng.uniform(13, 17)
    row = np.floor(rows)
    columns = u / rng.uniform(29, 37) + 0.5 * (row % 2)
    column = np.floor(columns)
    shades = rng.random(1024, dtype=np.float32)
    shade: Grid = shades[(row.astype(np.int32) * 37 + column.astype(np.int32)) & 1023]
    edge = np.maximum(abs(columns - column - 0.5) - 0.455, 0.45 * (abs(rows - row - 0.5) - 0.41))
    mortar = soft(edge, 40)
    return (0.45 * shade) * (1 - mortar) + mortar


def planks(rng: np.random.Generator, frame: Frame) -> Grid:
    """Draw upright boards with grain, dark gaps and an occasional joint."""
    u, v = frame.coordinates()
    boards = u / rng.uniform(17, 24)
    board = np.floor(boards)
    shades = rng.random(256, dtype=np.float32)
    own: Grid = shades[board.astype(np.int32) & 255]
    grain = wave(boards * 2.5 + 2.2 * frame.noise(rng, 7, 60) + 7 * own)
    joint = soft(0.008 - abs(saw(v / 110 + 7 * own) - 0.5), 60)
    gap = np.maximum(soft(abs(boards - board - 0.5) - 0.45, 22), joint)
    shade: Grid = np.clip(0.5 + 0.4 * own + 0.14 * grain, 0, 1) * (1 - gap)
    return shade


# In the order of the classes.
STUFF: tuple[Texture, ...] = (grass, water, brick, planks)


def blobs(rng: np.random.Generator, frame: Frame) -> Grid:
    """Draw round patches of random size."""
    cell = rng.uniform(8, 26)
    return soft(frame.noise(rng, cell, cell) - 0.5, rng.uniform(2, 9))


def speckle(rng: np.random.Generator, frame: Frame) -> Grid:
    """Draw fine grain."""
    return np.clip(frame.noise(rng, *rng.uniform(1.5, 6, 2)), 0, 1)


def waves(rng: np.random.Generator, frame: Frame) -> Grid:
    """Draw plain stripes of any width, sharp or soft."""
    u, _ = frame.coordinates()
    return soft(wave(u / rng.uniform(6, 40)), rng.uniform(0.5, 4))


CLUTTER: tuple[Texture, ...] = (blobs, speckle, waves)


def random_colour(rng: np.random.Generator, low: float, high: float) -> Grid:
    """Draw a colour of any hue and saturation with a luminance in [low, high]; (3,) in [0, 1].

    Luminance separates light from dark materials, as paint does on real things; hue and saturation carry no meaning.
    """
    hue, saturation = rng.random(2)
    colour = np.array(colorsys.hsv_to_rgb(hue, saturation**0.7, 1.0), dtype=np.float32)
    wanted, own = rng.uniform(low, high), luminance(colour)
    if wanted <= own:
        return colour * np.float32(wanted / own)
    # A saturated blue cannot be bright, so it is mixed with white up to the luminance.
    return colour + (1 - colour) * np.float32((wanted - own) / max(1 - own, 1e-6))


def luminance(colour: Grid) -> float:
    """Return the perceived brightness in [0, 1]."""
    return float((colour * _LUMA).sum())


def random_pair(rng: np.random.Generator, dark: tuple[float, float], bright: tuple[float, float]) -> Grid:
    """Draw a dark and a bright colour, each of any hue, with luminances in the given ranges; (2, 3) float32."""
    return np.stack([random_colour(rng, *dark), random_colour(rng, *bright)])


def paint(pattern: Grid, pair: Grid) -> Grid:
    """Blend two colours (2, 3) by a pattern (...); (..., 3) float32."""
    painted: Grid = pair[0] + pattern[..., None] * (pair[1] - pair[0])
    return painted
