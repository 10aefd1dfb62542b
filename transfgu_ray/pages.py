"""What the HTML pages share: templates, figures and strips of pictures, all inside one file."""

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from PIL import Image

from transfgu_ray.images import FORMATS
from transfgu_ray.palette import overlay
from transfgu_ray.storage import Folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STRIP_HEIGHT_PX = 180
_GAP_PX = 4


def render(template: str, **values: Any) -> bytes:
    """A page from one of the package's templates; whatever is put into it is escaped."""
    environment = jinja2.Environment(loader=jinja2.PackageLoader("transfgu_ray"), autoescape=True)
    return environment.get_template(template).render(**values).encode()


def figure_png(figure: "Figure") -> str:
    """A figure as PNG in base64."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return base64.b64encode(buffer.getvalue()).decode()


def sample_numbers(run: Folder) -> list[str]:
    """Names of the sample photographs of a run folder: 00, 01, ..."""
    return sorted({name.split("/")[1] for name, _ in run.files("samples", recursive=True) if name.count("/") == 2})


def sample_photo(run: Folder, number: str) -> Image.Image:
    """A sample photograph at the size of its masks."""
    return Image.open(io.BytesIO(run.read_bytes(f"samples/{number}/photo.jpg")), formats=FORMATS).convert("RGB")


def sample_mask(run: Folder, number: str, name: str, photo: Image.Image, colours: np.ndarray) -> Image.Image | None:
    """One of the masks of a sample photograph laid over it; None where there is no such mask.

    Args:
        run: a run folder.
        number: of the sample.
        name: `initial`, `trained`, `bootstrapped` or `truth`.
        photo: the photograph.
        colours: uint8 RGB of each class id, (classes, 3).
    """
    if not run.exists(f"samples/{number}/{name}.png"):
        return None
    return overlay(photo, sample_labels(run, number, name), colours, opacity=0.7)


def sample_labels(run: Folder, number: str, name: str) -> np.ndarray:
    """One of the masks of a sample photograph, class ids (height, width)."""
    return np.asarray(Image.open(io.BytesIO(run.read_bytes(f"samples/{number}/{name}.png")), formats=FORMATS))


def strip_jpeg(panels: Sequence[Image.Image]) -> bytes:
    """Pictures of one shape side by side, as JPEG."""
    width = round(panels[0].width * _STRIP_HEIGHT_PX / panels[0].height)
    strip = Image.new("RGB", (len(panels) * (width + _GAP_PX) - _GAP_PX, _STRIP_HEIGHT_PX), "white")
    for i, panel in enumerate(panels):
        strip.paste(panel.resize((width, _STRIP_HEIGHT_PX)), (i * (width + _GAP_PX), 0))
    buffer = io.BytesIO()
    strip.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def hex_colour(rgb: np.ndarray) -> str:
    """A colour as CSS writes it."""
    red, green, blue = rgb
    return f"#{red:02x}{green:02x}{blue:02x}"
