"""Outlines from which things are built: points (N, 2), x right and y down, in units of half the thing's side."""

from enum import IntEnum

import numpy as np
import numpy.typing as npt

from transfgu_ray.scenes.frame import turn

_CIRCLE = np.array([turn(360 * i / 32) for i in range(32)])
_ARC = np.array([turn(90 * i / 5) for i in range(6)])


class Material(IntEnum):
    """The material of a part; each has one colour per thing.

    HOLE cuts through to the background. BODY carries the surface pattern.
    """

    HOLE = 0
    BODY = 1
    SECOND = 2
    TRIM = 3
    GLASS = 4
    DARK = 5
    LIGHT = 6
    EDGE = 7


Outline = npt.NDArray[np.float64]
Part = tuple[Material, Outline]


def ellipse(x: float, y: float, rx: float, ry: float, degrees: float = 0) -> Outline:
    """Return an ellipse around (x, y), turned clockwise."""
    cos, sin = turn(degrees)
    px, py = _CIRCLE[:, 0] * rx, _CIRCLE[:, 1] * ry
    return np.stack([x + cos * px - sin * py, y + sin * px + cos * py], 1)


def box(x0: float, y0: float, x1: float, y1: float, corner: float = 0) -> Outline:
    """Return a rectangle with rounded corners."""
    r = min(corner, (x1 - x0) / 2, (y1 - y0) / 2)
    if r <= 0:
        return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    arc, back = _ARC * r, _ARC[::-1] * r
    corners = np.array([(x1 - r, y1 - r), (x0 + r, y1 - r), (x0 + r, y0 + r), (x1 - r, y0 + r)])
    rounded: Outline = np.concatenate([arc, back * (-1, 1), -arc, back * (1, -1)])
    return np.repeat(corners, len(_ARC), axis=0) + rounded


def polygon(*points: tuple[float, float]) -> Outline:
    """Return straight edges between the points."""
    return np.array(points)


def blob(*points: tuple[float, float]) -> Outline:
    """Return a smooth closed curve along the points (Chaikin's corner cutting)."""
    outline = np.array(points)
    for _ in range(3):
        following = np.roll(outline, -1, axis=0)
        outline = np.stack([0.75 * outline + 0.25 * following, 0.25 * outline + 0.75 * following], 1).reshape(-1, 2)
    return outline


def dome(x: float, y: float, rx: float, ry: float) -> Outline:
    """Return the upper half of an ellipse that stands on the level y."""
    upper = _CIRCLE[16:]
    return np.concatenate([np.stack([x + upper[:, 0] * rx, y + upper[:, 1] * ry], 1), [(x + rx, y)]])
