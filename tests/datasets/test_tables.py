"""Photographs in Parquet tables: which columns hold what, how rows are read, and what is refused."""

import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.builders import contents, make_folder, make_hub_table, make_paired, make_table, make_tar
from transfgu_ray.config.presets import get_preset
from transfgu_ray.config.run import build_config
from transfgu_ray.config.sections import DataConfig
from transfgu_ray.datasets import DATASETS
from transfgu_ray.datasets import tables as reader
from transfgu_ray.datasets.check import Check
from transfgu_ray.datasets.listing import list_images, read_pairs
from transfgu_ray.datasets.places import read_places, read_uri
from transfgu_ray.datasets.tables import read_cells, read_layout
from transfgu_ray.errors import DataError, StorageError
from transfgu_ray.pretraining.sources import open_source, read_unit
from transfgu_ray.serving.predict import output_stems
from transfgu_ray.storage import Folder

PARQUET = DATASETS["parquet"]


def listed(path, split="train", spec=PARQUET, **options):
    return list_images(str(path), spec, split=split, **options)


def ids(listing):
    return [image.image_id for image in listing.images]


def read(root, listing):
    return [data for data, _ in read_places(Folder(str(root)), [image.place for image in listing.images])]


def write(file: Path, columns, **options) -> Path:
    pq.write_table(pa.table(columns), file, **options)
    return file


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Encoded photographs by name."""
    return contents(make_folder(tmp_path_factory.mktemp("photographs"), num_images=7))


STRUCT = [{"bytes": b"1", "path": "s/a.jpg"}]
LARGE = pa.array([b"1"], pa.large_binary())


@pytest.mark.parametrize(
    ("columns", "layout"),
    [
        ({"bytes": [b"1"], "path": ["a"]}, ("bytes", None, None, "path")),
        ({"image": LARGE, "id": [7], "label": [3]}, ("image", None, "label", "id")),
        ({"image": STRUCT, "label": [3]}, ("image.bytes", None, "label", "image.path")),
        ({"image": STRUCT, "label": STRUCT}, ("image.bytes", "label.bytes", None, "image.path")),
        ({"image": STRUCT, "file_name": ["b"], "annotation": [b"m"]}, ("image.bytes", "annotation", None, "file_name")),
        ({"image": [{"bytes": b"1"}], "id": [1.5]}, ("image.bytes", None, None, None)),
        ({"photo": [b"1"], "mask": [b"m"], "text": ["x"]}, ("photo", "mask", None, None)),
        ({"image": [b"1"], "bytes": [b"2"], "path": ["a"], "image_id": ["b"]}, ("bytes", None, None, "path")),
    ],
)
def test_read_layout__finds_the_columns(tmp_path, columns, layout):
    write(tmp_path / "a.parquet", columns)
    found = read_layout(Folder(str(tmp_path)), "a.parquet")
    assert (found.image, found.mask, found.label, found.name, found.group_rows) == (*layout, (1,))


@pytest.mark.parametrize(
    "columns",
    [{"text": ["x"]}, {"image": ["x"]}, {"mask": [b"1"]}, {"one": [b"1"], "two": [b"2"]}, {"image": [{"path": "a"}]}],
)
def test_read_layout__refuses_a_table_without_images(tmp_path, columns):
    write(tmp_path / "a.parquet", columns)
    words = rf"/a\.parquet has no binary column `bytes` or `image` .*; its columns are {', '.join(columns)}$"
    with pytest.raises(DataError, match=words):
        listed(tmp_path)


@pytest.mark.parametrize("most", [0, 2**30], ids=["streamed", "kept"])
def test_read_cells__are_those_of_the_plain_column(tmp_path, monkeypatch, most):
    monkeypatch.setattr(reader, "_KEPT_BYTES", most)
    monkeypatch.setattr(reader, "_ROWS_AT_ONCE", 3)
    values = [None if i % 5 == 4 else bytes([i]) * (i + 1) for i in range(25)]
    rows = [None if i == 3 else {"bytes": value, "path": None} for i, value in enumerate(values)]
    write(tmp_path / "a.parquet", {"image": rows, "other": [b"x"] * 25}, row_group_size=10)
    cells = [(2, 4), (0, 0), (0, 9), (0, 3), (1, 7), (0, 0), (2, 0), (1, 8)]
    plain = pq.read_table(tmp_path / "a.parquet")["image"].to_pylist()
    expected = [(plain[10 * group + row] or {"bytes": None})["bytes"] for group, row in cells]
    assert expected.count(None) == 3
    assert read_cells(Folder(str(tmp_path)), "a.parquet", "image.bytes", cells) == expected


def test_read_cells__only_the_column_and_the_row_group_are_read(tmp_path, monkeypatch):
    asked = []
    plain = reader._Watched.read

    def noted(self, num_bytes):
        asked.append(num_bytes)
        return plain(self, num_bytes)

    monkeypatch.setattr(reader._Watched, "read", noted)
    columns = {"bytes": [os.urandom(20_000) for _ in range(60)], "mask": [os.urandom(20_000) for _ in range(60)]}
    write(tmp_path / "a.parquet", columns, row_group_size=10, use_dictionary=False)
    root = Folder(str(tmp_path))
    places = [image.place for image in listed(tmp_path).images]
    asked.clear()
    assert [data for data, _ in read_places(root, places[20:28])] == columns["bytes"][20:28]
    assert sum(asked) < 1.5 * 10 * 20_000
    # A drawn one costs as much of its row group as lies before it.
    asked.clear()
    assert [data for data, _ in read_places(root, places[42:43])] == columns["bytes"][42:43]
    assert sum(asked) < 1.5 * 10 * 20_000
    # The next ones lie in the same group.
    asked.clear()
    assert [data for data, _ in read_places(root, places[28:30])] == columns["bytes"][28:30]
    assert asked == []


def test_read_cells__a_table_that_was_replaced_is_read_again(tmp_path):
    file = write(tmp_path / "a.parquet", {"bytes": [b"1", b"2"]})
    root, cells = Folder(str(tmp_path)), [(0, 0), (0, 1)]
    assert read_cells(root, "a.parquet", "bytes", cells) == [b"1", b"2"]
    write(file, {"bytes": [b"3", b"4"]})
    os.utime(file, ns=(1, 1))
    assert read_cells(root, "a.parquet", "bytes", cells) == [b"3", b"4"]


def test_listing__rows_of_all_tables_as_they_lie_there(tmp_path, photos):
    names = [*reversed(photos)]
    make_hub_table(tmp_path / "data/a.parquet", {name: photos[name] for name in names[:4]}, row_group_size=3)
    make_hub_table(tmp_path / "data/b.parquet", {name: photos[name] for name in names[4:]})
    (tmp_path / "README.md").write_text("")
    listing = listed(tmp_path)
    assert ids(listing) == names
    assert read(tmp_path, listing) == [photos[name] for name in names]
    assert listing.images[3].place == "data/a.parquet[image.bytes]#1.0"
    assert (listing.passed_over, [*listing.shards]) == ({"no picture": 1}, ["data/a.parquet", "data/b.parquet"])
    assert read_uri(Folder(str(tmp_path)).uri_of(listing.images[3].place)) == photos[names[3]]


def test_listing__rows_without_names_are_called_by_table_and_row(tmp_path, photos):
    images = [*photos.values()]
    write(tmp_path / "a.parquet", {"bytes": images[:3], "path": ["x.jpg", None, ""]}, row_group_size=2)
    write(tmp_path / "b.parquet", {"bytes": images[3:5], "id": [10, 9]})
    listing = listed(tmp_path)
    assert ids(listing) == ["x.jpg", "a.parquet#1", "a.parquet#2", "10", "9"]
    # Each with a mask of its own.
    assert len({*output_stems(ids(listing)).values()}) == 5


def test_listing__names_that_cannot_be_used_are_refused(tmp_path):
    names = ["../x.jpg", "/x.jpg", "a/../b.jpg", ".", "a\0b.jpg", "a.jpg", "A.jpg", "a.jpg", "b//c.jpg"]
    write(tmp_path / "a.parquet", {"bytes": [b"1"] * len(names), "path": names})
    listing = listed(tmp_path)
    assert ids(listing) == ["a.jpg", "b/c.jpg"]
    assert sorted((refusal["image_id"], refusal["reason"]) for refusal in listing.refused) == [
        (".", "name of no file"),
        ("../x.jpg", "name out of the folder"),
        ("/x.jpg", "name out of the folder"),
        ("A.jpg", "named as another but for case: a.jpg"),
        ("a\0b.jpg", "name of no file"),
        ("a.jpg", "another has the same name"),
        ("a/../b.jpg", "name out of the folder"),
    ]


def test_listing__splits_of_a_hub_folder(tmp_path, photos):
    names, images = [*photos], photos
    for split, some in (("train", names[:3]), ("validation", names[3:5]), ("test", names[5:])):
        make_hub_table(tmp_path / f"data/{split}-00000-of-00001.parquet", {name: images[name] for name in some})
    assert [ids(listed(tmp_path, split)) for split in ("train", "val", "validation", "test", "")] == [
        names[:3], names[3:5], names[3:5], names[5:], [*names[5:], *names[:5]]
    ]  # fmt: skip


def test_listing__fingerprint_follows_the_tables(tmp_path):
    file = write(tmp_path / "a.parquet", {"bytes": [b"1"], "path": ["a"]})
    before = listed(tmp_path).fingerprint
    write(file, {"bytes": [b"1" * 5000], "path": ["a"]})
    assert listed(tmp_path).fingerprint != before


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-20], lambda data: b"PAR1", lambda data: b"", lambda data: data[::-1]]
)
def test_listing__a_table_with_a_damaged_footer_is_refused_in_one_sentence(tmp_path, damage):
    file = make_table(tmp_path / "a.parquet", 5)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=r"/a\.parquet is not a readable Parquet file: [^\n]*; write it again$"):
        listed(tmp_path)


def test_read_places__says_of_each_photograph_why_it_cannot_be_read(tmp_path, photos):
    images = [*photos.values()]
    file = write(tmp_path / "a.parquet", {"bytes": [*images[:3], None]}, row_group_size=2, use_dictionary=False)
    places = [image.place for image in listed(tmp_path).images]
    root = Folder(str(tmp_path))
    assert read_places(root, places) == [*((data, None) for data in images[:3]), (None, "the row has no bytes")]
    data = bytearray(file.read_bytes())
    data[4:200] = b"\xff" * 196
    file.write_bytes(data)
    found = read_places(root, places[2:] + places[:1])
    assert found[2][0] is None
    assert re.match(r"cannot be read: .*/a\.parquet is not a readable Parquet file: ", found[2][1])


def test_labels__are_a_column_of_masks(tmp_path):
    lines = make_paired(tmp_path / "files")
    photos, masks = (contents(tmp_path / "files" / name) for name in ("images", "masks"))
    make_hub_table(tmp_path / "hub/a.parquet", photos, [*masks.values()], row_group_size=3)
    (tmp_path / "hub/names.txt").write_text("\n".join(lines))
    data = tmp_path / "hub"
    config = build_config(get_preset("tiny_cpu"), None, ["data.dataset=parquet", f"data.root={data}"])
    assert (config.data.spec.evaluate_split, config.class_names) == ("val", ("background", "pet", "horse"))
    listing = listed(data, "val", config.data.spec, granularity="fine")
    places = [image.place for image in listing.images], [image.label_id for image in listing.images]
    assert [label for _, label, _ in read_pairs(Folder(str(data)), *places)] == [*masks.values()]
    found = Check("parquet", str(data), DataConfig()).run(lambda done: None)
    plain = Check("paired", str(tmp_path / "files"), DataConfig()).run(lambda done: None)
    assert (found.refused, found.facts) == ([], plain.facts)


def test_one_set__stored_in_three_ways_has_the_same_names_and_photographs(tmp_path, photos):
    for name, data in photos.items():
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / name).write_bytes(data)
    make_tar(tmp_path / "tars/a.tar", photos)
    make_hub_table(tmp_path / "tables/a.parquet", photos, row_group_size=3)
    found = {}
    for name, folder in (("folder", "files"), ("webdataset", "tars"), ("parquet", "tables")):
        listing = listed(tmp_path / folder, spec=DATASETS[name])
        found[name] = dict(zip(ids(listing), read(tmp_path / folder, listing), strict=True))
        source = open_source(str(tmp_path / folder), "data.root", "--data")
        images = [image for unit in source.units for image in read_unit(source.root, unit)]
        assert {image.image_id: image.data for image in images} == photos
    assert found == dict.fromkeys(("folder", "webdataset", "parquet"), photos)


def test_pretraining__reads_hub_tables_and_the_splits_of_tars(tmp_path, photos):
    names = [*photos]
    file = make_hub_table(tmp_path / "a.parquet", photos)
    for path in (file, tmp_path):
        source = open_source(str(path), "data.root", "--data")
        images = [image for unit in source.units for image in read_unit(source.root, unit)]
        assert {image.image_id: image.data for image in images} == photos
    for split, some in (("train", names[:4]), ("val", names[4:6]), ("test", names[6:])):
        make_tar(tmp_path / f"tars/{split}-0.tar", {name: photos[name] for name in some})
    source = open_source(str(tmp_path / "tars"), "data.root", "--data")
    assert (source.num_images("train"), source.num_images("val")) == (4, 2)
    assert source.passed_over == {"no table of images": 1}
    assert [unit.names for unit in source.units] == [tuple(names[:4]), tuple(names[4:6])]


def test_pretraining__an_archive_beside_what_was_unpacked_from_it_is_not_read(tmp_path, photos):
    make_folder(tmp_path / "cats", num_images=2)
    make_tar(tmp_path / "cats.tar", photos)
    assert open_source(str(tmp_path), "data.root", "--data").num_images("train") == 2


@pytest.mark.usefixtures("failing_disk")
def test_listing__outlasts_a_disk_that_fails_for_a_moment(tmp_path, photos):
    make_hub_table(tmp_path / "a.parquet", photos)
    assert read(tmp_path, listed(tmp_path)) == [*photos.values()]


@pytest.mark.usefixtures("dead_disk")
def test_listing__a_disk_that_does_not_answer_is_no_damaged_table(tmp_path, photos):
    make_hub_table(tmp_path / "a.parquet", photos)
    with pytest.raises(StorageError, match=r"^the storage does not answer: "):
        read_layout(Folder(str(tmp_path)), "a.parquet")


def test_read__what_the_storage_raises_is_not_called_damage(tmp_path, photos, monkeypatch):
    """As S3 does, without a number: neither damage nor a reason to take the whole table into memory."""
    make_hub_table(tmp_path / "a.parquet", photos)
    monkeypatch.setattr("transfgu_ray.storage.RETRY_S", 0.0)
    plain, calls = reader._Watched.read, []

    class Broken:
        def read(self, num_bytes):
            calls.append(num_bytes)
            raise OSError("When reading: AWS Error NETWORK_CONNECTION during GetObject operation")

    def failing(self, num_bytes):
        self._file = Broken()
        return plain(self, num_bytes)

    monkeypatch.setattr(reader._Watched, "read", failing)
    with pytest.raises(StorageError, match="AWS Error NETWORK_CONNECTION"):
        read_layout(Folder(str(tmp_path)), "a.parquet")
    assert len(calls) == 1
