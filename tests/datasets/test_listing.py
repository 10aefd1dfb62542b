import errno
import os
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from tests import builders
from tests.builders import (
    listed,
    make_cityscapes,
    make_coco,
    make_folder,
    make_hostile_folder,
    make_lip,
    make_paired,
    make_scenes,
    make_voc,
)
from transfgu_ray import storage
from transfgu_ray.config.sections import DataConfig
from transfgu_ray.datasets import DATASETS
from transfgu_ray.datasets import listing as listing_module
from transfgu_ray.datasets.listing import open_root, passed_over_words
from transfgu_ray.datasets.outputs import mark_outputs
from transfgu_ray.datasets.paired import read_names
from transfgu_ray.errors import DataError, StorageError
from transfgu_ray.images import decode_label
from transfgu_ray.storage import Folder


def _ids(path, dataset="folder", split=""):
    return [image.image_id for image in listed(DataConfig(dataset=dataset, root=str(path)), split).images]


def test_list_images__folder_in_order_with_others_counted(tmp_path):
    make_folder(tmp_path / "b", num_images=2)
    make_folder(tmp_path / "a" / "deep", num_images=1)
    (tmp_path / "SHOUT.JPG").write_bytes(b"x")
    for name in ("notes.txt", ".hidden.jpg", "b/.photo_000.jpg.tmp"):
        (tmp_path / name).write_bytes(b"")
    listing = listed(DataConfig(root=str(tmp_path)), "")
    want = ["SHOUT.JPG", "a/deep/photo_000.jpg", "b/photo_000.jpg", "b/photo_001.jpg"]
    assert [image.image_id for image in listing.images] == want
    assert [image.num_bytes for image in listing.images] == [os.path.getsize(tmp_path / name) for name in want]
    assert {image.label_id for image in listing.images} == {None}
    assert listing.passed_over == {"no picture": 2, "hidden, or in a hidden or system folder": 1}


def test_list_images__hostile_names_are_listed(tmp_path):
    good, bad = make_hostile_folder(tmp_path)
    assert set(_ids(tmp_path)) == good | bad


def test_list_images__same_ids_and_fingerprint_under_another_root(tmp_path):
    listings = []
    for name in ("one", "two"):
        make_folder(tmp_path / name)
        listings.append(listed(DataConfig(root=f"{tmp_path / name}/"), ""))
    assert listings[0].images == listings[1].images
    assert listings[0].fingerprint == listings[1].fingerprint


def test_listing__fingerprint_sees_names_and_sizes(tmp_path):
    make_folder(tmp_path)
    config = DataConfig(root=str(tmp_path))
    seen = {listed(config, "").fingerprint}
    with open(tmp_path / "photo_002.jpg", "ab") as file:
        file.write(b"\0")
    seen.add(listed(config, "").fingerprint)
    (tmp_path / "photo_002.jpg").rename(tmp_path / "photo_2.jpg")
    seen.add(listed(config, "").fingerprint)
    assert len(seen) == 3


def test_list_images__voc_splits_with_labels(tmp_path):
    make_voc(tmp_path, num_train=3, num_val=2)
    assert _ids(tmp_path, "voc", "train") == [f"JPEGImages/2007_{i:06}.jpg" for i in range(3)]
    config = DataConfig(dataset="voc", root=str(tmp_path))
    assert {image.label_id for image in listed(config, "train").images} == {None}, "learning reads no label"
    images = listed(config, "val", "fine").images
    assert [image.label_id for image in images] == [f"SegmentationClass/2007_{i:06}.png" for i in (3, 4)]
    label = decode_label((tmp_path / images[0].label_id).read_bytes())
    with Image.open(tmp_path / images[0].image_id) as photo:
        assert label.shape == (photo.height, photo.width)
    assert {0, 255} < set(np.unique(label)) <= {0, 8, 12, 13, 255}


def test_list_images__voc_lists_may_repeat_and_be_unordered(tmp_path):
    make_voc(tmp_path, num_train=3)
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("2007_000002\r\n2007_000000\n2007_000002\n")
    assert _ids(tmp_path, "voc", "train") == ["JPEGImages/2007_000000.jpg", "JPEGImages/2007_000002.jpg"]


