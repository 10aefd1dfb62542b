"""Photographs of samples that are not 8 bits of grey or colours, and what becomes of their tones."""

import io

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from tests.builders import damaged_copies
from transfgu_ray.images import ImageRefused, TooManyPixels, decode_rgb, to_tones

pytestmark = pytest.mark.reports

RAMP = np.linspace(0, 1, 64)


def tiff(samples, **options):
    sink = io.BytesIO()
    tifffile.imwrite(sink, samples, **options)
    return sink.getvalue()


def decode(data, bands=None, max_pixels=10**6):
    return np.asarray(decode_rgb(data, 8, max_pixels, bands))


def ramp(bits, kind=np.uint16):
    """Grey from black on the left to the white of so many bits on the right, (48, 64)."""
    return np.tile(np.rint(RAMP * (2**bits - 1)), (48, 1)).astype(kind)


def five(kind=np.uint16, bits=12):
    """Five bands, (48, 64, 5), each another picture; the fifth alone reaches 16 bits."""
    grey = np.tile(RAMP, (48, 1))
    bands = [grey, grey[:, ::-1], np.full_like(grey, 0.5), grey**2]
    samples = [np.rint(band * (2**bits - 1)).astype(kind) for band in bands]
    return np.stack([*samples, np.full((48, 64), np.iinfo(kind).max, kind)], axis=2)


GREYS = {
    "12 bits in 16": tiff(ramp(12)),
    "12 bits, big-endian": tiff(ramp(12), byteorder=">"),
    "12 bits, BigTIFF": tiff(ramp(12), bigtiff=True),
    "12 bits packed": tiff(ramp(12), bitspersample=12),
    "12 bits, Deflate": tiff(ramp(12), compression="zlib", predictor=True),
    "12 bits, LZW in tiles": tiff(ramp(12), compression="lzw", tile=(16, 16)),
    "10 bits": tiff(ramp(10)),
    "14 bits": tiff(ramp(14)),
    "16 bits": tiff(ramp(16)),
    "8 bits in 16": tiff(ramp(8)),
    "12 bits with sign": tiff(ramp(12, np.int16)),
    "15 bits with sign": tiff(ramp(15, np.int16)),
    "12 bits in 32": tiff(ramp(12, np.uint32)),
    "12 bits in 64": tiff(ramp(12, np.uint64)),
    "12 bits as fractions": tiff(ramp(12, np.float32)),
    "0 to 255 as fractions": tiff(ramp(8, np.float64)),
    "0 to 1": tiff(np.tile(RAMP, (48, 1)).astype(np.float32)),
    "0 to 1 as half precision": tiff(np.tile(RAMP, (48, 1)).astype(np.float16)),
    "white is zero": tiff(4095 - ramp(12), photometric="miniswhite"),
    "12 bits in a PNG": imagecodecs.png_encode(ramp(12)),
    "12 bits in colour": tiff(np.stack([ramp(12)] * 3, axis=2), photometric="rgb"),
    "12 bits in a colour PNG": imagecodecs.png_encode(np.stack([ramp(12)] * 3, axis=2)),
    "16 bits in a colour PNG": imagecodecs.png_encode(np.stack([ramp(16)] * 3, axis=2)),
    "12 bits, opaque": tiff(
        np.stack([ramp(12)] * 3 + [np.full((48, 64), 65535, np.uint16)], axis=2), photometric="rgb", extrasamples=[2]
    ),
    "12 bits and opacity in a PNG": imagecodecs.png_encode(
        np.stack([ramp(12), np.full((48, 64), 65535, np.uint16)], axis=2)
    ),
}


@pytest.mark.parametrize("name", GREYS)
def test_decode_rgb__deep_samples_have_the_cameras_tones(name):
    got = decode(GREYS[name])
    want = np.rint(RAMP * 255)
    # Samples are whole numbers: 8 bits of 256 steps cannot be met exactly.
    assert np.abs(got.astype(int) - want[None, :, None]).max() <= 1
    assert got[0, 0].tolist() == [0, 0, 0]
    assert got[0, -1].tolist() == [255, 255, 255]


@pytest.mark.parametrize(("most", "white"), [(4095, 4095), (4000, 4095), (16383, 16383), (65535, 1023), (500, 1023)])
def test_decode_rgb__the_tags_of_a_dark_frame_say_what_white_is(most, white):
    dark = np.full((48, 64), 700, np.uint16)
    got = decode(tiff(dark, extratags=[(281, "H", 1, most, True)]))
    # A tag that says nothing, or is contradicted by a sample, leaves the range that is seen.
    assert (got == round(700 * 255 / white)).all()


def test_decode_rgb__opacity_of_deep_colours_lies_over_white():
    colour = np.stack([ramp(16)] * 3 + [np.full((48, 64), 65535, np.uint16)], axis=2)
    colour[:24, :, 3] = 0
    for data in (tiff(colour, photometric="rgb", extrasamples=[2]), imagecodecs.png_encode(colour)):
        got = decode(data)
        assert (got[:24] == 255).all()
        assert np.array_equal(got[24:, :, 0], np.rint(ramp(16)[24:] / 257))
    colour[:24, :, :3] = 0
    assert np.array_equal(decode(tiff(colour, photometric="rgb", extrasamples=[1])), got)


