"""Closing lines of commands, as a terminal shows them."""

import io

import pytest
from rich.console import Console

from transfgu_ray.cli.terminal import Terminal
from transfgu_ray.cli.words import note_plan

# As `planning.plan.plan` returns it, of a large run.
ROW = {"forwards": 16_803_594, "operations": 337_123 * 10**15, "num_bytes": 13_879_768_644, "seconds": 3_600_000.0}


def planned(gpu_seconds: dict[int, float], card: str | None, tflops: float | None) -> dict:
    stages = ("extract", "concepts", "labels", "train", "evaluate")
    size = {"count": 16_803_594, "image_hw": (160, 160), "class_only": True, "operations_each": 19_123_456_789}
    return {
        "stages": [{"stage": name, **ROW, "gpu_seconds": gpu_seconds} for name in stages],
        "all": {**ROW, "gpu_seconds": gpu_seconds},
        "passes": [size, {**size, "class_only": False}],
        "photographs": 118_287,
        "scored": 5_000,
        "workers": 2,
        "train_workers": 1,
        "device": "cpu" if card is None else "cuda",
        "card": card,
        "gpu_tflops": tflops,
        "calibration_seconds": 80.2,
        "nodes": 4,
        "files": 1_315,
        "dollars": None if tflops is None else 1234.5,
    }


@pytest.mark.parametrize(
    ("gpu_seconds", "card", "tflops", "words"),
    [
        ({}, None, None, "no GPU was timed"),
        ({1: 7e6, 8: 9e5}, None, 40.0, "a lower bound"),
        ({1: 7e6, 8: 9e5}, "NVIDIA H100 80GB HBM3", None, "as timed on NVIDIA H100 80GB HBM3"),
    ],
)
def test_note_plan__fits_a_narrow_terminal(
    gpu_seconds: dict[int, float], card: str | None, tflops: float | None, words: str
) -> None:
    terminal, screen = Terminal(quiet=False), io.StringIO()
    terminal._out = Console(file=screen, width=80, highlight=False, soft_wrap=True)
    note_plan(terminal, planned(gpu_seconds, card, tflops))
    shown = screen.getvalue()
    tables, _, notes = shown.partition("118287 photographs")
    assert max(map(len, tables.splitlines())) <= 80
    rows = [" ".join(line.split()) for line in tables.splitlines()]
    assert any(row.startswith("all 16,803,594 337,123 13.880 1000.0 h") for row in rows)
    assert "160 x 160 px, class token 16,803,594 19.1 321" in rows
    assert ("8 GPUs" in tables, "at least" in tables) == (bool(gpu_seconds), tflops is not None)
    assert words in notes
    price = "; 1,234.50 dollars on 4 node(s)" if tflops else ""
    assert f"features and bank: 1,315 files{price}\n" in notes
