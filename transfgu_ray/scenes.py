"""A few rendered scenes for `transfgu demo`: coloured shapes on striped grounds, no third-party art."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

_SIZE_PX = 192


def render_scenes(folder: str, count: int = 24, seed: int = 0) -> None:
    """Writes `count` PNG scenes, the same for the same seed."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        _render(rng).save(target / f"scene_{number:03d}.png")


def _render(rng: np.random.Generator) -> Image.Image:
    y, x = np.mgrid[:_SIZE_PX, :_SIZE_PX]
    angle, period = rng.uniform(0, np.pi), rng.uniform(8, 24)
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period)
    ground = rng.uniform(60, 200, 3) + 30 * wave[..., None] + rng.normal(0, 6, (_SIZE_PX, _SIZE_PX, 3))
    image = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(2, 5)):
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        radius = float(rng.uniform(18, 44))
        centre = rng.uniform(radius, _SIZE_PX - radius, 2)
        sides = int(rng.choice([3, 4, 6, 40]))
        draw.regular_polygon((*centre, radius), sides, rotation=float(rng.uniform(0, 360)), fill=colour)
    return image
