"""Tables of parts: the same for any workers, layouts and kills."""

import hashlib
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.builders import make_folder
from tests.faults.storage import s3_server
from transfgu_ray.config.presets import get_preset
from transfgu_ray.datasets.photographs import ImageRef
from transfgu_ray.engine import build as build_module
from transfgu_ray.engine.build import Layout, TableResult, build_table_of_parts
from transfgu_ray.engine.job import Job
from transfgu_ray.engine.parts import PartStats, PartWorker, read_row, unit_name
from transfgu_ray.engine.progress import Progress
from transfgu_ray.engine.session import Resources
from transfgu_ray.engine.stream import Photo
from transfgu_ray.runs.index import IndexWriter, part_metadata, part_name, read_index
from transfgu_ray.runs.tables import to_parquet
from transfgu_ray.storage import Folder

NUM_IMAGES, PER_UNIT = 23, 2


class Hasher(PartWorker):
    """One row per photograph: its name and hash. Says in a file that it was asked; refuses one photograph."""

    rows_apart = True

    def process(self, unit: int, photos: list[Photo]) -> bytes:
        stats, rows = PartStats(), []
        if self.run_folder.is_local:
            Folder(f"{self.run_folder.uri}-asked").write_bytes(str(unit), b"")
        for photo in photos:
            if photo.image_id == "photo_005.jpg":
                stats.refused.append({"image_id": photo.image_id, "reason": "the fifth"})
                continue
            stats.images += 1
            rows.append({"image_id": photo.image_id, "sha256": hashlib.sha256(photo.data or b"").hexdigest()})
        return self.write(unit, pa.Table.from_pylist(rows, SCHEMA), stats=stats)


SCHEMA = pa.schema([pa.field("image_id", pa.string(), nullable=False), pa.field("sha256", pa.string(), nullable=False)])


class Counted(Progress):
    """Counts what is done."""

    def __init__(self) -> None:
        self.done = self.refused = 0

    def __call__(self, done: int = 0, words: str = "", *, refused: int = 0) -> None:
        self.done += done
        self.refused += refused


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("photographs"), num_images=NUM_IMAGES)


@pytest.fixture(params=[256, 3], ids=["a unit a part", "four units a part"])
def fewest_parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(build_module, "_FEWEST_PARTS", request.param)
    return int(request.param)


def build(uri: str, photographs: Path, num_workers: int = 1) -> tuple[TableResult, Counted]:
    names = sorted(path.name for path in photographs.iterdir())
    counted = Counted()
    job = Job(
        folder=Folder(uri),
        config=get_preset("tiny_cpu"),
        root=Folder(str(photographs)),
        resources=Resources(2, num_workers, 1, device="cpu", threads=1, num_blocks=None),
        fingerprint="f",
        progress=counted,
    )
    images = [ImageRef(name, None, 0) for name in names]
    return build_table_of_parts(job, "t", images=images, images_per_unit=PER_UNIT, worker=Hasher), counted


