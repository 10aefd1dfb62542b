"""Shards hold the group's rows in order, leave no file behind and survive a kill."""

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.pipeline.test_concepts import make_features
from transfgu_ray.algorithms.concepts import sharded_kmeans as lloyd
from transfgu_ray.engine.parts import part_files
from transfgu_ray.engine.session import Resources
from transfgu_ray.engine.signs import Sign
from transfgu_ray.errors import ArtifactError
from transfgu_ray.pipeline.shards import (
    Piece,
    PointShard,
    ShardPlan,
    actor_shards,
    count_shards,
    gpu_share,
    plan_shards,
    read_points,
)
from transfgu_ray.storage import Folder

UNSEEN = Sign("test")


@pytest.fixture
def features(tmp_path: Path) -> Folder:
    return make_features(tmp_path / "run", 20_000, rows_per_part=3000)


def group(run: Folder, kind: str = "foreground") -> tuple[list[tuple[str, int]], np.ndarray]:
    """Return the rows of each part, and all rows."""
    of_part = {name: read_points(run, name, kind) for name in part_files(run, "features")}
    return [(name, len(points)) for name, points in of_part.items()], np.concatenate(list(of_part.values()))


def test_plan_shards__worked_by_hand() -> None:
    parts = [("a", 5000), ("b", 0), ("c", 20_000), ("d", 100)]
    # 25,100 rows are three blocks of 8,192 and a rest of 524.
    assert plan_shards(parts, 1) == [ShardPlan(0, 25_100, (Piece("a", 0), Piece("c", 5000), Piece("d", 25_000)))]
    assert plan_shards(parts, 3) == [
        ShardPlan(0, 8192, (Piece("a", 0), Piece("c", 5000))),
        ShardPlan(8192, 16_384, (Piece("c", 5000),)),
        ShardPlan(16_384, 25_100, (Piece("c", 5000), Piece("d", 25_000))),
    ]
    assert [(plan.start, plan.stop) for plan in plan_shards(parts, 9)] == [
        (0, 8192), (8192, 16_384), (16_384, 24_576), (24_576, 25_100),
    ]  # fmt: skip
    # Parts that end where a shard does are read once.
    whole = [("a", 8192), ("b", 8192)]
    assert [plan.pieces for plan in plan_shards(whole, 2)] == [(Piece("a", 0),), (Piece("b", 8192),)]


def resources(device: str, num_workers: int, threads: int = 1) -> Resources:
    return Resources(64, num_workers, 1, device, threads, None)


@pytest.mark.parametrize(
    ("nodes", "threads", "expected"),
    [
        # Two GPUs and 64 cores on a machine; on two of their own beside one without; few cores; more than one thread.
        ([{"CPU": 64, "GPU": 2}], 1, 16),
        ([{"CPU": 48}, {"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 1}], 1, 16),
        ([{"CPU": 48}, {"CPU": 16, "GPU": 1}, {"CPU": 3, "GPU": 1}], 1, 6),
        ([{"CPU": 1, "GPU": 2}], 1, 2),
        ([{"CPU": 64, "GPU": 2}], 8, 8),
        # All GPUs are gone for the moment.
        ([{"CPU": 64}], 1, 2),
    ],
)
def test_count_shards__several_share_a_gpu_and_each_has_a_core(
    nodes: list[dict[str, float]], threads: int, expected: int
) -> None:
    assert count_shards(resources("cuda", 2, threads), nodes) == expected


def test_count_shards__without_gpus_as_many_as_workers() -> None:
    assert count_shards(resources("cpu", 5), [{"CPU": 64, "GPU": 2}]) == 5


def test_gpu_share__fills_each_gpu_and_no_more() -> None:
    assert gpu_share(resources("cpu", 2), 16) == 0
    for num_gpus in range(1, 10):
        for num_shards in range(1, 8 * num_gpus + 1):
            share = gpu_share(resources("cuda", num_gpus), num_shards)
            # As Ray counts.
            assert round(share * 10_000) == share * 10_000
            on_each = int(1 / share)
            assert on_each * num_gpus >= num_shards, "all find room"
            assert (on_each - 1) * num_gpus < num_shards, "on all GPUs"
    assert gpu_share(resources("cuda", 2), 13) == 0.1428


def test_point_shard__holds_its_rows_in_order(features: Folder) -> None:
    parts, points = group(features)
    rows = np.sort(np.random.default_rng(0).choice(len(points), 300, replace=False))
    taken = []
    for plan in plan_shards(parts, 2):
        shard = PointShard(features.uri, "foreground", plan=plan, threads=1, use_gpu=False, sign=UNSEEN)
        own = points[plan.start : plan.stop]
        assert shard.load() == (float(np.abs(own).max()), False)
        assert np.array_equal(shard.take(np.arange(len(points))), own)
        # A block is overwritten by the next.
        blocks = [block.copy() for block in shard._blocks()]
        assert [len(block) for block in blocks[:-1]] == [lloyd.BLOCK_ROWS] * (len(blocks) - 1)
        assert np.array_equal(np.concatenate(blocks), own)
        taken.append(shard.take(rows))
    assert np.array_equal(np.concatenate(taken), points[rows])


def test_point_shard__leaves_no_file(features: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    (plan,) = plan_shards(group(features)[0], 1)
    shard = PointShard(features.uri, "foreground", plan=plan, threads=1, use_gpu=False, sign=UNSEEN)
    shard.load()
    # Not even while it is in use, so that a kill leaves none either.
    assert list(disk.iterdir()) == []


def test_point_shard__a_full_disk_is_reported(features: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", partial(open, "/dev/full", "r+b", buffering=0))
    (plan,) = plan_shards(group(features)[0], 1)
    with pytest.raises(ArtifactError, match=r"cannot keep \d+ foreground class tokens in .*No space left.*TMPDIR"):
        PointShard(features.uri, "foreground", plan=plan, threads=1, use_gpu=False, sign=UNSEEN).load()


def ask_for_ten_seconds(actor: Any) -> None:
    """Call an actor until it has ended: `ray.kill` does not wait for that."""
    import ray

    for _ in range(100):
        ray.get(actor.peak_mb.remote())
        time.sleep(0.1)


@pytest.mark.ray
def test_actor_shards__a_killed_actor_goes_on_and_all_end(features: Folder, local_ray: None) -> None:
    import ray

    parts, points = group(features)
    centroids = points[:5].astype(np.float32)
    with actor_shards(
        features, "foreground", parts=parts, resources=Resources(2, 2, 1, "cpu", 1, None), sign=UNSEEN
    ) as shards:
        before = shards.sum_nearest(centroids)
        ray.kill(shards._actors[1], no_restart=False)
        after = shards.sum_nearest(centroids)
        assert sum(sums.num_points.sum() for sums in after) == len(points)
        for a, b in zip(before, after, strict=True):
            assert np.array_equal(a.sums, b.sums)
        assert 50 < shards.peak_mb() < 2048
    for actor in shards._actors:
        with pytest.raises(ray.exceptions.RayActorError):
            ask_for_ten_seconds(actor)