def test_list_images__scenes_with_the_masks_of_a_granularity(tmp_path):
    make_scenes(tmp_path, num_train=2, num_val=3)
    (tmp_path / "images/val/notes.txt").write_text("x")
    config = DataConfig(dataset="scenes", root=str(tmp_path))
    assert _ids(tmp_path, "scenes", "train") == [f"images/train/scene_{i:03}.png" for i in range(2)]
    fine, coarse = (listed(config, "val", granularity) for granularity in ("fine", "super"))
    assert [image.label_id for image in fine.images] == [f"masks/fine/val/scene_{i:03}.png" for i in range(3)]
    assert fine.passed_over == {"no picture": 1}
    super_of = np.array(DATASETS["scenes"].super_of)
    for one, other in zip(fine.images, coarse.images, strict=True):
        label, merged = (decode_label((tmp_path / image.label_id).read_bytes()) for image in (one, other))
        known = label != 255
        assert np.array_equal(super_of[label[known]], merged[known])


def test_list_images__refuses_scenes_without_photographs_or_masks(tmp_path):
    with pytest.raises(
        DataError, match=r"\(dataset scenes, split train\): expected images/.*plain tree .* dataset folder"
    ):
        _ids(make_folder(tmp_path / "plain"), "scenes", "train")
    make_scenes(tmp_path)
    (tmp_path / "masks/super/val").rename(tmp_path / "elsewhere")
    config = DataConfig(dataset="scenes", root=str(tmp_path))
    assert len(listed(config, "val", "fine").images) == len(listed(config, "val").images) == 3
    with pytest.raises(DataError, match=r"no labels in .*/masks/super/val \(dataset scenes\): expected images/"):
        listed(config, "val", "super")


def _label_ids(path, dataset, split, names=()):
    config = DataConfig(dataset=dataset, root=str(path), names=names)
    return {image.image_id: image.label_id for image in listed(config, split, "fine").images}


def test_list_images__coco_of_annotated_photographs(tmp_path):
    make_coco(tmp_path)
    assert _label_ids(tmp_path, "coco_stuff171", "val") == {
        f"images/val2017/{i:012}.jpg": f"annotations/val2017/{i:012}.png" for i in (3, 4, 5)
    }
    # A photograph without annotated instances is not in the paper's lists.
    instances = tmp_path / "annotations/instances_val2017.json"
    instances.write_text(instances.read_text().replace('"image_id": 4', '"image_id":5'))
    assert [*_label_ids(tmp_path, "coco80", "val")] == [f"images/val2017/{i:012}.jpg" for i in (3, 5)]


def test_list_images__coco_of_the_curated_list(tmp_path):
    make_coco(tmp_path)
    (tmp_path / "curated/val2017").mkdir(parents=True)
    (tmp_path / "curated/val2017/Coco164kFull_Stuff_Coarse_7.txt").write_text(f"{5:012}\n{3:012}\n")
    assert [*_label_ids(tmp_path, "coco_stuff27_curated", "val")] == [f"images/val2017/{i:012}.jpg" for i in (3, 5)]


def test_list_images__cityscapes_in_folders_of_cities(tmp_path):
    make_cityscapes(tmp_path)
    stem = "aachen_000000_000019"
    (tmp_path / f"leftImg8bit/val/aachen/{stem}_camera.png").write_bytes(b"")
    config = DataConfig(dataset="cityscapes27", root=str(tmp_path))
    listing = listed(config, "val", "fine")
    assert listing.passed_over == {"no picture": 1}
    assert listing.images[0].image_id == f"leftImg8bit/val/aachen/{stem}_leftImg8bit.png"
    assert listing.images[0].label_id == f"gtFine/val/aachen/{stem}_gtFine_labelIds.png"
    assert all((tmp_path / image.label_id).exists() for image in listing.images)


def test_list_images__lip_by_its_lists(tmp_path):
    make_lip(tmp_path)
    assert _label_ids(tmp_path, "lip5", "train") == {
        f"train_images/{i:04}.jpg": f"train_segmentations/{i:04}.png" for i in range(3)
    }


