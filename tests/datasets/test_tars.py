"""Photographs in tars: found by headers alone, read by their place, refused in one sentence."""

import io
import json
import os
import re
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.builders import contents, encode_png, make_folder, make_paired, make_tar
from tests.faults.storage import s3_server
from transfgu_ray.config.presets import get_preset
from transfgu_ray.config.run import build_config
from transfgu_ray.config.sections import DataConfig
from transfgu_ray.datasets import DATASETS
from transfgu_ray.datasets import tars as reader
from transfgu_ray.datasets.check import Check
from transfgu_ray.datasets.listing import list_images, read_pairs
from transfgu_ray.datasets.places import read_places, read_uri
from transfgu_ray.datasets.tars import list_members, read_members
from transfgu_ray.errors import ConfigError, DataError, StorageError
from transfgu_ray.storage import Folder

WEBDATASET = DATASETS["webdataset"]
NAMES = ["0: background", "1: pet | thing", "2: pet | thing", "3: horse"]


def listed(path, split="train", spec=WEBDATASET, **options):
    return list_images(str(path), spec, split=split, **options)


def ids(listing):
    return [image.image_id for image in listing.images]


def read(root, listing):
    return [data for data, _ in read_places(Folder(str(root)), [image.place for image in listing.images])]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Encoded photographs by name."""
    return contents(make_folder(tmp_path_factory.mktemp("photographs"), num_images=5))


# Longer than the 100 bytes of a header, and with letters that only some kinds of tar hold.
LONG = "/".join(["été à la plage"] * 12)


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_list_members__gives_names_and_places_in_every_format(tmp_path, kind):
    members = {"a.jpg": b"one", "b/c.json": b"", "d.png": b"x" * 5000}
    if kind != tarfile.USTAR_FORMAT:
        members[f"{LONG}.jpg"] = b"long"
    file = make_tar(tmp_path / "a.tar", members, kind)
    found = list_members(Folder(str(tmp_path)), "a.tar")
    assert [member.name for member in found] == list(members)
    whole = file.read_bytes()
    assert [whole[m.offset : m.offset + m.num_bytes] for m in found] == list(members.values())


def test_list_members__reads_headers_alone():
    class Counted(io.BytesIO):
        num_bytes = 0

        def read(self, size=-1):
            data = super().read(size)
            self.num_bytes += len(data)
            return data

    members = {f"{i:03}.jpg": bytes(200_000) for i in range(30)}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    stream = Counted(packed.getvalue())
    assert len([*reader._read_headers(stream)]) == 30
    assert stream.num_bytes < 30 * 2 * 512 + 12_000


def test_listing__a_tar_is_read_once_and_again_when_it_was_replaced(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(
        reader, "_read_headers", lambda stream, plain=reader._read_headers: read.append(1) or plain(stream)
    )
    file = make_tar(tmp_path / "a.tar", {"a.jpg": b"1"})
    assert ids(listed(tmp_path)) == ids(listed(tmp_path, "val")) == ["a.jpg"]
    assert len(read) == 1
    make_tar(file, {"b.jpg": b"1"})
    os.utime(file, ns=(1, 1))
    assert ids(listed(tmp_path)) == ["b.jpg"]


def test_list_members__a_tar_cut_anywhere_is_refused(tmp_path):
    file = make_tar(tmp_path / "a.tar", {"a.jpg": b"x" * 700, f"{LONG}.jpg": b"y" * 10, "c.jpg": b"z" * 512})
    root, whole = Folder(str(tmp_path)), file.read_bytes()
    end = -(-len(whole.rstrip(b"\0")) // 512) * 512
    for cut in range(0, end + 512, 128):
        (tmp_path / f"{cut}.tar").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=rf"/{cut}\.tar is not a whole tar file: [^\n]*; write it again$"):
            list_members(root, f"{cut}.tar")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda whole: whole[:1024] + b"\x01" + whole[1025:], "there is no header at byte 1024"),
        (lambda whole: whole + whole, "another tar was appended after its end"),
        (lambda whole: b"no tar" * 999, "not a whole tar file"),
    ],
    ids=["damaged", "joined", "text"],
)
def test_list_members__what_tarfile_would_take_for_the_end_is_refused(tmp_path, change, words):
    file = make_tar(tmp_path / "a.tar", {"a.jpg": b"1", "b.jpg": b"2"})
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(DataError, match=words):
        list_members(Folder(str(tmp_path)), "a.tar")


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.bz2", "a.tar.xz", "a.tar"])
def test_listing__compressed_tars_are_refused_by_their_content(tmp_path, photos, name):
    kind = {"bz2": "bz2", "xz": "xz"}.get(name.split(".")[-1], "gz")
    make_tar(tmp_path / name, photos, mode=f"w:{kind}")
    with pytest.raises(DataError, match=rf"/{re.escape(name)} is compressed \(.*unpack it to a plain \.tar") as refused:
        listed(tmp_path)
    assert "\n" not in str(refused.value)


def test_read_members__neighbours_come_with_one_read(tmp_path, monkeypatch):
    file = tmp_path / "a.tar"
    file.write_bytes(bytes(range(250)) * 4)
    monkeypatch.setattr(reader, "_GAP_BYTES", 10)
    monkeypatch.setattr(reader, "_TOGETHER_BYTES", 100)
    ranges = [(500, 50), (0, 30), (40, 30), (81, 10), (600, 40), (560, 5), (990, 20), (0, 30)]
    assert [list(some) for some in reader._neighbours(sorted(set(ranges)))] == [
        [(0, 30), (40, 30)], [(81, 10)], [(500, 50), (560, 5)], [(600, 40)], [(990, 20)]
    ]  # fmt: skip
    whole = file.read_bytes()
    found = read_members(Folder(str(tmp_path)), "a.tar", ranges)
    assert found == [whole[at : at + size] if at + size <= 1000 else None for at, size in ranges]
    assert [*reader._neighbours([])] == []


def test_listing__photographs_of_all_shards_as_they_lie_there(tmp_path, photos):
    first, second = dict([*photos.items()][3:]), dict([*photos.items()][:3])
    make_tar(tmp_path / "deep/0.tar", first | {"photo_003.json": b"{}"})
    make_tar(tmp_path / "deep/1.tar", second)
    (tmp_path / "README.md").write_text("")
    make_folder(tmp_path / "loose", num_images=2)
    listing = listed(tmp_path)
    assert ids(listing) == [*first, *second]
    assert read(tmp_path, listing) == [*first.values(), *second.values()]
    assert [image.num_bytes for image in listing.images] == [len(photos[name]) for name in ids(listing)]
    assert listing.passed_over == {"no picture": 2, "photograph beside the shards": 2}
    assert [*listing.shards] == ["deep/0.tar", "deep/1.tar"]
    uri = Folder(str(tmp_path)).uri_of(listing.images[0].place)
    assert read_uri(uri) == first["photo_003.jpg"]


def test_listing__fingerprint_follows_names_and_places(tmp_path, photos):
    file = make_tar(tmp_path / "a.tar", photos)
    before, shards = listed(tmp_path).fingerprint, listed(tmp_path).shards
    os.utime(file, ns=(1, 1))
    assert listed(tmp_path).fingerprint == before
    make_tar(file, {"of_another_offset.json": b"{}"} | photos)
    repacked = listed(tmp_path)
    assert ids(repacked) == [*photos]
    assert repacked.fingerprint != before
    assert replace(repacked, shards=shards).fingerprint != before


def test_listing__names_that_several_shards_have_begin_with_their_shard(tmp_path, photos):
    one, other = ({name: photos[name]} for name in ("photo_000.jpg", "photo_001.jpg"))
    make_tar(tmp_path / "a/0.tar", {"x.jpg": one["photo_000.jpg"], "y.jpg": b"2"})
    make_tar(tmp_path / "a/1.tar", {"X.jpg": other["photo_001.jpg"]})
    listing = listed(tmp_path)
    assert ids(listing) == ["a/0/x.jpg", "a/0/y.jpg", "a/1/X.jpg"]
    assert read(tmp_path, listing)[::2] == [*one.values(), *other.values()]


def test_listing__names_that_cannot_be_used_are_refused(tmp_path):
    file = make_tar(
        tmp_path / "a.tar",
        {
            "../out.jpg": b"", "/root.jpg": b"", "a/../../b.jpg": b"", "./good.jpg": b"1", "twin.jpg": b"",
            "Twin.JPG": b"", "._mac.jpg": b"", "__MACOSX/a.jpg": b"", "photo.heicx": b"", "photo.gif": b"",
        },
    )  # fmt: skip
    with tarfile.open(file, "a", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("\xe9.jpg"))
        tar.addfile(tarfile.TarInfo("good.jpg"))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    listing = listed(tmp_path)
    assert ids(listing) == ["good.jpg", "twin.jpg"]
    assert {refusal["image_id"]: refusal["reason"] for refusal in listing.refused} == {
        "../out.jpg": "name out of the folder",
        "/root.jpg": "name out of the folder",
        "a/../../b.jpg": "name out of the folder",
        "Twin.JPG": "named as another but for case: twin.jpg",
        "good.jpg": "another has the same name",
        "\\xe9.jpg": "name is not UTF-8",
        "link.jpg": "link, device or sparse file in a tar",
    }
    assert listing.passed_over == {"hidden, or in a hidden or system folder": 2, "no picture": 1, ".gif": 1}


@pytest.mark.parametrize(
    ("shards", "train", "val"),
    [
        (("train-0", "train-1", "val-0", "test-0", "new-0"), ["train-0", "train-1"], ["val-0"]),
        (("train-0", "validation-0"), ["train-0"], ["validation-0"]),
        (("x/train/0", "x/val/0", "x/other/0"), ["x/train/0"], ["x/val/0"]),
        (("a", "b"), ["a", "b"], ["a", "b"]),
        (("val-0", "a"), ["a", "val-0"], ["a", "val-0"]),
    ],
)
def test_listing__splits_are_in_the_names_of_shards(tmp_path, shards, train, val):
    for i, shard in enumerate(shards):
        make_tar(tmp_path / f"{shard}.tar", {f"{i}.jpg": b"1"})
    for split, expected in (("train", train), ("val", val)):
        listing = listed(tmp_path, split)
        assert [*listing.shards] == [f"{shard}.tar" for shard in expected]
        # Which no split would ever show.
        lost = len({"new-0", "x/other/0"} & {*shards})
        assert listing.passed_over == ({"shard of no split": lost} if lost else {})
        assert ids(listing) == [f"{shards.index(shard)}.jpg" for shard in expected]


def test_listing__one_sentence_where_there_is_nothing(tmp_path):
    with pytest.raises(DataError, match=r"no photograph in .* \(dataset webdataset, split train\): expected \*\*/\*"):
        listed(tmp_path)
    make_tar(tmp_path / "train-0.tar", {"a.jpg": b"1"})
    with pytest.raises(DataError, match="split val"):
        listed(tmp_path, "val")
    # Who says nothing of a dataset is told of the one that reads them.
    with pytest.raises(DataError, match=r"passed over: 1 \.tar \(dataset webdataset reads them\)$"):
        listed(tmp_path, "", DATASETS["folder"])


def make_labelled(path: Path, labelled: int = 4) -> list[bytes]:
    """Four photographs in a tar and names.txt; returns the labels, of which some are in the tar."""
    make_paired(path / "files")
    photos, masks = (contents(path / "files" / name / "deep") for name in ("images", "masks"))
    members = {}
    for i, (name, data) in enumerate(photos.items()):
        stem = name.removesuffix(".jpg")
        if i < labelled:
            members[f"deep/{stem}.{('seg', 'mask')[i % 2]}.png"] = masks[f"{stem}.png"]
        members[f"deep/{name}"] = data
    make_tar(path / "a.tar", members | {"lost.seg.png": b"1"})
    (path / "names.txt").write_text("\n".join(NAMES))
    for name in ("images", "masks"):
        for file in (path / "files" / name / "deep").iterdir():
            file.unlink()
    return [*masks.values()]


def test_labels__lie_beside_their_photographs(tmp_path):
    masks = make_labelled(tmp_path)
    config = build_config(get_preset("tiny_cpu"), None, ["data.dataset=webdataset", f"data.root={tmp_path}"])
    assert (config.data.spec.evaluate_split, config.class_names) == ("val", ("background", "pet", "horse"))
    listing = listed(tmp_path, "val", config.data.spec, granularity="fine")
    places = [image.place for image in listing.images], [image.label_id for image in listing.images]
    pairs = read_pairs(Folder(str(tmp_path)), *places)
    assert [label for _, label, _ in pairs] == masks
    assert [problem for *_, problem in pairs] == [None] * 4
    assert {image.label_id for image in listed(tmp_path).images} == {None}
    assert listing.passed_over["label without its photograph"] == 1
    found = Check("webdataset", str(tmp_path), DataConfig()).run(lambda done: None)
    assert found.refused == []
    assert [fact.found for fact in found.facts if (fact.split, fact.what) == ("val", "classes")] == ["3 of 3"]


def test_labels__some_or_all_of_which_are_missing(tmp_path):
    make_labelled(tmp_path, labelled=3)
    found = Check("webdataset", str(tmp_path), DataConfig()).run(lambda done: None)
    assert found.refused == [{"image_id": "deep/3.jpg", "reason": "it has no label"}]
    make_labelled(tmp_path, labelled=0)
    with pytest.raises(DataError, match=r"no labels in \S+ \(dataset webdataset\)"):
        Check("webdataset", str(tmp_path), DataConfig())


def test_labels__without_names_there_are_none(tmp_path, photos):
    make_tar(tmp_path / "a.tar", photos)
    config = build_config(get_preset("tiny_cpu"), None, ["data.dataset=webdataset", f"data.root={tmp_path}"])
    assert (config.data.spec.evaluate_split, config.class_names, config.data.names) == (None, (), ())
    (tmp_path / "names.txt").write_text("cat")
    with pytest.raises(ConfigError, match="'cat' must be `id: name`"):
        build_config(config, None, [])


def test_read_places__says_of_each_photograph_why_it_cannot_be_read(tmp_path, photos):
    file = make_tar(tmp_path / "a.tar", photos)
    places = [image.place for image in listed(tmp_path).images]
    file.write_bytes(file.read_bytes()[:-15_000])
    found = read_places(Folder(str(tmp_path)), places)
    assert found[0] == (photos["photo_000.jpg"], None)
    assert found[-1] == (None, "the tar ends before it")
    file.unlink()
    assert {reason[:16] for _, reason in read_places(Folder(str(tmp_path)), places)} == {"cannot be read: "}
    with pytest.raises(OSError, match="cannot be read: "):
        read_uri(f"{tmp_path}/{places[0]}")


def test_listing__a_tar_that_may_not_be_read_is_told_in_one_sentence(tmp_path, photos, monkeypatch):
    make_tar(tmp_path / "a.tar", photos)

    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("transfgu_ray.datasets.webdataset.list_members", forbidden)
    with pytest.raises(DataError, match=r"a\.tar cannot be read: .*Permission denied"):
        listed(tmp_path)


@pytest.mark.usefixtures("failing_disk")
def test_listing__outlasts_a_disk_that_fails_for_a_moment(tmp_path, photos):
    make_tar(tmp_path / "a.tar", photos)
    assert read(tmp_path, listed(tmp_path)) == [*photos.values()]


@pytest.mark.usefixtures("dead_disk")
def test_read_places__a_disk_that_does_not_answer_refuses_nothing(tmp_path, photos):
    make_tar(tmp_path / "a.tar", photos)
    for place in ("a.tar@512+10", "a.parquet[bytes]#0.0"):
        with pytest.raises(StorageError, match=r"^the storage does not answer: "):
            read_places(Folder(str(tmp_path)), [place])


def test_object_store__is_listed_and_read_by_few_requests(tmp_path, photos, monkeypatch):
    pytest.importorskip("moto", reason="moto, of the extra `test`, is not installed")
    file = make_tar(tmp_path / "a.tar", {f"{i:03}.jpg": [*photos.values()][i % 5] for i in range(200)})
    with s3_server() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        root = Folder("s3://bucket/shards")
        root.write_bytes("a.tar", file.read_bytes())
        before = len(server.requests())
        listing = list_images("s3://bucket/shards", WEBDATASET, split="train")
        asked = len(server.requests()) - before
        assert len(listing.images) == 200
        assert asked < 20
        before = len(server.requests())
        found = read_places(root, [image.place for image in listing.images[100:116]])
        assert [data for data, _ in found] == [[*photos.values()][i % 5] for i in range(100, 116)]
        assert len(server.requests()) - before <= 3
        assert read_uri(root.uri_of(listing.images[7].place)) == [*photos.values()][2]
        # Found in time, since the tar has another.
        root.write_bytes("a.tar", make_tar(tmp_path / "b.tar", photos).read_bytes())
        assert len(list_images("s3://bucket/shards", WEBDATASET, split="train").images) == 5


def test_masks__are_what_paired_has(tmp_path):
    """The label of a tar and that of a folder go through the same table of ids."""
    mask = np.zeros((40, 40), np.uint8)
    mask[:20] = 9
    photo = encode_png(Image.new("RGB", (40, 40), (9, 99, 199)))
    make_tar(tmp_path / "a.tar", {"a.png": photo, "a.seg.png": encode_png(Image.fromarray(mask))})
    (tmp_path / "names.txt").write_text("0: ground\n")
    found = Check("webdataset", str(tmp_path), DataConfig()).run(lambda done: None)
    assert json.dumps(found.refused).count("its label holds an unknown id: 9") == 1
