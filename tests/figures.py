"""The figure of README.md from a finished run of the demo: `python -m tests.figures transfgu-demo/run`."""

import io
import sys
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from transfgu_ray.reports.page import sample_numbers
from transfgu_ray.storage import Folder

_OUT = Path(__file__).resolve().parents[1] / ".figures"
_PANELS = ("photograph", "prior attention", "pseudo-label", "initial", "trained", "bootstrapped", "truth")
_NUM_ROWS = 3


def draw_strips(run: Folder, out: Path) -> None:
    """The first photographs that the seed chose, from prior to truth."""
    names = sample_numbers(run)[:_NUM_ROWS]
    figure = Figure(figsize=(10, 1.45 * len(names) + 0.2), dpi=120)
    for axes, name in zip(figure.subplots(len(names)), names, strict=True):
        strip = Image.open(io.BytesIO(run.read_bytes(f"samples/strip_{name}.jpg")))
        axes.imshow(strip)
        axes.axis("off")
        if name == names[0]:
            width = strip.width / len(_PANELS)
            for i, title in enumerate(_PANELS):
                axes.text((i + 0.5) * width, -4, title, ha="center", va="bottom", fontsize=9)
    figure.subplots_adjust(left=0, right=1, bottom=0.01, top=0.95, hspace=0.03)
    figure.savefig(out, pil_kwargs={"quality": 88})


if __name__ == "__main__":
    _OUT.mkdir(exist_ok=True)
    draw_strips(Folder(sys.argv[1]), _OUT / "demo.jpg")
