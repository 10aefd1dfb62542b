"""Photographs as columns, against the objects that they stand for."""

import subprocess
import sys

import pytest

from transfgu_ray.datasets.listing import Listing
from transfgu_ray.datasets.photographs import ImageRef, Images

REFS = [
    ImageRef("a/1.jpg", None, 10),
    ImageRef("b/é 2.png", "masks/2.png", -1),
    ImageRef("c.jpg", None, 0, "train.tar@512+7"),
    ImageRef("d.jpg", "train.tar@2048+9", 2**40, "train.tar@1024+9"),
    ImageRef("e.jpg", None, 3),
]


def test_images__read_as_the_photographs_they_are_made_of() -> None:
    images = Images(iter(REFS))
    assert len(images) == 5
    assert [*images] == REFS
    assert [images[i] for i in range(-5, 5)] == [REFS[i] for i in range(-5, 5)]
    for at in (
        slice(None),
        slice(1, 3),
        slice(3, 1),
        slice(-2, None),
        slice(0, 100),
        slice(None, None, 2),
        slice(4, 0, -2),
    ):
        assert isinstance(images[at], Images)
        assert [*images[at]] == REFS[at]
    assert images[1:4][1:] == REFS[2:4]
    assert images == Images(REFS) == REFS
    assert images != Images(REFS[:4])
    assert images != [*REFS[:4], ImageRef("f.jpg", None, 3)]
    with pytest.raises(IndexError):
        images[5]
    assert (len(Images(())), [*Images(())]) == (0, [])


def test_images__without_labels() -> None:
    images = Images(REFS).without_labels()
    assert [(image.image_id, image.label_id, image.place) for image in images] == [
        (ref.image_id, None, ref.place) for ref in REFS
    ]
    assert images.without_labels() is images


def test_images__more_than_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transfgu_ray.datasets.photographs._ROWS_AT_ONCE", 2)
    assert [*Images(REFS)] == REFS
    assert [*Images(REFS[:4])[1:]] == REFS[1:4]


def test_listing__fingerprint_is_the_same_for_both() -> None:
    one, other = Listing(tuple(REFS), shards={"train.tar": 9}), Listing(Images(REFS), shards={"train.tar": 9})
    assert one.fingerprint == other.fingerprint
    assert one.fingerprint != Listing(Images(REFS)).fingerprint


_PEAK = """
import resource, sys
from transfgu_ray.datasets.photographs import ImageRef, Images
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
images = Images(ImageRef(f"some/folder/of/photographs/{i:08d}.jpg", None, i) for i in range(300_000))
assert sum(1 for _ in images) == 300_000
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 300_000)
"""


def test_images__take_some_bytes_each() -> None:
    done = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True)
    # Some 60 bytes kept, twice while they are put together, and one batch as objects; a tuple of objects takes 300.
    assert float(done.stdout) < 220, done.stdout
