import io
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Resize

from tests.builders import damaged_copies, make_hostile_folder
from transfgu_ray.images import (
    EXTENSIONS,
    ImageRefused,
    Resampling,
    centre_crop,
    cut_crops,
    decode_label,
    decode_rgb,
    resize_label,
    to_square,
    to_working,
)

RED, BLUE = (230, 20, 20), (20, 20, 230)


def _photo(size=(64, 48)):
    """Red on the left, blue on the right, white in the upper left corner: each turn and mirroring looks different."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    image.paste("white", (0, 0, 16, 16))
    return image


def _bytes(image, kind="PNG", **options):
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def _decode(data, min_side_px=8, max_pixels=10**6):
    return decode_rgb(data, min_side_px, max_pixels)


def _far(image, other):
    return np.abs(np.asarray(image).astype(int) - np.asarray(other).astype(int)).mean()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_rgb__upright_for_every_exif_orientation(orientation):
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = _photo() if orientation == 1 else _photo().transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = _decode(_bytes(stored, "JPEG", exif=exif, quality=95))
    assert upright.size == (64, 48)
    assert _far(upright, _photo()) < 6


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 95}, 6),
    ],
)
def test_decode_rgb__file_formats(kind, options, tolerance):
    got = _decode(_bytes(_photo(), kind, **options))
    assert got.mode == "RGB"
    assert _far(got, _photo()) <= tolerance


def test_decode_rgb__grey_and_one_bit():
    grey = _photo().convert("L")
    assert _far(_decode(_bytes(grey)), grey.convert("RGB")) == 0
    bits = grey.point(lambda v: 255 * (v > 128)).convert("1")
    assert sorted(_decode(_bytes(bits)).getcolors()) == sorted([(256, (255,) * 3), (64 * 48 - 256, (0,) * 3)])


def test_decode_rgb__cmyk():
    assert _far(_decode(_bytes(_photo().convert("CMYK"), "JPEG", quality=95)), _photo()) < 6


def test_decode_rgb__sixteen_bit_grey_keeps_its_tones():
    tones = np.linspace(0, 65535, 64).round().astype(np.uint16)
    got = np.asarray(_decode(_bytes(Image.fromarray(np.tile(tones, (48, 1))))))
    # A bare conversion would clip all but the darkest 1/256.
    assert np.array_equal(got[0, :, 0], np.rint(tones / 257))
    assert np.array_equal(got[..., 0], got[..., 2])


def test_decode_rgb__float_grey():
    tones = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (48, 1))
    got = np.asarray(_decode(_bytes(Image.fromarray(tones), "TIFF")))
    assert np.array_equal(got[..., 1], np.rint(tones * 255))


def test_decode_rgb__transparency_lies_over_white():
    rgba = _photo().convert("RGBA")
    alpha = Image.new("L", rgba.size, 255)
    alpha.paste(0, (0, 24, 64, 48))
    alpha.paste(128, (0, 20, 64, 24))
    rgba.putalpha(alpha)
    got = np.asarray(_decode(_bytes(rgba))).astype(int)
    assert (got[24:] == 255).all()
    assert np.array_equal(got[:20], np.asarray(_photo())[:20])
    assert np.abs(got[21, 40] - (np.array(BLUE) * 128 + 255 * 127) / 255).max() <= 1


def test_decode_rgb__grey_with_alpha_over_white():
    image = Image.new("LA", (40, 40), (0, 255))
    image.paste((0, 0), (0, 0, 20, 40))
    got = np.asarray(_decode(_bytes(image)))
    assert (got[:, :20] == 255).all()
    assert (got[:, 20:] == 0).all()


def test_decode_rgb__palette_with_and_without_a_transparent_colour():
    image = Image.new("P", (40, 40), 0)
    image.putpalette([0, 0, 0, *RED, *BLUE])
    image.paste(1, (20, 0, 40, 40))
    opaque = _decode(_bytes(image))
    assert {colour for _, colour in opaque.getcolors()} == {(0, 0, 0), RED}
    clear = _decode(_bytes(image, transparency=0))
    assert {colour for _, colour in clear.getcolors()} == {(255, 255, 255), RED}


def test_decode_rgb__first_frame_of_many():
    data = _bytes(_photo(), "TIFF", save_all=True, append_images=[Image.new("RGB", (64, 48), "black")])
    assert _far(_decode(data), _photo()) == 0


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"hello, I am a text file", "not an image"),
        (_bytes(_photo(), "GIF"), "not an image"),
        (_bytes(_photo(), "EPS"), "not an image"),
        (_bytes(_photo((400, 300)), "JPEG")[:1500], "damaged: .*truncated"),
        (_bytes(_photo())[:120], "damaged|not an image"),
        (_bytes(Image.new("RGB", (1, 1))), r"too small: 1 x 1 px, below data\.min_side_px=8"),
        (_bytes(Image.new("RGB", (20000, 7))), "too small: 20000 x 7 px"),
        (_bytes(Image.new("L", (1001, 1000))), r"too large: 1001 x 1000 px, above data\.max_pixels=1000000"),
        (_bytes(Image.fromarray(np.full((9, 9), -1.0, np.float32)), "TIFF"), "pixel values outside 0-65535"),
        (_bytes(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF"), "pixel values outside 0-65535"),
    ],
    ids=["empty", "text", "gif", "eps", "cut_jpeg", "cut_png", "dot", "strip", "huge", "negative", "nan"],
)
def test_decode_rgb__refuses_with_a_reason(data, reason):
    with pytest.raises(ImageRefused, match=reason):
        _decode(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "BMP"])
@pytest.mark.filterwarnings("ignore")
def test_decode_rgb__damaged_bytes_never_raise_anything_else(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    whole = _bytes(_photo(), kind, **({} if kind == "BMP" else {"exif": exif}))
    refused = 0
    for broken in damaged_copies(whole, 300):
        try:
            assert _decode(broken).mode == "RGB"
        except ImageRefused:
            refused += 1
    assert refused > 0


def test_decode_rgb__hostile_folder(tmp_path):
    good, bad = make_hostile_folder(tmp_path)
    for name in good:
        assert _decode((tmp_path / name).read_bytes(), min_side_px=32, max_pixels=120_000_000).mode == "RGB"
    for name in bad:
        with pytest.raises(ImageRefused):
            _decode((tmp_path / name).read_bytes(), min_side_px=32, max_pixels=120_000_000)


@pytest.mark.parametrize("resample", get_args(Resampling))
def test_to_working__squashes_to_height_and_width_channels_first(resample):
    working = to_working(_photo(), (32, 96), resample)
    assert working.shape == (3, 32, 96)
    assert working.dtype == np.uint8
    assert working[:, 28, 8].tolist() == list(RED)
    assert working[:, 28, 88].tolist() == list(BLUE)


def test_to_square__centre_of_the_longer_side():
    pixels = np.zeros((4, 10, 3), dtype=np.uint8)
    pixels[:, 3:7] = np.arange(1, 5)[None, :, None]
    square = to_square(Image.fromarray(pixels), 4)
    np.testing.assert_array_equal(np.asarray(square), pixels[:, 3:7])
    tall = to_square(Image.fromarray(pixels.transpose(1, 0, 2)), 8, Image.Resampling.NEAREST)
    np.testing.assert_array_equal(np.asarray(tall)[::2, ::2], pixels.transpose(1, 0, 2)[3:7])


def test_to_working__by_hand():
    image = Image.fromarray(np.arange(0, 180, 10, dtype=np.uint8).reshape(2, 3, 3).repeat(3, 0).repeat(3, 1))
    pixels = np.asarray(image)
    # Six rows to three: means of two; nine columns to three: the middle one, since nothing is antialiased.
    half = to_working(image, (3, 3), "bilinear").transpose(1, 2, 0)
    np.testing.assert_array_equal(half, np.rint(pixels[:, 1::3].reshape(3, 2, 3, 3).mean(1)))
    nearest = to_working(image, (4, 4), "nearest").transpose(1, 2, 0)
    # Rounded down: rows 0, 1.5, 3, 4.5 and columns 0, 2.25, 4.5, 6.75.
    np.testing.assert_array_equal(nearest, pixels[[0, 1, 3, 4]][:, [0, 2, 4, 6]])


@pytest.mark.parametrize(("length", "size"), [(375, 320), (500, 320), (33, 64), (7, 7), (640, 123)])
def test_resize_label__is_torchs_nearest(length, size):
    ids = np.random.default_rng(0).integers(0, 255, (length, 50), dtype=np.uint8)
    want = torch.nn.functional.interpolate(torch.from_numpy(ids)[None, None].float(), (size, 50))[0, 0]
    np.testing.assert_array_equal(resize_label(ids, (size, 50)), want)


@pytest.mark.parametrize("resample", get_args(Resampling))
def test_cut_crops__windows_of_the_image_resized(resample):
    working = to_working(_photo(), (48, 64), "bicubic")
    boxes = np.array([[0, 0, 16, 16], [32, 16, 64, 48], [0, 24, 24, 48]], dtype=np.int32)
    crops = cut_crops(working, boxes, 16, resample)
    assert crops.shape == (3, 3, 16, 16)
    # The first keeps its size and so its pixels; the others have one colour, except where the filter blends.
    assert np.array_equal(crops[0], working[:, :16, :16])
    assert (crops[1, :, 2:-2, 2:-2].transpose(1, 2, 0) == BLUE).all()
    assert (crops[2, :, 2:-2, 2:-2].transpose(1, 2, 0) == RED).all()


def test_decode_label__palette_and_grey_keep_their_ids():
    ids = np.array([[0, 8, 255], [13, 12, 0]], dtype=np.uint8)
    palette = Image.fromarray(ids, "P")
    palette.putpalette(list(range(255, -1, -1)) * 3)
    assert np.array_equal(decode_label(_bytes(palette)), ids)
    assert np.array_equal(decode_label(_bytes(Image.fromarray(ids))), ids)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (_bytes(_photo()), "8-bit palette or greyscale PNG: mode RGB"),
        (b"text", "its label is damaged"),
        (b"", "its label is damaged"),
        (_bytes(Image.effect_noise((64, 64), 60))[:600], "its label is damaged"),
    ],
    ids=["colour", "text", "empty", "cut"],
)
def test_decode_label__refuses_with_a_reason(data, reason):
    with pytest.raises(ImageRefused, match=reason):
        decode_label(data)


def test_resize_label__invents_no_ids():
    ids = np.repeat(np.array([[0, 255], [8, 20]], dtype=np.uint8), 3, axis=0).repeat(3, axis=1)
    got = resize_label(ids, (5, 9))
    assert got.shape == (5, 9)
    assert set(got.flatten()) == {0, 8, 20, 255}
    assert np.array_equal(resize_label(got, (5, 9)), got)


@pytest.mark.parametrize("size", [(64, 48), (31, 77), (101, 40), (40, 40), (59, 37), (37, 59)])
@pytest.mark.parametrize("name", ["BILINEAR", "NEAREST"])
def test_centre_crop__is_what_the_published_evaluations_call(size, name):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    published = Compose([Resize(40, getattr(InterpolationMode, name)), CenterCrop(40)])
    got = centre_crop(image, 40, getattr(Image.Resampling, name))
    assert got.size == (40, 40)
    assert np.array_equal(np.asarray(got), np.asarray(published(image)))


@pytest.mark.reports
@pytest.mark.parametrize(("kind", "ending"), [("HEIF", ".heic"), ("AVIF", ".avif")])
def test_decode_rgb__heic_and_avif(kind, ending):
    if ending not in EXTENSIONS:
        pytest.skip(f"no decoder of {kind} is installed")
    photo = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    found = _decode(_bytes(photo, kind, quality=95))
    assert found.size == (64, 48)
    assert np.abs(np.asarray(found).astype(int) - np.asarray(photo)).max() <= 12


@pytest.mark.reports
def test_decode_rgb__avif_is_upright():
    if ".avif" not in EXTENSIONS:
        pytest.skip("no decoder of AVIF is installed")
    exif = Image.Exif()
    exif[0x0112] = 6
    assert _decode(_bytes(_photo(), "AVIF", exif=exif)).size == (48, 64)
