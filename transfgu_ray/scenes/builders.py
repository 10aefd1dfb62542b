"""The parts of each thing in painting order; proportions vary with the generator, kinds of parts do not."""

from collections.abc import Callable

import numpy as np

from transfgu_ray.scenes.shapes import Material, Part, blob, box, dome, ellipse, polygon

HOLE, BODY, SECOND, TRIM, GLASS, DARK, LIGHT, _ = Material


def _eye(x: float, y: float, r: float) -> list[Part]:
    return [(LIGHT, ellipse(x, y, r, r)), (DARK, ellipse(x - 0.25 * r, y, 0.55 * r, 0.55 * r))]


def _wheel(x: float, y: float, r: float) -> list[Part]:
    return [(DARK, ellipse(x, y, r, r)), (LIGHT, ellipse(x, y, 0.5 * r, 0.5 * r))]


def _feet(x: float, y: float, width: float) -> list[Part]:
    return [(DARK, box(side - 0.09, y, side + 0.09, y + 0.16)) for side in (x - width, x + width)]


def _leaves(y: float, length: float, degrees: float) -> list[Part]:
    right = ellipse(0, 0, length / 2, 0.27 * length, -degrees)
    right = right - right[16] + (0.04, y)
    return [(SECOND, right), (SECOND, right * (-1, 1))]


def _pot(top: float, width: float) -> list[Part]:
    body = polygon((-width, top), (width, top), (0.72 * width, 1), (-0.72 * width, 1))
    return [(TRIM, body), (DARK, box(-1.12 * width, top - 0.05, 1.12 * width, top + 0.13, 0.05))]


def _zebra(rng: np.random.Generator) -> list[Part]:
    leg, head = rng.uniform(0.15, 0.19), rng.uniform(-0.06, 0.06)
    parts: list[Part] = [(TRIM, blob((0.75, -0.3), (1.08, -0.2), (1.02, 0.5), (0.86, 0.5), (0.8, 0)))]
    for x in (-0.42, 0.62):
        parts += [(SECOND, box(x - leg, 0.2, x + leg, 0.9)), (DARK, box(x - leg, 0.82, x + leg, 1))]
    parts.append((BODY, blob((-0.75, -0.45), (0.1, -0.5), (1, -0.5), (1, 0.5), (0.1, 0.65), (-0.7, 0.6))))
    for x in (-0.16, 0.36):
        parts += [(BODY, box(x - leg, 0.3, x + leg, 0.92)), (DARK, box(x - leg, 0.84, x + leg, 1.03))]
    parts += [
        (TRIM, blob((-0.55, -1.02), (-0.2, -0.95), (0.22, -0.35), (-0.1, -0.2))),
        (BODY, polygon((-0.72, -0.75), (-0.32, -0.85), (0.12, -0.35), (-0.2, 0.25), (-0.72, 0.1))),
        (SECOND, polygon((-0.5, -0.8), (-0.42, -1.15), (-0.28, -0.78))),
        (BODY, blob((-0.9, -0.95), (-0.3, -1), (-0.3, -0.45), (-0.75, -0.2 + head), (-1.1, -0.2 + head))),
        (SECOND, ellipse(-0.9, -0.38 + head, 0.22, 0.19, -20)),
        *_eye(-0.56, -0.72, 0.1),
    ]
    return parts


def _turtle(rng: np.random.Generator) -> list[Part]:
    height, neck = rng.uniform(0.85, 1.05), rng.uniform(-0.1, 0.08)
    return [
        (SECOND, polygon((0.75, 0.2), (1.05, 0.38), (0.7, 0.45))),
        (SECOND, box(-0.52, 0.25, -0.12, 0.75, 0.12)),
        (SECOND, box(0.38, 0.25, 0.78, 0.75, 0.12)),
        (SECOND, blob((-0.2, -0.05), (-0.7, -0.3 + neck), (-1.15, -0.4 + neck), (-1.2, 0.2 + neck), (-0.2, 0.45))),
        (BODY, dome(0.18, 0.3, 0.82, height)),
        (TRIM, box(-0.68, 0.22, 1.02, 0.42, 0.1)),
        (DARK, box(-1.02, 0.02 + neck, -0.8, 0.07 + neck)),
        *_eye(-0.8, -0.13 + neck, 0.11),
    ]


def _fish(rng: np.random.Generator) -> list[Part]:
    tall, fork = rng.uniform(0.56, 0.66), rng.uniform(0.5, 0.7)
    return [
        (TRIM, polygon((0.5, 0), (1.02, -0.62), (0.72 + 0.3 * fork, 0), (1.02, 0.62))),
        (SECOND, blob((-0.5, -0.35), (-0.2, -0.98), (0.5, -0.85), (0.55, -0.2))),
        (SECOND, blob((-0.3, 0.35), (0.1, 0.95), (0.45, 0.8), (0.4, 0.3))),
        (BODY, ellipse(-0.13, 0, 0.87, tall)),
        (LIGHT, blob((-1.02, 0), (-0.85, -0.42), (-0.52, -0.5), (-0.4, 0), (-0.52, 0.5), (-0.85, 0.42))),
        (TRIM, blob((-0.15, 0), (0.22, -0.12), (0.32, 0.3), (0, 0.24))),
        (DARK, polygon((-1, 0.08), (-0.72, 0.14), (-0.97, 0.18))),
        (SECOND, ellipse(-0.67, -0.12, 0.15, 0.15)),
        (DARK, ellipse(-0.69, -0.12, 0.08, 0.08)),
    ]


