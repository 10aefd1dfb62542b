import errno
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from tests.faults.storage import flip_byte
from transfgu_ray import storage
from transfgu_ray.config.presets import get_preset
from transfgu_ray.datasets.photographs import ImageRef
from transfgu_ray.engine.build import build_table_of_parts
from transfgu_ray.engine.job import Job
from transfgu_ray.engine.parts import (
    PartStats,
    PartWorker,
    part_files,
    part_of,
    read_footer,
    read_part,
    read_table,
    require_finite,
)
from transfgu_ray.engine.progress import Progress
from transfgu_ray.engine.session import Resources
from transfgu_ray.engine.stream import Photo
from transfgu_ray.errors import ArtifactError, DataError, StorageError
from transfgu_ray.runs.index import part_metadata, part_name
from transfgu_ray.runs.tables import to_parquet
from transfgu_ray.storage import Folder


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_require_finite__names_the_photographs(bad):
    require_finite(np.empty((0, 3), np.float16), [], "class tokens")
    values = np.ones((4, 2, 3), np.float16)
    require_finite(values, ["a", "b", "b", "c"], "class tokens")
    values[2, 1, 0] = values[3, 0, 0] = bad
    with pytest.raises(DataError, match="the class tokens of 2 photographs are NaN or infinite, the first, b;"):
        require_finite(values, ["a", "b", "b", "c"], "class tokens")


def test_part_stats__add_up():
    one, other = PartStats(images=1), PartStats(images=2, refused=[{"image_id": "a", "reason": "b"}])
    one.halve()
    other.halve()
    other.drop("small", 3)
    one.add(other)
    assert vars(one) == {"images": 3, "refused": other.refused, "dropped": {"small": 3}, "halvings": 2}


def write_part(folder: Folder, unit: int, fingerprint: str = "now:2x1", table: str = "t") -> None:
    content = pa.table({"unit": pa.array([unit, unit], pa.int32())})
    metadata = part_metadata(fingerprint, '{"images": 2}', [2])
    folder.write_bytes(part_name(table, unit), to_parquet(content, metadata))


class Stuttering(pafs.LocalFileSystem):
    """A disk that cannot open a file at every second attempt, or never."""

    calls, always = 0, False

    def open_input_file(self, path):
        self.calls += 1
        if self.always or self.calls % 2:
            raise OSError(errno.EIO, "Input/output error")
        return super().open_input_file(path)


class Signs(Progress):
    def __init__(self) -> None:
        self.calls = []

    def __call__(self, done: int = 0, words: str = "", *, refused: int = 0) -> None:
        self.calls.append(done)


class Unwilling(PartWorker):
    """Says how far it came, and does nothing."""

    def process(self, unit: int, photos: list[Photo]) -> bytes:
        raise DataError("the worker began")


def job_of(folder: Folder, progress: Progress) -> Job:
    resources = Resources(num_cores=2, num_workers=1, train_workers=1, device="cpu", threads=1, num_blocks=None)
    config = get_preset("tiny_cpu")
    return Job(folder=folder, config=config, root=folder, resources=resources, fingerprint="now", progress=progress)


def build(folder: Folder, num_units: int, progress: Progress | None = None):
    images = [ImageRef(f"{i}.jpg", None, 0) for i in range(2 * num_units)]
    job = job_of(folder, progress or Progress())
    return build_table_of_parts(job, "t", images=images, images_per_unit=2, worker=Unwilling)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.001)
    return Folder(str(tmp_path))


def test_build_table_of_parts__a_passing_error_costs_no_part(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    for unit in range(3):
        write_part(folder, unit)
    monkeypatch.setattr(folder, "fs", Stuttering())
    signs = Signs()
    result = build(folder, 3, signs)
    assert (result.num_rows, result.num_parts, result.num_resumed) == (6, 3, 3)
    assert signs.calls.count(0) == 3, "a sign of life at every part that no index knows"
    assert sum(signs.calls) == 6


def test_build_table_of_parts__nothing_is_deleted_because_it_could_not_be_read(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_part(folder, 0)
    broken = Stuttering()
    broken.always = True
    monkeypatch.setattr(folder, "fs", broken)
    monkeypatch.setattr(storage, "RETRY_S", 0.02)
    with pytest.raises(
        StorageError, match=r"the storage does not answer: .*t/part-000000\.parquet: Input/output error"
    ):
        build(folder, 1)
    assert [name for name, _ in folder.files("t")] == ["t/part-000000.parquet"]


@pytest.mark.ray
def test_build_table_of_parts__only_names_that_are_not_wanted_are_deleted(folder: Folder, local_ray: None) -> None:
    write_part(folder, 0)
    write_part(folder, 1, fingerprint="of other settings")
    (Path(folder.path) / part_name("t", 2)).write_bytes(b"damaged")
    write_part(folder, 3)
    (Path(folder.path) / "t/.part-000001.parquet.0badcafe.tmp").write_bytes(b"half")
    with pytest.raises(DataError, match="the worker began"):
        build(folder, 3)
    assert [name for name, _ in folder.files("t")] == [part_name("t", unit) for unit in range(3)]
    assert read_footer(folder, part_name("t", 0), "now:2x1") is not None


def test_read_footer__none_only_for_a_missing_damaged_or_foreign_part(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [part_name("t", unit) for unit in range(4)]
    write_part(folder, 0)
    write_part(folder, 1, fingerprint="of other settings")
    (Path(folder.path) / names[2]).write_bytes(b"damaged")
    stats, rows = read_footer(folder, names[0], "now:2x1")
    assert (stats.images, rows) == (2, 2)
    assert [read_footer(folder, name, "now:2x1") for name in names[1:]] == [None] * 3
    broken = Stuttering()
    broken.always = True
    monkeypatch.setattr(folder, "fs", broken)
    monkeypatch.setattr(storage, "RETRY_S", 0.0)
    with pytest.raises(StorageError):
        read_footer(folder, names[0], "now:2x1")


def test_part_files__are_in_order_of_unit(folder: Folder) -> None:
    units = [0, 7, 99_999, 100_001, 999_999, 1_000_000, 1_000_001, 10_000_000]
    for unit in reversed(units):
        write_part(folder, unit)
    (Path(folder.path) / "t/notes.parquet").write_bytes(b"of the user")
    names = part_files(folder, "t")
    assert names == [part_name("t", unit) for unit in units]
    assert names[0] == "t/part-000000.parquet"
    assert [part_of(name) for name in names] == units
    assert read_table(folder, "t", ["unit"])["unit"].to_pylist() == [unit for unit in units for _ in range(2)]
    assert pq.read_table(Path(folder.path) / names[-1])["unit"].to_pylist() == [10_000_000] * 2
    with pytest.raises(ValueError, match="x is no name of a part"):
        part_of("x")


def test_read_part__damage_is_told_with_the_command_that_finds_it_all(folder: Folder) -> None:
    write_part(folder, 0)
    flip_byte(folder.join(part_name("t", 0)))
    with pytest.raises(ArtifactError, match=r"t/part-000000\.parquet is damaged: .*; `transfgu verify RUN` finds all"):
        read_part(folder, part_name("t", 0), ["unit"])
