"""Concepts do not depend on workers or parts, whether a group fits into one worker or is spread over several."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.algorithms.concepts.test_sharded_kmeans import InMemory
from tests.fixtures import Counted
from transfgu_ray.algorithms.concepts.hierarchical_kmeans import Hierarchy, fit_hierarchy, fit_sharded_hierarchy
from transfgu_ray.algorithms.concepts.kmeans import KMeans, fit_concepts
from transfgu_ray.algorithms.concepts.sharded_kmeans import fit_sharded_concepts
from transfgu_ray.config.presets import get_preset
from transfgu_ray.config.run import RunConfig, build_config
from transfgu_ray.datasets.listing import Listing
from transfgu_ray.engine.job import Job
from transfgu_ray.engine.parts import part_name
from transfgu_ray.engine.progress import Progress
from transfgu_ray.engine.session import Resources
from transfgu_ray.engine.stream import unwrapped_errors
from transfgu_ray.errors import DataError
from transfgu_ray.pipeline.concepts import cluster
from transfgu_ray.pipeline.context import StageJob
from transfgu_ray.runs.run import Run
from transfgu_ray.runs.stages import STAGES
from transfgu_ray.runs.tables import build_table, features_schema, to_parquet
from transfgu_ray.storage import Folder

NUM_ROWS = 30_000
HOW = KMeans(seed=0, num_iterations=6, min_crops=1)


def make_features(folder: Path, num_rows: int, rows_per_part: int, bad_row: int | None = None) -> Folder:
    """Write features of width 8, nine in ten of them foreground, the same for any division into parts."""
    rng = np.random.default_rng(0)
    tokens = np.round(4 * rng.normal(size=(num_rows, 8))).astype(np.float16)
    kinds = np.where(np.arange(num_rows) % 10 == 3, "background", "foreground")
    if bad_row is not None:
        tokens[bad_row, 0] = np.nan
    run = Folder(str(folder))
    for unit, first in enumerate(range(0, num_rows, rows_per_part)):
        rows = np.arange(first, min(first + rows_per_part, num_rows))
        columns = {
            "image_id": [f"{row}.jpg" for row in rows],
            "crop_id": np.zeros(len(rows), np.int32),
            "box_xyxy": np.zeros((len(rows), 4), np.int32),
            "window_frac": np.zeros(len(rows), np.float32),
            "kind": kinds[rows].tolist(),
            "foreground_frac": np.zeros(len(rows), np.float32),
            "cls_token": tokens[rows],
        }
        run.write_bytes(part_name("features", unit), to_parquet(build_table(columns, features_schema(8)), {}))
    return run


class Told(Counted):
    """Adds up what was done, and keeps what was said once for as long as it was."""

    def __init__(self, add: Callable[[int], None], words: list[str]) -> None:
        super().__init__(add)
        self._words = words

    def expect(self, total: int) -> None:
        self._words.append(f"{total} expected")

    def __call__(self, done: int = 0, words: str = "", *, refused: int = 0) -> None:
        super().__call__(done)
        if words not in ("", *self._words[-1:]):
            self._words.append(words)


def tokens_of(run: Folder, kind: str) -> np.ndarray:
    features = pq.read_table(run.join("features")).to_pandas()
    return np.stack(features["cls_token"][features["kind"] == kind].to_list())


def config(*settings: str) -> RunConfig:
    named = ["data.region_mode=things_and_stuff", "concepts.num_concepts=9", "concepts.num_background=3"]
    fixed = ["concepts.num_iterations=6", "concepts.num_redos=1"]
    return build_config(get_preset("tiny_cpu"), None, [*named, *fixed, *settings])


def fit(
    run: Folder, num_workers: int, *settings: str, progress: Progress | None = None
) -> tuple[dict, np.ndarray, list[int]]:
    """Return the groups in the manifest, the centroids and their numbers of crops."""
    resources = Resources(2, num_workers, 1, "cpu", 1, None)
    with unwrapped_errors():
        job = Job(
            folder=run,
            config=config(*settings),
            root=run,
            resources=resources,
            fingerprint="these settings",
            progress=progress or Progress(),
        )
        groups, peak_mb = cluster(job, NUM_ROWS)
    assert 50 < peak_mb < 2048
    table = pq.read_table(run.join("concepts.parquet")).to_pandas()
    assert table["kind"].tolist() == ["foreground"] * 6 + ["background"] * 3
    return groups, np.stack(table["centroid"].to_list()), table["num_crops"].tolist()


@pytest.mark.ray
def test_cluster__small_groups_are_clustered_by_one_worker(tmp_path: Path, local_ray: None) -> None:
    run = make_features(tmp_path / "run", NUM_ROWS, rows_per_part=7000)
    groups, centroids, num_crops = fit(run, 2)
    expected = [
        fit_concepts(tokens_of(run, kind).astype(np.float32), count, how=HOW, group=kind)
        for kind, count in (("foreground", 6), ("background", 3))
    ]
    assert centroids.tobytes() == np.concatenate([group.centroids for group in expected]).tobytes()
    assert num_crops == np.concatenate([group.num_crops for group in expected]).tolist()
    assert {kind: group["passes"] for kind, group in groups.items()} == {"foreground": 0, "background": 0}


@pytest.mark.ray
def test_cluster__large_group_is_the_same_for_any_workers_and_parts(tmp_path: Path, local_ray: None) -> None:
    # Of 27,000 foreground crops, four blocks, 5,000 are drawn; the 3,000 background crops stay in memory.
    fitted = []
    for num_workers, rows_per_part in ((1, NUM_ROWS), (2, 700), (3, 7777)):
        run = make_features(tmp_path / str(num_workers), NUM_ROWS, rows_per_part)
        fitted.append(fit(run, num_workers, "concepts.init_points=5000"))
    points = InMemory(tokens_of(run, "foreground"))
    expected = fit_sharded_concepts(points, 6, how=HOW, init_points=5000, group="foreground")
    background = fit_concepts(tokens_of(run, "background").astype(np.float32), 3, how=HOW, group="")
    for groups, centroids, num_crops in fitted:
        assert centroids.tobytes() == np.concatenate([expected.centroids, background.centroids]).tobytes()
        assert num_crops == [*expected.num_crops, *background.num_crops]
        assert groups["foreground"] == {
            "concepts": 6, "points_used": 27_000, "points_total": 27_000, "passes": 7, "resumed_at_pass": None,
            "reseeded": 0,
            "smallest_concept_crops": expected.num_crops.min(), "used_gpu": False,
        }  # fmt: skip
        assert groups["background"]["passes"] == 0
        assert groups["background"]["points_total"] == 3000


@pytest.mark.ray
def test_cluster__large_group_with_a_cap_uses_no_more(tmp_path: Path, local_ray: None) -> None:
    run = make_features(tmp_path / "run", NUM_ROWS, rows_per_part=7000)
    groups, centroids, num_crops = fit(run, 1, "concepts.init_points=5000", "concepts.max_points=4000")
    points = tokens_of(run, "foreground").astype(np.float32)
    expected = fit_concepts(points, 6, how=replace(HOW, max_points=4000), group="")
    assert centroids[:6].tobytes() == expected.centroids.tobytes()
    assert num_crops[:6] == expected.num_crops.tolist()
    assert (groups["foreground"]["points_used"], groups["foreground"]["points_total"]) == (4000, 27_000)


HIERARCHY = ("concepts.method=hierarchical", "concepts.num_resamples=2", "concepts.init_points=5000")


@pytest.mark.ray
def test_cluster__hierarchy_is_the_same_for_any_workers_and_ends(tmp_path: Path, local_ray: None) -> None:
    points, hierarchy = None, Hierarchy(2, 5000)
    for num_workers, rows_per_part in ((1, NUM_ROWS), (3, 7777)):
        run = make_features(tmp_path / str(num_workers), NUM_ROWS, rows_per_part)
        if points is None:
            points = {kind: tokens_of(run, kind) for kind in ("foreground", "background")}
            large = fit_sharded_hierarchy(InMemory(points["foreground"]), 6, how=HOW, hierarchy=hierarchy, group="")
            small = fit_hierarchy(points["background"].astype(np.float32), 3, how=HOW, hierarchy=hierarchy, group="")
        words: list[str] = []
        groups, centroids, num_crops = fit(run, num_workers, *HIERARCHY, progress=Told(lambda done: None, words))
        assert centroids.tobytes() == np.concatenate([large.centroids, small.centroids]).tobytes()
        assert num_crops == [*large.num_crops, *small.num_crops]
        # Seven and four passes of the foreground, and three times six of the background.
        assert words[0] == "29 expected"
        assert "foreground: pass 11 of 11" in words
        found = groups["foreground"]
        assert (found["passes"], found["resumed_at_pass"], groups["background"]["passes"]) == (11, None, 0)
        assert found["levels"] == [
            {"points": 27_000, "clusters": 78, "passes": 9, "resamples": 2},
            {"points": 78, "clusters": 22, "passes": 8, "resamples": 2},
            {"points": 22, "clusters": 6, "passes": 8, "resamples": 2},
        ]
        assert found["largest_concept_crops"] == large.num_crops.max()
        assert found["smallest_concept_crops_by_hierarchy"] == large.num_below.min()
        assert found["largest_concept_crops_by_hierarchy"] == large.num_below.max()
    # Ended between two resampling steps, the next call goes on after the first.
    expected = run.read_bytes("concepts.parquet")
    run.delete("concepts.parquet")
    with pytest.raises(KeyboardInterrupt):
        fit(run, 2, *HIERARCHY, progress=Ended([], "foreground: pass 9 of 11"))
    groups, *_ = fit(run, 2, *HIERARCHY)
    assert run.read_bytes("concepts.parquet") == expected
    assert (groups["foreground"]["passes"], groups["foreground"]["resumed_at_pass"]) == (11, 8)


class Ended(Told):
    """Ends the process, as far as it is concerned, when a pass is shown: it was kept by then or never."""

    def __init__(self, words: list[str], at: str) -> None:
        super().__init__(lambda done: None, words)
        self._at = at

    def __call__(self, done: int = 0, words: str = "", *, refused: int = 0) -> None:
        super().__call__(done, words)
        if words == self._at:
            raise KeyboardInterrupt


@pytest.mark.ray
def test_cluster__an_ended_one_goes_on_after_its_last_pass_to_the_same_bytes(tmp_path: Path, local_ray: None) -> None:
    run = make_features(tmp_path / "run", NUM_ROWS, rows_per_part=7000)
    whole, *_ = fit(run, 2, "concepts.init_points=5000")
    expected = run.read_bytes("concepts.parquet")
    assert not run.exists("concepts"), "deleted once the concepts are written"
    run.delete("concepts.parquet")
    words: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        fit(run, 2, "concepts.init_points=5000", progress=Ended(words, "foreground: pass 4 of 7"))
    assert run.exists("concepts/passes-foreground.safetensors")
    assert not run.exists("concepts.parquet")
    words.clear()
    groups, *_ = fit(run, 1, "concepts.init_points=5000", progress=Told(lambda done: None, words))
    assert run.read_bytes("concepts.parquet") == expected
    assert not run.exists("concepts")
    # The three passes that were kept, not the fourth, which was shown before its centroids were.
    assert groups["foreground"] == whole["foreground"] | {"resumed_at_pass": 3}
    assert next(word for word in words if "foreground" in word) == "foreground: pass 4 of 7"


@pytest.mark.ray
def test_cluster__refuses_class_tokens_that_are_not_finite(tmp_path: Path, local_ray: None) -> None:
    run = make_features(tmp_path / "run", NUM_ROWS, rows_per_part=7000, bad_row=20_001)
    with pytest.raises(DataError, match=r"the foreground class tokens hold NaN or infinity; check encoder\.weights"):
        fit(run, 1, "concepts.init_points=5000")


@pytest.mark.ray
def test_concepts__manifest_has_passes_and_the_workers_memory(tmp_path: Path, local_ray: None) -> None:
    folder = make_features(tmp_path / "run", NUM_ROWS, rows_per_part=7000)
    run = Run(folder, config("concepts.init_points=5000"))
    run.write_manifest("extract", "", {"rows_out": NUM_ROWS, "weights_sha256": "0" * 64})
    done, words = [], []
    resources = Resources(2, 1, 1, "cpu", 1, None)
    job = StageJob(
        folder=folder,
        config=run.config,
        root=folder,
        resources=resources,
        fingerprint="",
        progress=Told(done.append, words),
        run=run,
        listing=Listing(()),
        inputs="",
    )
    content = STAGES["concepts"].function(job)
    # Six passes over the background, in memory; six and one to count over the foreground.
    assert words[0] == "13 expected"
    assert sum(done) == 13
    assert [word for word in words if word.startswith("foreground: pass")][0::7] == ["foreground: pass 1 of 7"]
    assert (content["rows_in"], content["rows_out"]) == (NUM_ROWS, 9)
    assert content["groups"]["foreground"]["passes"] == 7
    assert 50 < content["peak_memory_mb"] < 2048
    assert content["weights_sha256"] == "0" * 64