@given(arrays(np.uint16, (3, 5)), st.sampled_from([None, 9, 12, 16]))
def test_to_tones__is_one_scale_that_never_turns_or_clips(samples, used_bits):
    tones = to_tones(samples, used_bits)
    largest = int(samples.max())
    white = next(2**bits - 1 for bits in (8, 10, 12, 14, 16) if largest < 2**bits)
    if used_bits is not None and largest < 2**used_bits:
        white = 2**used_bits - 1
    assert np.array_equal(tones, np.rint(samples.astype(float) * 255 / white))


@given(arrays(np.float32, (3, 5), elements=st.floats(0, 1.25, width=32)))
def test_to_tones__fractions_that_overshoot_one_do_not_turn_black(samples):
    assert np.abs(to_tones(samples) - np.clip(samples, 0, 1) * 255).max() <= 0.51


@pytest.mark.parametrize("kind", [np.uint16, np.uint8])
@pytest.mark.parametrize("options", [{"planarconfig": "contig"}, {"planarconfig": "separate"}])
@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "zstd"])
@pytest.mark.parametrize("photometric", ["minisblack", "rgb"])
def test_decode_rgb__bands_are_picked_by_number(kind, options, compression, photometric):
    samples = five(kind, 12 if kind is np.uint16 else 8)
    stored = np.moveaxis(samples, 2, 0) if options["planarconfig"] == "separate" else samples
    data = tiff(stored, photometric=photometric, compression=compression, **options)
    want = to_tones(samples[..., [2, 1, 0]])
    assert np.array_equal(decode(data, (3, 2, 1)), want)
    # The bands that are not picked do not set the scale of those that are.
    assert want.max() == 255
    assert np.array_equal(decode(data, (4, 4, 4))[..., 0], to_tones(samples[..., 3]))
    with pytest.raises(ImageRefused, match=r"bands 1 to 5 are there, not the 6 of data\.bands=\[6, 1, 1\]"):
        decode(data, (6, 1, 1))


@pytest.mark.parametrize("num_bands", [2, 3, 5, 13])
def test_decode_rgb__says_what_a_tiff_of_unnamed_bands_is(num_bands):
    samples = np.ones((48, 64, num_bands), np.uint16)
    with pytest.raises(ImageRefused, match=rf"a TIFF of {num_bands} bands, .* e\.g\. data\.bands=\[3,2,1\]"):
        decode(tiff(samples, photometric="minisblack", planarconfig="contig"))


def test_decode_rgb__bands_of_other_files():
    colour = np.asarray(Image.merge("RGBA", [Image.effect_noise((64, 48), 90) for _ in range(4)]))
    for count, mode in ((3, "RGB"), (4, "RGBA")):
        sink = io.BytesIO()
        Image.fromarray(colour[..., :count], mode).save(sink, "PNG")
        assert np.array_equal(decode(sink.getvalue(), (3, 1, 2)), colour[..., [2, 0, 1]])
    assert np.array_equal(decode(sink.getvalue(), (4, 1, 4)), colour[..., [3, 0, 3]])
    palette = io.BytesIO()
    Image.fromarray(colour[..., :3]).quantize(16).save(palette, "PNG")
    assert np.array_equal(decode(palette.getvalue(), (3, 2, 1)), decode(palette.getvalue())[..., ::-1])
    deep = imagecodecs.png_encode(five()[..., :3].copy())
    assert np.array_equal(decode(deep, (3, 2, 1)), decode(deep)[..., ::-1])
    with pytest.raises(ImageRefused, match="bands 1 to 1 are there, not the 2"):
        decode(GREYS["12 bits in a PNG"], (1, 2, 1))


def test_decode_rgb__bands_are_turned_upright():
    data = tiff(five(), photometric="minisblack", planarconfig="contig", extratags=[(274, "H", 1, 6, True)])
    assert np.array_equal(decode(data, (3, 2, 1)), np.rot90(to_tones(five()[..., [2, 1, 0]]), -1))


def test_decode_rgb__bands_are_limited_before_they_are_decoded():
    data = tiff(five(), photometric="minisblack", planarconfig="contig")
    with pytest.raises(TooManyPixels, match=r"64 x 48 px, above data\.max_pixels=3000"):
        decode(data, (3, 2, 1), max_pixels=3000)
    with pytest.raises(TooManyPixels, match=r"64 x 48 px of 5 bands, above 4 x data\.max_pixels=3500"):
        decode(data, (3, 2, 1), max_pixels=3500)
    # Says that it is of 60,000 x 60,000 px.
    huge = data.replace((64).to_bytes(2, "little"), (60000).to_bytes(2, "little"), 1)
    with pytest.raises(ImageRefused):
        decode(huge, (3, 2, 1))


@pytest.mark.parametrize("name", ["12 bits, Deflate", "12 bits in colour", "12 bits in a colour PNG", "bands"])
@pytest.mark.filterwarnings("ignore")
def test_decode_rgb__damaged_samples_never_raise_anything_else(name):
    bands = (3, 2, 1) if name == "bands" else None
    whole = GREYS[name] if bands is None else tiff(five(), photometric="minisblack", compression="lzw")
    refused = 0
    for broken in damaged_copies(whole, 200):
        try:
            assert decode(broken, bands).shape[2] == 3
        except ImageRefused:
            refused += 1
    assert refused > 0
