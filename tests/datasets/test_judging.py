"""A check and a run judge the same files by the same rule: what one refuses, the other does, in the same words."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.builders import listed, make_paired
from transfgu_ray.config.sections import DataConfig
from transfgu_ray.datasets.check import Check
from transfgu_ray.datasets.listing import read_pairs
from transfgu_ray.datasets.paired import read_names
from transfgu_ray.engine.parts import PartStats, decode_labelled
from transfgu_ray.engine.stream import Photo
from transfgu_ray.storage import Folder

pytestmark = pytest.mark.reports


def judged(data: Path, **settings):
    """Photographs that a run takes, with their masks, and those refused, with their reasons; a check must agree."""
    config = DataConfig(dataset="paired", root=str(data), names=tuple(read_names(str(data))), **settings)
    root, stats = Folder(str(data)), PartStats()
    images = listed(config, "val", "fine").images
    pairs = read_pairs(root, [image.place for image in images], [image.label_id for image in images])
    photos = [Photo(image.image_id, *pair) for image, pair in zip(images, pairs, strict=True)]
    taken = {
        photo.image_id: (image, classes)
        for photo, image, classes in decode_labelled(
            photos, stats, limits=config, table=config.spec.label_table("fine")
        )
    }
    found = Check("paired", str(data), config).run(lambda done: None)
    # The splits of this dataset hold the same photographs; of one the labels are not read.
    in_check = {refusal["image_id"]: refusal["reason"] for refusal in found.refused}
    in_run = {refusal["image_id"]: refusal["reason"] for refusal in stats.refused}
    assert in_check == in_run
    return taken, in_run


def turn(data: Path, *, masks: bool) -> None:
    """Store every photograph, and on request its mask, as a camera held upright would: turned, with orientation 6."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for path in sorted((data / "images/deep").iterdir()):
        Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path, quality=95, exif=exif)
    for path in sorted((data / "masks/deep").iterdir()) if masks else ():
        Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path)


def test_masks__are_as_large_as_the_upright_photograph(tmp_path):
    make_paired(tmp_path, num_images=2)
    turn(tmp_path, masks=False)
    taken, refused = judged(tmp_path)
    assert not refused
    for image, classes in taken.values():
        assert (image.size, classes.shape) == ((96, 72), (72, 96))


def test_masks__as_a_turned_photograph_is_stored_are_refused(tmp_path):
    make_paired(tmp_path, num_images=2)
    turn(tmp_path, masks=True)
    taken, refused = judged(tmp_path)
    assert not taken
    assert {*refused.values()} == {"its label is of another size: 72 x 96 px, the upright photograph 96 x 72 px"}


