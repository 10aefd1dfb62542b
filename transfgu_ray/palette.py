"""Colours of masks: fixed for the first classes, then spread by the golden ratio."""

import colorsys

import numpy as np
from PIL import Image

# Okabe and Ito's colour-blind-safe palette, without its black, which is the background's.
_OKABE_ITO = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)


def class_colours(num_classes: int, background_id: int | None) -> np.ndarray:
    """RGB of each class id, uint8 of shape (num_classes, 3); the background is black."""
    colours = list(_OKABE_ITO)
    for i in range(len(colours), num_classes):
        hue = i * 0.618033988749895 % 1.0
        red, green, blue = colorsys.hsv_to_rgb(hue, (0.55, 0.75, 0.95)[i % 3], (0.95, 0.7, 0.85)[i // 3 % 3])
        colours.append((round(red * 255), round(green * 255), round(blue * 255)))
    table = np.array(colours[:num_classes], dtype=np.uint8)
    if background_id is not None:
        # The classes after it keep their colours: the background takes none of the palette.
        table = np.insert(table, background_id, 0, axis=0)[:num_classes]
    return table


def palette_image(mask: np.ndarray, colours: np.ndarray) -> Image.Image:
    """A mask as an image: palette PNG up to 256 classes (void 255 white), plain 16-bit beyond."""
    if len(colours) > 256:
        return Image.fromarray(mask.astype(np.uint16))
    image = Image.fromarray(mask.astype(np.uint8))
    table = np.full((256, 3), 255, dtype=np.uint8)
    table[: len(colours)] = colours
    image.putpalette(table.tobytes())
    return image


def overlay(photo: Image.Image, mask: np.ndarray, colours: np.ndarray, opacity: float = 0.55) -> Image.Image:
    """The photograph with each class's colour laid over it; where the mask is 255 of a labelled set, white."""
    table = np.full((max(256, len(colours)), 3), 255, dtype=np.uint8)
    table[: len(colours)] = colours
    return Image.blend(photo, Image.fromarray(table[mask]), opacity)
