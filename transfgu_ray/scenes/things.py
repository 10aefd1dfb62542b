"""One thing as a layer: coloured pixels and the share of each pixel that the thing covers."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from transfgu_ray.scenes.builders import BUILDERS
from transfgu_ray.scenes.frame import Frame, turn
from transfgu_ray.scenes.shapes import Material, Part
from transfgu_ray.scenes.textures import SURFACES, paint, random_colour, random_pair

# Silhouettes are drawn larger by this factor, then reduced.
_SUPERSAMPLE = 2
# The range of each material's luminance, whatever its hue.
_LUMINANCES = {
    Material.SECOND: (0.35, 0.6),
    Material.TRIM: (0.2, 0.45),
    Material.GLASS: (0.55, 0.8),
    Material.DARK: (0.02, 0.15),
    Material.LIGHT: (0.75, 0.95),
    Material.EDGE: (0.0, 0.1),
}


@dataclass(frozen=True)
class Layer:
    """A window of pixels to lay over a picture.

    Attributes:
        left: first column; may be negative.
        top: first row; may be negative.
        colour: (h, w, 3) float32, already multiplied by the cover.
        cover: (h, w) float32 in [0, 1].
    """

    left: int
    top: int
    colour: np.ndarray
    cover: np.ndarray

    def moved(self, right: int, down: int) -> "Layer":
        """Return the same window, moved."""
        return Layer(self.left + right, self.top + down, self.colour, self.cover)


def draw_thing(rng: np.random.Generator, class_id: int, *, side_px: float, centre_px: tuple[float, float]) -> Layer:
    """Draw one thing with random proportions, pose, colours and light.

    Args:
        rng: the only source of randomness.
        class_id: 0-11.
        side_px: longer side of the bounding box.
        centre_px: (x, y) of the middle of that box.
    """
    builder, typical, middle = BUILDERS[class_id]
    parts = builder(rng)
    a, b, c, d = _pose(rng)
    # Products are written out, since those of a linear algebra library differ in the last bit between processors.
    outlines = [np.stack([a * x + b * y, c * x + d * y], 1) for x, y in (points.T for _, points in parts)]
    low = np.min([points.min(0) for points in outlines], 0)
    high = np.max([points.max(0) for points in outlines], 0)
    scale = side_px / float((high - low).max())
    corner = np.array(centre_px) - scale * (high + low) / 2
    origin = np.floor(corner + scale * low).astype(int) - 1
    width, height = (np.ceil(corner + scale * high).astype(int) + 1 - origin).tolist()

    placed = [
        (material, points * scale + corner - origin) for (material, _), points in zip(parts, outlines, strict=True)
    ]
    index = _materials(placed, width, height=height, side_px=side_px)
    pair = random_pair(rng, (0.08, 0.22), (0.7, 0.9))
    index.putpalette(_palette(rng))
    flat = np.asarray(index.convert("RGB").reduce(_SUPERSAMPLE), dtype=np.float32) / np.float32(255)
    kinds = np.asarray(index)
    body, cover = _share(kinds == Material.BODY), _share(kinds != Material.HOLE)
    scaled = scale * (a * d - b * c)
    left, top = (origin - corner).tolist()
    frame = Frame(
        width, height,
        d / scaled, -b / scaled, (d * left - b * top) / scaled - middle[0],
        -c / scaled, a / scaled, (a * top - c * left) / scaled - middle[1],
    )  # fmt: skip
    colour = flat + body[..., None] * paint(SURFACES[typical](rng, frame), pair)
    return Layer(int(origin[0]), int(origin[1]), colour * _light(rng, width, height)[..., None], cover)


def _materials(parts: list[Part], width: int, *, height: int, side_px: float) -> Image.Image:
    """Paint parts over one another, each with an outline; return an enlarged palette image."""
    thickness = max(1, round(_SUPERSAMPLE * side_px / 75))
    index = Image.new("P", (width * _SUPERSAMPLE, height * _SUPERSAMPLE))
    draw = ImageDraw.Draw(index)
    for material, points in parts:
        # Pillow's origin is the middle of the first pixel, that of the parts its corner.
        path = (points * _SUPERSAMPLE - 0.5).ravel().tolist()
        draw.polygon(path, fill=int(material))
        if material != Material.HOLE:
            draw.line(path + path[:2], fill=int(Material.EDGE), width=thickness)
    return index


def _pose(rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Draw the rows of a 2 x 2 matrix: flip, aspect and shear of up to 10 %, then a turn of up to 12 degrees."""
    cos, sin = turn(rng.uniform(-12, 12))
    aspect, shear = rng.uniform(0.9, 1.11), rng.uniform(-0.1, 0.1)
    aspect *= 1 if rng.random() < 0.5 else -1
    return cos * aspect, cos * shear - sin, sin * aspect, sin * shear + cos


def _palette(rng: np.random.Generator) -> list[int]:
    """Draw the RGB of each material; body and hole stay black: one is painted later and the other is empty."""
    colours = np.zeros((len(Material), 3), dtype=np.float32)
    for material, (low, high) in _LUMINANCES.items():
        colours[material] = random_colour(rng, low, high)
    return np.rint(colours * 255).astype(int).ravel().tolist()


def _share(large: np.ndarray) -> np.ndarray:
    """Return the share of each pixel that is set, (h, w) float32, from (h s, w s) bool."""
    s = _SUPERSAMPLE
    counts = [large[i::s, j::s].astype(np.float32) for i in range(s) for j in range(s)]
    share: np.ndarray = sum(counts[1:], start=counts[0]) / np.float32(s * s)
    return share


def _light(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Return light that increases towards one side; (height, width) float32 around 0.95."""
    cos, sin = turn(rng.uniform(0, 360))
    strength = rng.uniform(0.1, 0.3)
    x = np.linspace(-1, 1, width, dtype=np.float32)
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    return np.float32(0.95) + x * (strength * cos) + y * (strength * sin)