def test_masks__may_be_turned_by_an_orientation_of_their_own(tmp_path):
    make_paired(tmp_path, num_images=1)
    mask = tmp_path / "masks/deep/0.png"
    upright = np.asarray(Image.open(mask))
    turn(tmp_path, masks=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(mask).save(mask, exif=exif)
    ((_, classes),) = judged(tmp_path)[0].values()
    assert np.array_equal(classes == 255, upright == 255)
    assert np.array_equal(classes == 0, upright == 0)


@pytest.mark.parametrize("size", [(95, 72), (48, 36), (1, 1), (192, 144)])
def test_masks__of_any_other_size_are_refused(tmp_path, size):
    make_paired(tmp_path, num_images=2)
    Image.new("L", size).save(tmp_path / "masks/deep/0.png")
    taken, refused = judged(tmp_path)
    want = f"its label is of another size: {size[0]} x {size[1]} px, the upright photograph 96 x 72 px"
    assert refused == {"images/deep/0.jpg": want}
    assert [*taken] == ["images/deep/1.jpg"]


def saved(image: Image.Image, kind: str, **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def deep(pixels: np.ndarray) -> bytes:
    sink = io.BytesIO()
    tifffile.imwrite(sink, pixels, photometric="minisblack", planarconfig="contig" if pixels.ndim == 3 else None)
    return sink.getvalue()


NOISE = Image.effect_noise((96, 72), 60)
BAD_PHOTOS = {
    "truncated": (saved(NOISE, "JPEG")[:900], "damaged: image file is truncated"),
    "truncated PNG": (saved(NOISE, "PNG")[:900], "damaged: "),
    "8 x 8": (saved(Image.new("RGB", (8, 8)), "JPEG"), "too small: 8 x 8 px, below data.min_side_px=32"),
    "NaN": (deep(np.full((72, 96), np.nan, np.float32)), "pixel values outside 0-65535"),
    "negative": (deep(np.full((72, 96), -1, np.int16)), "pixel values outside 0-65535"),
    "five bands": (deep(np.ones((72, 96, 5), np.uint16)), "a TIFF of 5 bands"),
    "text": (b"no photograph", "not an image"),
    "empty": (b"", "empty file"),
}


@pytest.mark.parametrize("name", BAD_PHOTOS)
def test_photographs__that_a_run_refuses_are_refused_by_a_check(tmp_path, name):
    make_paired(tmp_path, num_images=2)
    data, reason = BAD_PHOTOS[name]
    (tmp_path / "images/deep/0.jpg").write_bytes(data)
    taken, refused = judged(tmp_path)
    assert [*taken] == ["images/deep/1.jpg"]
    assert refused["images/deep/0.jpg"].startswith(reason)


def test_photographs__are_judged_by_the_settings_that_the_run_will_have(tmp_path):
    make_paired(tmp_path, num_images=1)
    (tmp_path / "images/deep/0.jpg").write_bytes(
        deep(np.random.default_rng(0).integers(0, 4096, (72, 96, 5), np.uint16))
    )
    assert judged(tmp_path)[1]
    taken, refused = judged(tmp_path, bands=(3, 2, 1))
    assert (len(taken), refused) == (1, {})
    assert judged(tmp_path, bands=(3, 2, 1), max_pixels=5000)[1] == {
        "images/deep/0.jpg": "too large: 96 x 72 px, above data.max_pixels=5000"
    }


LOSSY = {
    "JPEG": (saved(NOISE, "JPEG", quality=100), "a JPEG inside"),
    "palette as JPEG": (saved(NOISE.convert("P").convert("RGB"), "JPEG"), "a JPEG inside"),
    "JPEG in TIFF": (saved(NOISE, "TIFF", compression="jpeg"), "a TIFF of compression jpeg"),
    "WebP": (saved(NOISE.convert("RGB"), "WEBP", quality=90), "a lossy WebP"),
}


@pytest.mark.parametrize("name", LOSSY)
def test_masks__that_lost_ids_are_refused(tmp_path, name):
    make_paired(tmp_path, num_images=2)
    data, kind = LOSSY[name]
    (tmp_path / "masks/deep/0.png").write_bytes(data)
    taken, refused = judged(tmp_path)
    assert refused == {
        "images/deep/0.jpg": f"its label is {kind}, which changes ids; labels are lossless: PNG, BMP or TIFF"
    }
    assert [*taken] == ["images/deep/1.jpg"]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        *(("TIFF", {"compression": name}) for name in (None, "packbits", "tiff_lzw", "tiff_adobe_deflate", "lzma")),
    ],
)
def test_masks__may_be_any_lossless_file(tmp_path, kind, options):
    make_paired(tmp_path, num_images=1)
    path = tmp_path / "masks/deep/0.png"
    ids = np.asarray(Image.open(path))
    ((_, before),) = judged(tmp_path)[0].values()
    path.write_bytes(saved(Image.fromarray(ids), kind, **options))
    ((_, after),) = judged(tmp_path)[0].values()
    assert np.array_equal(before, after)


@pytest.mark.parametrize("lost", ["images/deep/0.jpg", "masks/deep/0.png"])
def test_files__that_cannot_be_read_are_refused_in_the_same_words(tmp_path, lost):
    make_paired(tmp_path, num_images=2)
    path = tmp_path / lost
    path.unlink()
    # It is listed, and cannot be opened.
    (path.mkdir if path.suffix == ".png" else lambda: path.write_bytes(b""))()
    taken, refused = judged(tmp_path)
    assert [*taken] == ["images/deep/1.jpg"]
    assert re.match(r"empty file|its label cannot be read: .* \(masks/deep/0\.png\)", refused["images/deep/0.jpg"])