def test_list_images__paired_with_and_without_splits(tmp_path):
    lines = make_paired(tmp_path)
    want = {f"images/deep/{i}.jpg": f"masks/deep/{i}.png" for i in range(4)}
    assert _label_ids(tmp_path, "paired", "train", lines) == _label_ids(tmp_path, "paired", "val", lines) == want
    for folder in ("images", "masks"):
        (tmp_path / folder / "deep").rename(tmp_path / folder / "val")
    (tmp_path / "images/train").mkdir()
    assert [*_label_ids(tmp_path, "paired", "val", lines)] == [f"images/val/{i}.jpg" for i in range(4)]
    with pytest.raises(DataError, match=r"no photograph in .* \(dataset paired, split train\)"):
        _label_ids(tmp_path, "paired", "train", lines)


@pytest.mark.parametrize(
    ("dataset", "make", "missing"),
    [
        ("coco80", "make_coco", "annotations/instances_val2017.json"),
        ("coco_stuff27_curated", "make_coco", "curated/val2017/Coco164kFull_Stuff_Coarse_7.txt"),
        ("lip16", "make_lip", "val_id.txt"),
    ],
)
def test_list_images__refuses_what_lacks_its_list(tmp_path, dataset, make, missing):
    getattr(builders, make)(tmp_path)
    (tmp_path / missing).unlink(missing_ok=True)
    with pytest.raises(DataError, match=f"has no readable {missing}; dataset {dataset} expects"):
        _label_ids(tmp_path, dataset, "val")


def test_list_images__voc_of_real_photographs(shared_data):
    root = shared_data / "voc2012_animals" / "VOCdevkit" / "VOC2012"
    images = listed(DataConfig(dataset="voc", root=str(root)), "val").images
    assert len(images) == 100
    assert min(image.num_bytes for image in images) > 1000


def test_open_root__refuses_what_is_not_a_folder(tmp_path):
    with pytest.raises(DataError, match=r"no photographs were given; use --data DIR or set data\.root"):
        open_root("")
    with pytest.raises(DataError, match=r"data\.root=.*gone does not exist"):
        open_root(str(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"data\.root=nosuch://x cannot be opened"):
        open_root("nosuch://x")
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match=r"data\.root=.*photo\.jpg is a file"):
        open_root(str(tmp_path / "photo.jpg"))


def test_list_images__refuses_a_folder_without_photographs(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"no photograph in .* \(dataset folder\): expected any tree of JPEG"):
        _ids(tmp_path)


def test_list_images__refuses_a_voc_without_its_lists(tmp_path):
    make_folder(tmp_path)
    with pytest.raises(DataError, match=r"has no readable ImageSets/Segmentation/train\.txt; dataset voc expects VOC"):
        _ids(tmp_path, "voc", "train")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names themselves")
def test_list_images__refuses_a_name_that_is_not_utf8(tmp_path):
    make_folder(tmp_path)
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.jpg"), "wb"):
        pass
    (refused,) = listed(DataConfig(root=str(tmp_path)), "").refused
    assert refused == {"image_id": "caf\\xe9.jpg", "reason": "name is not UTF-8"}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems know no such links or names")
def test_list_images__names_what_it_does_not_follow(tmp_path):
    data, outside = make_folder(tmp_path / "data", num_images=2), make_folder(tmp_path / "outside", num_images=1)
    (data / "sub").mkdir()
    (data / "sub" / "PHOTO.jpg").write_bytes(b"1")
    (data / "sub" / "photo.JPG").write_bytes(b"2")
    (data / "new\nline.jpg").write_bytes(b"3")
    (data / "sub" / "loop").symlink_to(data)
    (data / "twice.jpg").symlink_to(data / "photo_000.jpg")
    (data / "leads out").symlink_to(outside)
    (data / "leads out.jpg").symlink_to(outside / "photo_000.jpg")
    (data / "broken.jpg").symlink_to(data / "nowhere.jpg")
    (data / "notes.txt").symlink_to(outside / "photo_000.jpg")
    os.mkfifo(data / "pipe.jpg")
    (tmp_path / "through a link").symlink_to(data)
    for root in (data, tmp_path / "through a link"):
        listing = listed(DataConfig(root=str(root)), "")
        assert [image.image_id for image in listing.images] == [
            "new\nline.jpg", "photo_000.jpg", "photo_001.jpg", "sub/PHOTO.jpg",
        ]  # fmt: skip
        assert {refusal["image_id"]: refusal["reason"] for refusal in listing.refused} == {
            "broken.jpg": "link to nothing",
            "leads out": "link out of the folder",
            "leads out.jpg": "link out of the folder",
            "pipe.jpg": "not a regular file",
            "sub/loop": "link within the folder",
            "sub/photo.JPG": "named as another but for case: sub/PHOTO.jpg",
            "twice.jpg": "link within the folder",
        }
        assert listing.passed_over == {"no picture": 1}