def expected(photographs: Path) -> list[dict[str, str]]:
    return [
        {"image_id": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(photographs.iterdir())
        if path.name != "photo_005.jpg"
    ]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def asked(run: Path) -> set[int]:
    """Return the units that workers were given, and forget them."""
    folder = run.with_name(f"{run.name}-asked")
    units = {int(path.name) for path in folder.glob("*")}
    shutil.rmtree(folder, ignore_errors=True)
    return units


def test_layout__by_hand() -> None:
    small = Layout.of(23, 2, 4096)
    assert (small.num_units, small.units_per_part, small.num_parts) == (12, 1, 12)
    # 75,000 units: 293 a part for 256 parts; of 1.76 MB each no more than 128 MiB hold.
    features, bank = Layout.of(1_200_000, 16, 10_000), Layout.of(1_200_000, 16, 110_000)
    assert (features.num_units, features.units_per_part, features.num_parts) == (75_000, 293, 256)
    assert (bank.units_per_part, bank.num_parts) == (76, 987)
    assert features.num_parts + bank.num_parts <= 5_000
    assert Layout.of(1_200_000, 16, 10**9).units_per_part == 1
    for layout in (small, bank, Layout(23, 2, 5)):
        units = [unit for part in range(layout.num_parts) for unit in layout.units_of(part)]
        assert units == [*range(layout.num_units)]
        images = [image for unit in units for image in layout.images_of(unit)]
        assert images == [*range(layout.num_images)]
        assert sum(map(layout.num_images_of, range(layout.num_parts))) == layout.num_images
    assert len({layout.key("f") for layout in (small, Layout(23, 2, 5), Layout(23, 4, 1))}) == 3


@pytest.mark.ray
def test_build__every_photograph_once_in_order_for_any_workers(
    photographs: Path, tmp_path: Path, fewest_parts: int, local_ray: None
) -> None:
    result, counted = build(str(tmp_path / "one"), photographs)
    table = pq.read_table(tmp_path / "one/t").to_pylist()
    assert table == expected(photographs)
    assert (result.num_rows, result.stats.images, result.num_resumed, result.num_units_resumed) == (22, 22, 0, 0)
    assert result.stats.refused == [{"image_id": "photo_005.jpg", "reason": "the fifth"}]
    assert (counted.done, counted.refused) == (NUM_IMAGES, 1)
    assert result.num_parts == len(list((tmp_path / "one/t").glob("part-*.parquet"))) == min(fewest_parts, 12)
    assert {path.name for path in (tmp_path / "one/t").iterdir() if path.is_dir()} == {"_index"}
    folder = Folder(str(tmp_path / "one"))
    index = read_index(folder, "t")
    rows = [read_row(folder, "t", place) for place in index.rows.to_pylist()]
    assert rows == table
    assert index.image_ids.to_pylist() == [row["image_id"] for row in table]
    assert index.image_ids_of(2) == ["photo_004.jpg"]
    build(str(tmp_path / "two"), photographs, num_workers=2)
    assert content(tmp_path / "two") == content(tmp_path / "one")


@pytest.mark.ray
def test_build__whatever_a_kill_leaves_nothing_is_lost_or_doubled(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_ray: None
) -> None:
    monkeypatch.setattr(build_module, "_FEWEST_PARTS", 3)
    run, kept = tmp_path / "run", tmp_path / "kept"
    build(str(run), photographs)
    asked(run)
    whole = content(run)

    # Units as workers leave them, from a call in which no part is ever joined.
    monkeypatch.setattr(build_module._Merges, "begin_if_whole", lambda *_: None)
    with pytest.raises(RuntimeError, match="0 of 3 parts"):
        build(str(kept), photographs)
    monkeypatch.undo()
    monkeypatch.setattr(build_module, "_FEWEST_PARTS", 3)
    units = {unit: kept / unit_name("t", unit // 4, unit) for unit in range(12)}
    assert all(path.is_file() for path in units.values())

    def put(unit: int, data: bytes | None = None) -> None:
        to = run / units[unit].relative_to(kept)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(units[unit].read_bytes() if data is None else data)

    # Part 0: joined, but not all of its units are deleted, and it is in no index. Part 1: three units of four, one of
    # them half written by a store without rename. Part 2: all of its units, not joined.
    (run / "t/_index/index.parquet").unlink()
    put(1)
    (run / part_name("t", 1)).unlink()
    for unit in (4, 5):
        put(unit)
    put(6, b"PAR1")
    (run / part_name("t", 2)).unlink()
    for unit in range(8, 12):
        put(unit)
    (run / "t/_units/000009").mkdir()
    (run / "t/_units/000009/unit-000036.parquet").write_bytes(units[0].read_bytes())
    result, counted = build(str(run), photographs)
    assert content(run) == whole
    assert asked(run) == {6, 7}
    assert (result.num_resumed, result.num_units_resumed, result.num_rows) == (1, 6, 22)
    assert result.stats.refused == [{"image_id": "photo_005.jpg", "reason": "the fifth"}]
    assert counted.done == NUM_IMAGES

    # A part that the index knows but whose file has gone, and one cut short.
    (run / part_name("t", 0)).unlink()
    cut = run / part_name("t", 2)
    cut.write_bytes(cut.read_bytes()[:-5])
    result, _ = build(str(run), photographs)
    assert content(run) == whole
    assert asked(run) == {0, 1, 2, 3, 8, 9, 10, 11}
    assert (result.num_resumed, result.num_units_resumed) == (1, 0)
    result, _ = build(str(run), photographs)
    assert (asked(run), result.num_resumed) == (set(), 3)


@pytest.mark.ray
def test_merge__repeated_after_it_has_deleted_the_units_says_the_same(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_ray: None
) -> None:
    monkeypatch.setattr(build_module, "_FEWEST_PARTS", 3)
    build(str(tmp_path / "run"), photographs)
    folder = Folder(str(tmp_path / "run"))
    known = IndexWriter(folder, "t", "f:2x4").read()
    given = {"run_uri": folder.uri, "table": "t", "fingerprint": "f:2x4", "rows_apart": True}
    assert build_module._merge(part=1, units=range(4, 8), **given) == known[1]


def test_requests__of_a_part_and_of_a_row(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        folder, table = Folder("s3://bucket/run"), pa.Table.from_pylist(expected(photographs)[:8], SCHEMA)
        for unit in range(4):
            data = to_parquet(table.slice(2 * unit, 2), part_metadata("f", '{"images": 2}', [2]))
            folder.write_bytes(unit_name("t", 0, unit), data)

        def count(action: Callable[[], object]) -> int:
            before = len(server.requests())
            action()
            return len(server.requests()) - before

        joined = []
        merge = partial(build_module._merge, run_uri=folder.uri, table="t", part=0, fingerprint="f", rows_apart=True)
        assert count(lambda: joined.append(merge(units=range(4)))) == 4 * 2 + 1 + 7, "7 delete any number of units"
        IndexWriter(folder, "t", "f").finish({0: joined[0]})
        rows = read_index(folder, "t").rows.to_pylist()
        found = []
        assert count(lambda: found.extend(read_row(folder, "t", place) for place in rows)) == 1 + 8, "one opens it"
        assert found == table.to_pylist()
