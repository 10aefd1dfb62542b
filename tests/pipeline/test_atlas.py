"""The atlas: examples of each concept from a finished run, the same for any number of workers."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.builders import listed
from tests.fixtures import open_run
from transfgu_ray.config.sections import RuntimeConfig
from transfgu_ray.datasets.listing import open_root
from transfgu_ray.engine.job import Job
from transfgu_ray.engine.session import ray_session
from transfgu_ray.pipeline.atlas import CROPS_PER_CONCEPT, MAPS_PER_CONCEPT, build_atlas
from transfgu_ray.pipeline.concepts import read_concepts
from transfgu_ray.pipeline.train_data import decode_bank_row
from transfgu_ray.runs.run import Run
from transfgu_ray.storage import Folder

pytestmark = pytest.mark.ray


def table_of(run: Run, name: str) -> list[dict]:
    return pq.read_table(Path(run.folder.path) / name).to_pylist()


def test_atlas__crops_are_the_nearest_of_their_concept_one_per_photograph(finished: Run) -> None:
    kinds, centroids = read_concepts(finished.folder)
    want: dict[int, dict[str, float]] = {concept: {} for concept in range(len(kinds))}
    for crop in table_of(finished, "features"):
        distances = np.linalg.norm(centroids - np.array(crop["cls_token"], dtype=np.float32), axis=1)
        distances[[kind != crop["kind"] for kind in kinds]] = np.inf
        best = want[int(distances.argmin())]
        best[crop["image_id"]] = min(best.get(crop["image_id"], np.inf), float(distances.min()))
    shown = [row for row in table_of(finished, "atlas") if row["what"] == "crop"]
    assert shown
    for concept, of_concept in want.items():
        rows = sorted((row for row in shown if row["concept_id"] == concept), key=lambda row: row["rank"])
        nearest = sorted(of_concept.values())[:CROPS_PER_CONCEPT]
        assert [row["value"] for row in rows] == pytest.approx(nearest, rel=1e-3)
        assert len({row["image_id"] for row in rows}) == len(rows)


def test_atlas__maps_are_of_the_photographs_that_respond_most(finished: Run) -> None:
    kinds, _ = read_concepts(finished.folder)
    bank = table_of(finished, "labels")
    means = np.stack([decode_bank_row(row)[1].mean((1, 2)).numpy() for row in bank])
    winners = np.concatenate([decode_bank_row(row)[1].argmax(0).flatten().numpy() for row in bank])
    shown = [row for row in table_of(finished, "atlas") if row["what"] == "map"]
    for concept in range(len(kinds)):
        rows = sorted((row for row in shown if row["concept_id"] == concept), key=lambda row: row["rank"])
        assert [row["value"] for row in rows] == pytest.approx(sorted(means[:, concept])[::-1][:MAPS_PER_CONCEPT])
        picture = Image.open(io.BytesIO(rows[0]["picture"]))
        assert (picture.format, picture.size) == ("WEBP", (96, 72))
    entries = json.loads(finished.folder.read_bytes("atlas.json"))["concepts"]
    assert [each["patch_share"] for each in entries] == pytest.approx(np.bincount(winners, minlength=4) / len(winners))
    for concept, each in enumerate(entries):
        assert all(other != concept and 0 < share <= 1 for other, share in each["followed_by"])
    manifest = finished.require("evaluate")["atlas"]
    assert manifest["pictures"] == len(table_of(finished, "atlas"))


def test_atlas__does_not_depend_on_the_number_of_workers(finished: Run, tmp_path: Path) -> None:
    run = Run(Folder(str(shutil.copytree(finished.folder.path, tmp_path / "run"))), finished.config)
    names = ["atlas.json", *(name for name, _ in run.folder.files("atlas"))]
    before = {name: run.folder.read_bytes(name) for name in names}
    for name in ("atlas", "atlas.json"):
        run.folder.delete(name)
    data = run.config.data
    listing = listed(data, data.spec.train_split)
    fingerprint = finished.require("evaluate")["fingerprint"]
    with ray_session(None, RuntimeConfig()) as resources:
        for num_workers in (1, 3):
            given = replace(resources, num_workers=num_workers)
            job = Job(
                folder=run.folder,
                config=run.config,
                root=open_root(data.root),
                resources=given,
                fingerprint=fingerprint,
            )
            build_atlas(job, listing.images)
            assert {name: run.folder.read_bytes(name) for name in names} == before


@pytest.mark.slow
def test_atlas__is_left_out_where_no_pictures_are_wanted(finished: Run, voc: Path, tmp_path: Path) -> None:
    from tests.fixtures import Silent
    from transfgu_ray.pipeline.run import run_stages

    folder = shutil.copytree(finished.folder.path, tmp_path / "run")
    run = open_run(folder, voc, "evaluate.num_samples=0", dataset="voc", overwrite=True)
    run_stages(run, ("evaluate", "report"), address=None, reporter=Silent(), overwrite=True)
    for name in ("atlas", "atlas.json", "atlas.html", "samples"):
        assert not run.folder.exists(name)