def test_list_images__nothing_but_links(tmp_path):
    outside = make_folder(tmp_path / "outside", num_images=1)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jpg").symlink_to(outside / "photo_000.jpg")
    with pytest.raises(DataError, match=r"can be used: 1 names were refused, .*a\.jpg: link out of the folder"):
        _ids(tmp_path / "data")


class FailsOnce:
    """A call of the system that fails the first time, or times, for each path below a folder, and then works."""

    def __init__(self, call, folder, number, times=1):
        self._call, self._folder, self._number, self._times = call, str(folder), number, times
        self._seen = Counter()

    def __call__(self, path=".", **options):
        below = isinstance(path, str) and path.startswith(self._folder)
        if below and self._seen[path] < self._times:
            self._seen[path] += 1
            raise OSError(self._number, os.strerror(self._number), path)
        return self._call(path, **options)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_list_images__a_disk_that_fails_for_a_moment_refuses_nothing(tmp_path, monkeypatch, number):
    data = make_folder(tmp_path / "data", num_images=2)
    make_folder(data / "deep" / "er", num_images=1)
    (data / "link").symlink_to(data / "deep")
    want = listed(DataConfig(root=str(data)), "")
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.001)
    for name in ("scandir", "listdir", "lstat", "stat"):
        monkeypatch.setattr(os, name, FailsOnce(getattr(os, name), data, number))
    assert listed(DataConfig(root=str(data)), "") == want
    assert [image.image_id for image in want.images] == [
        "deep/er/photo_000.jpg", "photo_000.jpg", "photo_001.jpg",
    ]  # fmt: skip
    assert want.refused == ({"image_id": "link", "reason": "link within the folder"},)


@pytest.mark.parametrize("name", ["scandir", "lstat", "stat"])
def test_list_images__a_disk_that_does_not_answer_stops_the_command(tmp_path, monkeypatch, name):
    data = make_folder(tmp_path / "data", num_images=2)
    (data / "deep").mkdir()
    (data / "deep" / "link").symlink_to(data)
    monkeypatch.setattr(storage, "RETRY_S", 0.0)
    for each in (name, "listdir") if name == "scandir" else (name,):
        monkeypatch.setattr(os, each, FailsOnce(getattr(os, each), data / "deep", errno.ESTALE, times=2))
    with pytest.raises(StorageError, match=r"^the storage does not answer: .*/deep.*: Stale file handle"):
        listed(DataConfig(root=str(data)), "")


def test_list_images__a_folder_that_must_not_be_read_is_refused_at_once(tmp_path, monkeypatch):
    data = make_folder(tmp_path / "data", num_images=2)
    make_folder(data / "deep", num_images=1)
    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, FailsOnce(getattr(os, name), data / "deep", errno.EACCES))
    listing = listed(DataConfig(root=str(data)), "")
    assert [image.image_id for image in listing.images] == ["photo_000.jpg", "photo_001.jpg"]
    assert listing.refused == ({"image_id": "deep", "reason": "folder cannot be read: Permission denied"},)


def test_list_images__a_photograph_that_must_not_be_looked_up_is_refused(tmp_path, monkeypatch):
    data = make_folder(tmp_path / "data", num_images=2)
    monkeypatch.setattr(os, "lstat", FailsOnce(os.lstat, data / "photo_000.jpg", errno.EACCES))
    listing = listed(DataConfig(root=str(data)), "")
    assert [image.image_id for image in listing.images] == ["photo_001.jpg"]
    assert listing.refused == ({"image_id": "photo_000.jpg", "reason": "cannot be read: Permission denied"},)


@pytest.mark.parametrize("read", [open_root, read_names])
@pytest.mark.usefixtures("dead_disk")
def test_list_images__a_root_that_does_not_answer_is_not_called_unusable(tmp_path, read):
    make_paired(tmp_path)
    with pytest.raises(StorageError, match=f"^the storage does not answer: {tmp_path}"):
        read(str(tmp_path))


