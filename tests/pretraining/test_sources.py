"""Images to train on, listed and read from folders and tables."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.builders import make_folder, make_table
from transfgu_ray.errors import DataError, StorageError
from transfgu_ray.pretraining import sources as image_sources
from transfgu_ray.pretraining.sources import Unit, open_source, read_unit
from transfgu_ray.storage import Folder


def source(path: Path):
    return open_source(str(path), "data.root", "--data")


def everything(path: Path):
    found = source(path)
    return [image for unit in found.units for image in read_unit(found.root, unit)]


def test_open_source__folder_of_photographs(tmp_path, monkeypatch):
    monkeypatch.setattr(image_sources, "_IMAGES_PER_UNIT", 4)
    make_folder(tmp_path / "deep" / "er", num_images=6)
    make_folder(tmp_path, num_images=3)
    (tmp_path / "notes.txt").write_text("")
    found = source(tmp_path)
    assert [unit.num_images for unit in found.units] == [4, 4, 1]
    assert (found.num_images("train"), found.num_images("val"), found.passed_over) == (9, 0, {"no picture": 1})
    images = everything(tmp_path)
    assert [image.image_id for image in images] == sorted(image.image_id for image in images)
    assert images[0].data == (tmp_path / images[0].image_id).read_bytes()
    assert {image.label for image in images} == {None}, "photographs at several depths have no classes"


def test_open_source__class_folders(tmp_path):
    for name in ("cat", "dog"):
        make_folder(tmp_path / name, num_images=2)
    assert [image.label for image in everything(tmp_path)] == ["cat", "cat", "dog", "dog"]


def test_open_source__one_folder_is_no_class(tmp_path):
    make_folder(tmp_path / "photos", num_images=2)
    assert [image.label for image in everything(tmp_path)] == [None, None]


def test_open_source__one_table(tmp_path):
    file = make_table(tmp_path / "mine.parquet", 5)
    images = everything(file)
    assert [image.image_id for image in images] == ["a/000.png", "b/001.png", "a/002.png", "b/003.png", "a/004.png"]
    assert [image.label for image in images] == ["0", "1", "0", "1", "0"]
    assert all(image.data.startswith(b"\x89PNG") and image.mask.startswith(b"\x89PNG") for image in images)


def test_open_source__tables_named_by_split(tmp_path):
    for name, count in (("train-0-of-2", 4), ("train-1-of-2", 3), ("val-0-of-1", 2), ("test-0-of-1", 9)):
        make_table(tmp_path / f"{name}.parquet", count)
    (tmp_path / "README.md").write_text("")
    found = source(tmp_path)
    assert (found.num_images("train"), found.num_images("val"), found.passed_over) == (7, 2, {"no table of images": 2})


def test_open_source__tables_of_other_names_are_all_trained_on(tmp_path):
    for name in ("a", "b"):
        make_table(tmp_path / f"{name}.parquet", 2)
    assert source(tmp_path).num_images("train") == 4


def test_open_source__fingerprint_follows_the_files(tmp_path):
    make_table(tmp_path / "train-0.parquet", 3)
    before = source(tmp_path).fingerprint
    make_table(tmp_path / "test-0.parquet", 3)
    assert source(tmp_path).fingerprint == before, "a split that is not read does not matter"
    make_table(tmp_path / "train-0.parquet", 4)
    assert source(tmp_path).fingerprint != before


def test_open_source__small_row_groups_are_read_together(tmp_path, monkeypatch):
    monkeypatch.setattr(image_sources, "_IMAGES_PER_UNIT", 5)
    file = make_table(tmp_path / "a.parquet", 17, row_group_size=2)
    units = source(file).units
    assert [(unit.row_groups, unit.first_row, unit.num_images) for unit in units] == [
        ((0, 1, 2), 0, 6),
        ((3, 4, 5), 6, 6),
        ((6, 7, 8), 12, 5),
    ]
    assert [image.image_id.split("/")[1] for image in everything(file)] == [f"{i:03}.png" for i in range(17)]


def test_read_unit__bytes_alone_and_missing_ones(tmp_path):
    pq.write_table(pa.table({"bytes": [b"x", None, b"z"]}), tmp_path / "a.parquet", row_group_size=2)
    images = everything(tmp_path)
    assert [image.image_id for image in images] == ["a.parquet#0", "a.parquet#1", "a.parquet#2"]
    assert [image.error for image in images] == [None, "the row has no bytes", None]
    assert {(image.label, image.mask) for image in images} == {(None, None)}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"text": ["x"]}), r"no binary column `bytes` .*its columns are text$"),
        (pa.table({"bytes": ["x"]}), "no binary column `bytes`"),
        (pa.table({"bytes": pa.array([], pa.binary())}), "have no rows"),
    ],
)
def test_open_source__refuses_tables_without_images(tmp_path, table, message):
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        source(tmp_path)


def test_open_source__refuses_what_is_not_there_or_damaged(tmp_path):
    with pytest.raises(DataError, match=r"no images were named; give --data DIR or set data\.root"):
        open_source("", "data.root", "--data")
    with pytest.raises(DataError, match=r"data\.val_root=.*does not exist; .* with --val"):
        open_source(str(tmp_path / "gone"), "data.val_root", "--val")
    with pytest.raises(DataError, match="no photograph in"):
        source(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"a\.parquet is not a readable Parquet file: .*write it again"):
        source(tmp_path)


def test_read_unit__refuses_a_table_whose_middle_is_damaged(tmp_path):
    file = make_table(tmp_path / "a.parquet", 5)
    data = bytearray(file.read_bytes())
    data[4:200] = b"\xff" * 196
    file.write_bytes(data)
    with pytest.raises(DataError, match="not a readable Parquet file"):
        everything(file)


@pytest.mark.usefixtures("failing_disk")
def test_open_source__outlasts_a_disk_that_fails_for_a_moment(tmp_path):
    file = make_table(tmp_path / "a.parquet", 5)
    assert [image.image_id[2:5] for image in everything(file)] == [f"{i:03}" for i in range(5)]


@pytest.mark.usefixtures("dead_disk")
def test_open_source__a_disk_that_does_not_answer_is_not_called_unusable(tmp_path):
    with pytest.raises(StorageError, match=f"^the storage does not answer: {tmp_path}: Input/output error"):
        source(tmp_path)


@pytest.mark.usefixtures("dead_disk")
def test_read_unit__a_disk_that_does_not_answer_is_no_damaged_table(tmp_path):
    make_table(tmp_path / "a.parquet", 5)
    with pytest.raises(StorageError, match=r"^the storage does not answer: .*/a\.parquet: Input/output error"):
        list(read_unit(Folder(str(tmp_path)), Unit("train", 5, "a.parquet", (0,))))
