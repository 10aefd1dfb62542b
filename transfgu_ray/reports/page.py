"""What the HTML pages share: templates, figures and strips of pictures, all within one file."""

import base64
import io
import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from PIL import Image

from transfgu_ray.images import FORMATS
from transfgu_ray.reports.palette import overlay
from transfgu_ray.storage import Folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STRIP_HEIGHT_PX = 180
_GAP_PX = 4
# The narrowest figures are 3.6 inches wide: 1080 px, as many as a phone's screen has.
_FIGURE_DPI = 300
_MAX_LABEL_CHARS = 18


def render(template: str, **values: Any) -> bytes:
    """Return a page made from one of the package's templates; all values are escaped."""
    environment = jinja2.Environment(loader=jinja2.PackageLoader("transfgu_ray"), autoescape=True)
    return environment.get_template(template).render(**values).encode()


def figure_png(figure: "Figure") -> str:
    """Return a figure as PNG in base64, on white so that it reads the same on light and dark pages."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_FIGURE_DPI)
    return base64.b64encode(buffer.getvalue()).decode()


def plain_axes(axes: "Axes") -> None:
    """Take the box off axes and draw a faint grid behind their values."""
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)


def figure_label(text: str) -> str:
    """Return a text cut to fit a figure, which matplotlib does not take for a formula."""
    short = text if len(text) <= _MAX_LABEL_CHARS else f"{text[: _MAX_LABEL_CHARS - 1]}…"
    return short.replace("$", r"\$")


def within_bytes(pictures: Iterable[bytes], most: int) -> int:
    """Return how many of the first pictures fit in `most` bytes as base64."""
    total = itertools.accumulate(4 * -(-len(picture) // 3) for picture in pictures)
    return sum(1 for _ in itertools.takewhile(lambda num_bytes: num_bytes <= most, total))


def sample_numbers(run_folder: Folder) -> list[str]:
    """Return the names of the sample photographs that the seed chose: 00, 01, ..."""
    return [name for name in sample_names(run_folder) if name.isdigit()]


def sample_names(run_folder: Folder) -> list[str]:
    """Return the names of all sample photographs of a run: 00, 01, ..., then best_0, ..., worst_0, ..."""
    return sorted(
        {name.split("/")[1] for name, _ in run_folder.files("samples", recursive=True) if name.count("/") == 2}
    )


def sample_photo(run_folder: Folder, number: str) -> Image.Image:
    """Return a sample photograph at the size of its masks."""
    return Image.open(io.BytesIO(run_folder.read_bytes(f"samples/{number}/photo.jpg")), formats=FORMATS).convert("RGB")


def sample_mask(
    run_folder: Folder, number: str, *, name: str, photo: Image.Image, colours: np.ndarray
) -> Image.Image | None:
    """Return a sample photograph under one of its masks; None where there is no such mask.

    Args:
        run_folder: a run folder.
        number: name of the sample.
        name: `initial`, `trained`, `bootstrapped` or `truth`.
        photo: the photograph.
        colours: uint8 RGB of each class id, (classes, 3).
    """
    if not run_folder.exists(f"samples/{number}/{name}.png"):
        return None
    return overlay(photo, sample_labels(run_folder, number, name), colours=colours, opacity=0.7)


def sample_labels(run_folder: Folder, number: str, name: str) -> np.ndarray:
    """Return one of the masks of a sample photograph, class ids (height, width)."""
    return np.asarray(Image.open(io.BytesIO(run_folder.read_bytes(f"samples/{number}/{name}.png")), formats=FORMATS))


def strip_jpeg(panels: Sequence[Image.Image]) -> bytes:
    """Return pictures of the same shape side by side, as JPEG."""
    width = round(panels[0].width * _STRIP_HEIGHT_PX / panels[0].height)
    strip = Image.new("RGB", (len(panels) * (width + _GAP_PX) - _GAP_PX, _STRIP_HEIGHT_PX), "white")
    for i, panel in enumerate(panels):
        strip.paste(panel.resize((width, _STRIP_HEIGHT_PX)), (i * (width + _GAP_PX), 0))
    buffer = io.BytesIO()
    strip.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def hex_colour(rgb: np.ndarray) -> str:
    """Return a colour as CSS writes it."""
    red, green, blue = rgb
    return f"#{red:02x}{green:02x}{blue:02x}"