def _car(rng: np.random.Generator) -> list[Part]:
    roof, r = rng.uniform(-0.7, -0.55), rng.uniform(0.27, 0.31)
    front, back = rng.uniform(0.45, 0.6), rng.uniform(-0.75, -0.6)
    return [
        (SECOND, blob((back - 0.2, 0.25), (back, roof), (front - 0.2, roof), (front + 0.3, 0.2))),
        (GLASS, polygon((back + 0.1, -0.05), (back + 0.16, roof + 0.24), (-0.15, roof + 0.2), (-0.15, -0.05))),
        (GLASS, polygon((-0.03, -0.05), (-0.03, roof + 0.2), (front - 0.28, roof + 0.24), (front, -0.05))),
        (BODY, box(-1, -0.08, 1, 0.62, 0.24)),
        (TRIM, box(-1.04, 0.42, 1.04, 0.6, 0.06)),
        (LIGHT, ellipse(0.89, 0.14, 0.1, 0.13)),
        (DARK, box(-0.2, 0.1, 0, 0.16)),
        *_wheel(-0.56, 0.6, r),
        *_wheel(0.56, 0.6, r),
    ]


def _bus(rng: np.random.Generator) -> list[Part]:
    top, count, r = rng.uniform(-0.85, -0.7), int(rng.integers(3, 5)), rng.uniform(0.2, 0.24)
    parts: list[Part] = [
        (BODY, box(-1, top, 1, 0.68, 0.12)),
        (SECOND, box(-1, top, 1, top + 0.2, 0.1)),
        (TRIM, box(-1.02, 0.52, 1.02, 0.68, 0.04)),
        (LIGHT, box(0.62, top + 0.32, 0.9, 0.6, 0.04)),
        (GLASS, box(0.67, top + 0.38, 0.85, 0.15)),
    ]
    width = 1.45 / count
    for i in range(count):
        x = -0.92 + i * width
        parts.append((GLASS, box(x, top + 0.32, x + 0.82 * width, top + 0.78, 0.04)))
    return [*parts, *_wheel(-0.56, 0.68, r), *_wheel(0.4, 0.68, r)]


def _boat(rng: np.random.Generator) -> list[Part]:
    deck, funnel = rng.uniform(0.05, 0.15), rng.uniform(-0.1, 0.2)
    parts: list[Part] = [
        (SECOND, polygon((funnel, -0.95), (funnel + 0.36, -0.95), (funnel + 0.4, -0.3), (funnel - 0.04, -0.3))),
        (DARK, polygon((funnel - 0.03, -0.98), (funnel + 0.39, -0.98), (funnel + 0.39, -0.78), (funnel - 0.03, -0.78))),
        (LIGHT, box(-0.62, -0.5, 0.62, deck + 0.05, 0.05)),
        (TRIM, box(-0.72, -0.56, 0.72, -0.42, 0.05)),
    ]
    parts += [(GLASS, ellipse(x, -0.18, 0.14, 0.14)) for x in (-0.4, 0, 0.4)]
    parts += [
        (BODY, blob((-1.05, deck), (-1.05, deck), (1.1, deck), (1.1, deck), (0.75, 0.9), (-0.7, 0.9))),
        (TRIM, polygon((-1, deck - 0.04), (1.05, deck - 0.04), (1, deck + 0.12), (-0.96, deck + 0.12))),
        *_wheel(-0.12, 0.48, 0.27),
    ]
    return parts


def _sofa(rng: np.random.Generator) -> list[Part]:
    back, arm = rng.uniform(-0.75, -0.6), rng.uniform(-0.25, -0.1)
    return [
        *_feet(0, 0.62, 0.78),
        (BODY, box(-0.88, back, 0.88, 0.4, 0.25)),
        (TRIM, box(-0.9, 0.38, 0.9, 0.66, 0.05)),
        (LIGHT, box(-0.66, 0.02, -0.01, 0.42, 0.1)),
        (LIGHT, box(0.01, 0.02, 0.66, 0.42, 0.1)),
        (SECOND, box(-1.02, arm, -0.64, 0.68, 0.18)),
        (SECOND, box(0.64, arm, 1.02, 0.68, 0.18)),
        (DARK, ellipse(-0.83, arm + 0.18, 0.1, 0.1)),
        (DARK, ellipse(0.83, arm + 0.18, 0.1, 0.1)),
    ]


