"""The golden files of `tests/assets`: each comparison with the published code, and the command that prints them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.golden.cases import compare_all

GOLDEN = Path(__file__).parent / "assets/golden"
ROWS = list(compare_all(GOLDEN))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_released__computes_what_the_published_code_computes(row):
    assert row.same, f"differs by {row.difference:.3g}, limit {row.limit:g}"


def test_golden__every_file_is_compared():
    assert {path.stem for path in GOLDEN.glob("*.npz")} == {
        "encoder", "response_maps", "keep_mass", "windows", "crops", "decoder", "losses", "optimiser", "metrics",
        "preprocess",
    }  # fmt: skip
    assert len(ROWS) == 56


def test_golden__the_command_ends_with_1_where_a_case_differs(tmp_path):
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "golden"))
    arrays = dict(np.load(folder / "keep_mass.npz"))
    kept = np.argwhere(arrays["kept"] & (arrays["maps"] > 0))[0]
    arrays["kept"][tuple(kept)] = False
    np.savez(folder / "keep_mass.npz", **arrays)
    command = [sys.executable, "-m", "tests.golden", str(folder), "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "DIFFERS keep_mass: 1 (limit 0)" in done.stdout
    assert "55 of 56 same" in done.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["name"] for row in rows if not row["same"]] == ["keep_mass"]
