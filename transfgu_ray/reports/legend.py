"""What the class ids of a mask mean, for people and for other programs."""

from typing import Any

from PIL import Image, ImageDraw, ImageFont

from transfgu_ray.models.names import Names
from transfgu_ray.reports.page import hex_colour
from transfgu_ray.reports.palette import class_colours

_ROW_PX = 28
_ROWS = 24


def legend(names: Names) -> list[dict[str, Any]]:
    """Return id, name, kind and CSS colour of each class that a mask may hold, in order of id."""
    colours = class_colours(names.num_classes, names.background_id)
    kinds = [*names.kinds, "none"]
    return [{"id": i, "name": names.label(i), "kind": kinds[i], "colour": hex_colour(colours[i])} for i in names.used]


def legend_image(entries: list[dict[str, Any]]) -> Image.Image:
    """Return the legend as a picture: a swatch and a name per class, in columns."""
    font = ImageFont.load_default(16)
    texts = [entry["name"] for entry in entries]
    column_px = 48 + round(max(font.getlength(text) for text in texts))
    columns, rows = -(-len(texts) // _ROWS), min(len(texts), _ROWS)
    image = Image.new("RGB", (columns * column_px + 12, rows * _ROW_PX + 12), "white")
    draw = ImageDraw.Draw(image)
    for i, entry in enumerate(entries):
        left, top = 12 + i // _ROWS * column_px, 12 + i % _ROWS * _ROW_PX
        draw.rectangle((left, top, left + 20, top + 16), fill=entry["colour"], outline="grey")
        draw.text((left + 28, top + 8), texts[i], fill="black", font=font, anchor="lm")
    return image
