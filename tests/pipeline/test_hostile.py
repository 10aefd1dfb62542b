"""Corpora with hostile files among the photographs: each is refused with a reason and costs no memory."""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.faults.hostile import MANY, make_hostile_corpus
from tests.fixtures import TINY, make_run, transfgu

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems know no such links, pipes or names")
# One crop per photograph, and none dropped.
ONE_CROP = ("data.region_mode=no_prior", "extract.window_fracs=[1.0]", "extract.images_per_part=64")


def check(run: Path, good: set[str], bad: dict[str, str]) -> dict[str, Any]:
    """Check that extract used all good files and named all bad ones; return its manifest."""
    manifest = json.loads((run / "extract.json").read_bytes())
    refused = {refusal["image_id"]: refusal["reason"].partition(":")[0] for refusal in manifest["refused"]}
    assert refused == bad
    assert len(manifest["refused"]) == len(bad), "each is named once"
    assert manifest["refused_by_reason"] == Counter(bad.values())
    assert (manifest["rows_in"], manifest["images"], manifest["rows_out"]) == (len(good | bad.keys()), *[len(good)] * 2)
    rows = pq.read_table(run / "features", columns=["image_id"])["image_id"].to_pylist()
    assert rows == sorted(good)
    return manifest


def test_extract__names_every_hostile_file(tmp_path: Path, local_ray: None) -> None:
    good, bad = make_hostile_corpus(tmp_path / "data", num_images=300, share=0.1)
    assert (len(good), len(bad)) == (270 + 3, 30 - 3)
    assert len(set(bad.values())) == 10
    make_run(tmp_path / "run", tmp_path / "data", *ONE_CROP, stages=("extract",))
    check(tmp_path / "run", good, bad)


def extract(run: Path, data: Path) -> None:
    """Run in processes of its own, so that their peak memory is not that of another test."""
    settings = [word for each in (*TINY, *ONE_CROP) for word in ("--set", each)]
    process = transfgu("extract", str(run), "--preset", "tiny_cpu", "--data", str(data), *settings)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    assert "\x1b" not in output
    assert max(map(len, output.splitlines())) < 500


@pytest.mark.long
def test_extract__ten_thousand_files_with_hostile_ones_take_no_more_memory(tmp_path: Path) -> None:
    clean, none = make_hostile_corpus(tmp_path / "clean", num_images=600, share=1e-9)
    good, bad = make_hostile_corpus(tmp_path / "data", num_images=12_000)
    assert not none
    assert len(os.listdir(tmp_path / "data" / "many")) == MANY
    assert len(bad) > 500
    extract(tmp_path / "small", tmp_path / "clean")
    extract(tmp_path / "run", tmp_path / "data")
    small = check(tmp_path / "small", clean, {})
    large = check(tmp_path / "run", good, bad)
    assert large["peak_memory_mb"] <= 1.1 * small["peak_memory_mb"]
