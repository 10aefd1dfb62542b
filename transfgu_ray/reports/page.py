"""What the HTML pages share: templates, figures and strips of pictures, all inside one file."""

import base64
import io
import itertools
import re
import zlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree  # nosec B405  # of our own text

import jinja2
import markupsafe
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
# Stands for the colour of the page's text in figures; no colour of a palette.
INK = "#010203"
_SVG = "{http://www.w3.org/2000/svg}"


def render(template: str, **values: Any) -> bytes:
    """A page from one of the package's templates; whatever is put into it is escaped."""
    environment = jinja2.Environment(loader=jinja2.PackageLoader("transfgu_ray"), autoescape=True)
    return environment.get_template(template).render(**values).encode()


def figure_png(figure: "Figure") -> str:
    """A figure as PNG in base64."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return base64.b64encode(buffer.getvalue()).decode()


def figure_svg(figure: "Figure", title: str) -> markupsafe.Markup:
    """A figure as an SVG element, whose lines and text in `INK` take the colour of the page's text, light or dark.

    Args:
        figure: drawn in `INK` where it is not in colour.
        title: what it shows, for those who cannot see it; also keeps its ids apart from those of other figures.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    # Text stays text, of the page's font; with a salt of its own the same figure has the same ids each time.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True)
    # What matplotlib has just written, with every text in it escaped.
    root = ElementTree.fromstring(buffer.getvalue())  # nosec B314  # our own text
    prefix = f"f{zlib.crc32(title.encode()):08x}-"
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag in (f"{_SVG}metadata", f"{_SVG}style")]:
            parent.remove(child)
            # Styles of a figure would be the whole page's; this is theirs.
            root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    for element in root.iter():
        if "id" in element.attrib:
            element.set("id", prefix + element.attrib["id"])
        for name, value in element.attrib.items():
            value = value.replace("url(#", f"url(#{prefix}").replace(INK, "currentColor")
            element.set(name, f"#{prefix}{value[1:]}" if name.endswith("href") and value[0] == "#" else value)
    for name in ("width", "height"):
        del root.attrib[name]
    root.set("role", "img")
    root.set("aria-label", title)
    ElementTree.register_namespace("", _SVG[1:-1])
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    text = ElementTree.tostring(root, encoding="unicode")
    # In HTML the names are known; without them the page names no address at all.
    return markupsafe.Markup(re.sub(r' xmlns(:\w+)?="[^"]*"', "", text, count=3))  # nosec B704


def plain_axes(axes: "Axes", grid: str) -> None:
    """Axes in `INK` without a box, with a faint grid.

    Args:
        axes: to be changed.
        grid: along which axis its values are: `x`, `y` or `both`.
    """
    axes.tick_params(labelsize=9, colors=INK)
    axes.spines[:].set_color(INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.grid(axis=grid, color="#808080", alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)


def within_bytes(pictures: Iterable[bytes], most: int) -> int:
    """How many of these, in order, take at most so many bytes as base64."""
    total = itertools.accumulate(4 * -(-len(picture) // 3) for picture in pictures)
    return sum(1 for _ in itertools.takewhile(lambda num_bytes: num_bytes <= most, total))


def sample_numbers(run: Folder) -> list[str]:
    """Names of the sample photographs of a run folder that the seed chose: 00, 01, ..."""
    return [name for name in sample_names(run) if name.isdigit()]


def sample_names(run: Folder) -> list[str]:
    """Names of all its sample photographs: 00, 01, ..., then best_0, ..., worst_0, ..."""
    return sorted({name.split("/")[1] for name, _ in run.files("samples", recursive=True) if name.count("/") == 2})


def sample_photo(run: Folder, number: str) -> Image.Image:
    """A sample photograph at the size of its masks."""
    return Image.open(io.BytesIO(run.read_bytes(f"samples/{number}/photo.jpg")), formats=FORMATS).convert("RGB")


def sample_mask(run: Folder, number: str, *, name: str, photo: Image.Image, colours: np.ndarray) -> Image.Image | None:
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
    return overlay(photo, sample_labels(run, number, name), colours=colours, opacity=0.7)


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
