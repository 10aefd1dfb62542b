from pathlib import Path

import pytest
from PIL import Image

from tests.builders import make_hub_table, make_tar
from transfgu_ray.datasets.places import read_places
from transfgu_ray.errors import DataError, StorageError
from transfgu_ray.serving.photographs import find_photographs


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos [1]"
    for name in ("b.jpg", "a.PNG", "frames/f_10.jpg", "frames/f_9.jpg", "frames/deep/f_1.jpg", "frames/f_9.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(root / name)
    (root / "notes.txt").write_text("")
    return root


def found(images: str) -> list[str]:
    return [image.image_id for image in find_photographs(images)[1].images]


def test_find_photographs__a_folder_in_the_order_of_its_frames(photos: Path) -> None:
    in_order = ["a.PNG", "b.jpg", "frames/deep/f_1.jpg", "frames/f_9.jpg", "frames/f_9.png", "frames/f_10.jpg"]
    assert found(str(photos)) == found(f"{photos}/") == found(photos.as_uri()) == in_order
    assert find_photographs(str(photos))[0].path == str(photos)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("frames/*.jpg", ["f_9.jpg", "f_10.jpg"]),
        ("frames/f_?.*", ["f_9.jpg", "f_9.png"]),
        ("frames/**/*.jpg", ["deep/f_1.jpg", "f_9.jpg", "f_10.jpg"]),
        ("*/f_[0-9].jpg", ["frames/f_9.jpg"]),
        ("*.jpg", ["b.jpg"]),
    ],
)
def test_find_photographs__a_glob(
    pattern: str, names: list[str], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    assert found(pattern) == names
    # The brackets in the folder's name are not a pattern: a path that exists is taken literally.
    link = photos.parent / "plain"
    link.symlink_to(photos)
    assert found(f"{link}/{pattern}") == names


def test_find_photographs__one_file(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, listing = find_photographs(str(photos / "frames/f_10.jpg"))
    assert (root.path, [image.image_id for image in listing.images]) == (str(photos / "frames"), ["f_10.jpg"])
    monkeypatch.chdir(photos)
    root, listing = find_photographs("b.jpg")
    assert root.try_read(listing.images[0].image_id)[0] == (photos / "b.jpg").read_bytes()


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ("plain/none", "none does not exist; give a folder, a file, a glob in quotes or a URI"),
        ("{}/notes.txt", r"notes\.txt is not a photograph \(\.jpg, .*with `ffmpeg"),
        ("plain/*.webp", r"no photograph matches --images plain/\*\.webp; .* holds 6$"),
        ("nowhere/*.jpg", r"nowhere/\*\.jpg: there is no folder nowhere"),
        ("nope://bucket/x", "nope://bucket/x cannot be opened: "),
    ],
)
def test_find_photographs__one_sentence_where_there_are_none(
    images: str, words: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos.parent)
    (photos.parent / "plain").symlink_to(photos)
    with pytest.raises(DataError, match=words) as refused:
        find_photographs(images.format(photos))
    assert "\n" not in str(refused.value)


def test_find_photographs__in_shards_only_where_no_files_are(photos: Path) -> None:
    members = {name: (photos / name).read_bytes() for name in ("b.jpg", "a.PNG", "frames/f_10.jpg", "frames/f_9.jpg")}
    root = photos.parent / "shards"
    tars = [
        make_tar(root / f"deep/{i}.tar", {name: members[name] for name in some})
        for i, some in enumerate([["b.jpg", "a.PNG"], ["frames/f_10.jpg", "frames/f_9.jpg"]])
    ]
    table = make_hub_table(root.parent / "tables/train-0.parquet", members)
    # As they lie there, so that neighbours are read together.
    assert found(str(root)) == found(str(table.parent)) == found(str(table)) == [*members]
    assert found(str(tars[1])) == [*members][2:]
    assert found(f"{root}/deep/*.tar") == [*members]
    assert found(f"{root}/**/0.tar") == [*members][:2]
    folder, listing = find_photographs(str(tars[0]))
    assert read_places(folder, [image.place for image in listing.images]) == [
        (members[name], None) for name in ("b.jpg", "a.PNG")
    ]
    # An archive beside what was unpacked from it.
    make_tar(photos / "all.tar", members)
    assert len(found(str(photos))) == 6


@pytest.mark.usefixtures("dead_disk")
def test_find_photographs__a_disk_that_does_not_answer_is_not_called_unusable(photos: Path) -> None:
    with pytest.raises(StorageError, match=r"^the storage does not answer: "):
        find_photographs(str(photos))