def _wardrobe(rng: np.random.Generator) -> list[Part]:
    half, drawer = rng.uniform(0.7, 0.8), rng.uniform(0.4, 0.5)
    parts: list[Part] = [
        *_feet(0, 0.86, half - 0.12),
        (SECOND, box(-half, -0.9, half, 0.9)),
        (BODY, box(-half + 0.08, -0.76, half - 0.08, drawer - 0.05)),
        (SECOND, box(-0.05, -0.8, 0.05, drawer)),
        (LIGHT, box(-half + 0.08, drawer + 0.05, half - 0.08, 0.82)),
        (TRIM, polygon((-half - 0.1, -1), (half + 0.1, -1), (half, -0.8), (-half, -0.8))),
    ]
    parts += [(DARK, ellipse(x, -0.12, 0.07, 0.1)) for x in (-0.17, 0.17)]
    parts += [(DARK, box(x - 0.12, drawer + 0.15, x + 0.12, drawer + 0.25, 0.04)) for x in (-0.35, 0.35)]
    return parts


def _teapot(rng: np.random.Generator) -> list[Part]:
    spout, lid = rng.uniform(-0.45, -0.3), rng.uniform(0.25, 0.35)
    return [
        *_feet(0, 0.66, 0.34),
        (SECOND, ellipse(0.66, 0.06, 0.4, 0.44)),
        (HOLE, ellipse(0.7, 0.06, 0.18, 0.24)),
        (SECOND, blob((-0.4, 0.6), (-1, spout), (-1.2, spout - 0.12), (-0.8, spout - 0.15), (-0.35, -0.2))),
        (BODY, ellipse(0, 0.16, 0.72, 0.63)),
        (TRIM, dome(0, -0.3, 0.46, lid)),
        (LIGHT, box(-0.52, -0.36, 0.52, -0.24, 0.06)),
        (DARK, ellipse(0, -0.36 - lid, 0.14, 0.14)),
    ]


def _cactus(rng: np.random.Generator) -> list[Part]:
    left, right = rng.uniform(-0.55, -0.3), rng.uniform(-0.45, -0.15)
    return [
        (BODY, box(-0.86, left, -0.5, 0.25, 0.18)),
        (BODY, box(-0.8, 0, -0.2, 0.28, 0.14)),
        (BODY, box(0.5, right, 0.86, 0.35, 0.18)),
        (BODY, box(0.2, 0.1, 0.8, 0.38, 0.14)),
        (BODY, box(-0.42, -0.9, 0.42, 0.62, 0.4)),
        (LIGHT, ellipse(-0.14, -0.9, 0.16, 0.1, 40)),
        (LIGHT, ellipse(0.14, -0.9, 0.16, 0.1, -40)),
        (SECOND, ellipse(0, -0.92, 0.09, 0.1)),
        *_pot(0.45, rng.uniform(0.52, 0.62)),
    ]


def _flower(rng: np.random.Generator) -> list[Part]:
    count, reach = int(rng.integers(6, 9)), rng.uniform(0.36, 0.42)
    parts: list[Part] = [
        (SECOND, box(-0.09, 0, 0.09, 0.7)),
        *_leaves(0.62, 0.8, rng.uniform(20, 40)),
        *_pot(0.55, rng.uniform(0.42, 0.52)),
    ]
    first = rng.uniform(0, 60)
    for i in range(count):
        cos, sin = (ellipse(0, 0, 1, 1, first + 360 * i / count))[0]
        petal = ellipse(reach * cos, -0.34 + reach * sin, 0.33, 0.24, first + 360 * i / count)
        parts.append((BODY, petal))
    return [*parts, (LIGHT, ellipse(0, -0.34, 0.26, 0.26)), (DARK, ellipse(0, -0.34, 0.14, 0.14))]


def _mushroom(rng: np.random.Generator) -> list[Part]:
    cap, stem = rng.uniform(0.85, 1), rng.uniform(0.3, 0.4)
    return [
        (LIGHT, blob((-stem, -0.3), (stem, -0.3), (stem + 0.05, 0.3), (stem + 0.25, 1.1), (-stem - 0.25, 1.1))),
        (TRIM, box(-stem - 0.06, 0.2, stem + 0.06, 0.36, 0.08)),
        (LIGHT, ellipse(0, 0, 0.72, 0.17)),
        (BODY, blob((-1.1, 0.12), (-0.95, -cap), (0, -1.12), (0.95, -cap), (1.1, 0.12), (0, -0.12))),
        *_leaves(0.95, 0.85, rng.uniform(15, 30)),
        (DARK, dome(0, 1, 0.66, 0.22)),
    ]


Builder = Callable[[np.random.Generator], list[Part]]
# In the order of the classes: builder of the parts, typical surface, and the middle of that surface.
BUILDERS: tuple[tuple[Builder, str, tuple[float, float]], ...] = (
    (_zebra, "stripes", (0, 0)),
    (_turtle, "cells", (0.2, 0)),
    (_fish, "scales", (0, 0)),
    (_car, "checks", (0, 0.3)),
    (_bus, "bands", (0, 0)),
    (_boat, "zigzag", (0, 0.4)),
    (_sofa, "diamonds", (0, -0.3)),
    (_wardrobe, "panels", (0, 0)),
    (_teapot, "rings", (0, 0.2)),
    (_cactus, "ribs", (0, 0)),
    (_flower, "rays", (0, -0.34)),
    (_mushroom, "dots", (0, -0.4)),
)