_HIDDEN = (
    *(".Trash-1000/files/a.jpg", ".ipynb_checkpoints/a.jpg", ".thumbnails/large/a.png", ".a.jpg", ".git/a.png"),
    *("sub/@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", "__MACOSX/sub/._a.jpg", "$RECYCLE.BIN/a.jpg", "lost+found/a.jpg"),
    *("#recycle/a.jpg", "mlruns/0/1/artifacts/samples/strip_final.jpg"),
)


@pytest.mark.reports
@pytest.mark.parametrize("store", ["local", "memory"])
def test_list_images__hidden_and_system_folders_are_left_out_and_counted(tmp_path, store):
    root = open_root(str(tmp_path)) if store == "local" else Folder(f"memory://{tmp_path.name}")
    for name in (*_HIDDEN, "a.jpg", "sub/a.jpg", "...dots.jpg" if store == "memory" else "b..jpg"):
        root.write_bytes(name, b"x")
    listing = listed(DataConfig(root=root.uri), "")
    assert [image.image_id for image in listing.images] == (
        ["a.jpg", "b..jpg", "sub/a.jpg"] if store == "local" else ["a.jpg", "sub/a.jpg"]
    )
    hidden = "hidden, or in a hidden or system folder"
    assert listing.passed_over == {hidden: len(_HIDDEN) + (store == "memory")}
    assert passed_over_words(listing.passed_over) == [f"{listing.passed_over[hidden]} {hidden}"]


@pytest.mark.reports
def test_list_images__hidden_names_above_the_root_do_not_count(tmp_path):
    make_folder(tmp_path / ".cache" / "lost+found", num_images=2)
    assert len(_ids(tmp_path / ".cache" / "lost+found")) == 2


@pytest.mark.reports
def test_list_images__names_of_jpeg_are_known_and_other_pictures_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(listing_module, "EXTENSIONS", (".jpg", ".jpeg", ".jpe", ".jfif"))
    for name in ("a.JPG", "b.jpe", "c.JFIF", "1.HEIC", "2.heic", "3.heic", "raw.NEF", "notes.txt", "video.mp4"):
        (tmp_path / name).write_bytes(b"x")
    listing = listed(DataConfig(root=str(tmp_path)), "")
    assert [image.image_id for image in listing.images] == ["a.JPG", "b.jpe", "c.JFIF"]
    assert listing.passed_over == {".heic": 3, ".nef": 1, "no picture": 2}
    assert passed_over_words(listing.passed_over) == [
        "3 .heic (`pip install transfgu-ray[heif]` reads them)",
        "1 .nef (save them as JPEG or PNG)",
    ]
    for name in ("a.JPG", "b.jpe", "c.JFIF"):
        (tmp_path / name).unlink()
    with pytest.raises(DataError, match=r"no photograph .*; passed over: 3 \.heic \(`pip install"):
        listed(DataConfig(root=str(tmp_path)), "")


@pytest.mark.reports
@pytest.mark.parametrize("store", ["local", "memory"])
def test_list_images__outputs_beside_the_photographs_are_left_out(tmp_path, store):
    root = open_root(str(tmp_path)) if store == "local" else Folder(f"memory://{tmp_path.name}out")
    own, below = Folder(root.uri), Folder(root.uri_of("sub/out"))
    mark_outputs(own, ["masks", "legend.png"])
    mark_outputs(below, ["masks"])
    mark_outputs(below, ["overlays", "masks"])
    outputs = ("masks/a.png", "masks/deep/a.png", "legend.png", "sub/out/masks/a.png", "sub/out/overlays/a.jpg")
    photos = ["a.png", "masks.png", "sub/legend.png", "sub/masks/a.png", "sub/out/a.png"]
    for name in (*outputs, *photos):
        root.write_bytes(name, b"x")
    listing = listed(DataConfig(root=root.uri), "")
    assert [image.image_id for image in listing.images] == photos
    assert listing.passed_over == {"no picture": 2, "output of transfgu": len(outputs)}


def test_list_images__in_the_order_of_whole_paths_not_of_folders(tmp_path):
    names = ["a-c.jpg", "a.jpg", "a/b.jpg", "a/b/c.jpg", "a/b0.jpg", "a0.jpg", "a é.jpg", "Z.jpg", "b\U0001f600.jpg"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert _ids(tmp_path) == sorted(names) == sorted(names, key=str.encode)
