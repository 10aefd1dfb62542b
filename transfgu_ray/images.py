"""Decoding of photographs and labels, or a reason why one is refused; resizing and cropping."""

import io
import struct
import warnings
from typing import Any, Literal, Protocol

import imagecodecs
import numpy as np
from jaxtyping import Int16, Int64, Shaped, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError, features

from transfgu_ray.tiff import DEPTHS, Tiff, open_tiff

# How photographs and crops change size. bicubic: antialiased (ours); bilinear: without antialias; nearest: the pixel
# whose index is the rounded-down one (both released).
Resampling = Literal["bicubic", "bilinear", "nearest"]

EXTENSIONS: tuple[str, ...] = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff")
# Pillow goes by content, not by name, and decodes fifty formats; for EPS it has another program run the file.
FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
if features.check("avif"):
    EXTENSIONS, FORMATS = (*EXTENSIONS, ".avif"), (*FORMATS, "AVIF")
try:
    from pillow_heif import register_heif_opener
except ImportError:
    pass
else:
    register_heif_opener()
    EXTENSIONS, FORMATS = (*EXTENSIONS, ".heic", ".heif"), (*FORMATS, "HEIF")
# Endings of other pictures: who has such files expects them to be seen.
OTHER_PICTURES = (
    *(".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".jpx", ".gif", ".psd", ".tga", ".ppm", ".pgm", ".exr"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".raw"),
)
# Raised by the decoders and metadata readers on damaged files.
_DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError,
    RuntimeError, AssertionError, struct.error,
)  # fmt: skip
# How a TIFF may be compressed, as Pillow calls it, and still give back every pixel.
_LOSSLESS_TIFF = (
    "raw", "tiff_raw_16", "packbits", "group3", "group4", "tiff_ccitt", "tiff_lzw", "tiff_adobe_deflate",
    "tiff_deflate", "lzma", "zstd",
)  # fmt: skip
_ORIENTATION = 0x0112
# Of a photograph with the largest number of pixels; all of them are decoded, whichever are used.
_MOST_BANDS = 4


class ImageRefused(Exception):
    """A photograph that cannot be used; the message says why and is counted in the manifest."""


class NotAnImage(ImageRefused):
    """A file in none of the formats that are read."""


class TooManyPixels(ImageRefused):
    """A photograph that is larger than allowed."""


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return the bytes of an image file.

    Args:
        image: the picture.
        kind: Pillow's name of the format, e.g. `PNG`.
        options: of that format, e.g. `quality`.
    """
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


class Limits(Protocol):
    """What a photograph must be, and which of its bands make the picture: settings of section `data`."""

    @property
    def min_side_px(self) -> int:
        """Shortest side, px."""

    @property
    def max_pixels(self) -> int:
        """Largest number of pixels."""

    @property
    def bands(self) -> tuple[int, int, int] | None:
        """See `decode_rgb`."""


def decode_pair(
    data: bytes, label: bytes | None, *, limits: Limits, table: Int16[np.ndarray, " 256"] | None
) -> tuple[Image.Image, UInt8[np.ndarray, "h w"] | None]:
    """Decode a photograph, and its label to classes of the same size: the one judge of both, of runs and of checks.

    Args:
        data: encoded photograph.
        label: its encoded label; None where none is wanted.
        limits: what is refused.
        table: see `to_classes`; None where no label is wanted.

    Raises:
        ImageRefused: one of them cannot be used, or they do not fit.
    """
    image = decode_photo(data, limits)
    if label is None or table is None:
        return image, None
    return image, to_classes(decode_label(label, image.size), table)


def decode_photo(data: bytes, limits: Limits) -> Image.Image:
    """Decode a photograph within the limits of a configuration; see `decode_rgb`.

    Raises:
        ImageRefused: it cannot be used.
    """
    return decode_rgb(data, limits.min_side_px, limits.max_pixels, limits.bands)


def decode_rgb(
    data: bytes, min_side_px: int, max_pixels: int, bands: tuple[int, int, int] | None = None
) -> Image.Image:
    """Decode the first frame to upright 8-bit RGB.

    EXIF orientation is applied; transparency is laid over white; CMYK, palette and greyscale are converted; deeper
    samples are scaled to 8 bits, see `to_tones`.

    Args:
        data: encoded photograph.
        min_side_px: shortest side, px.
        max_pixels: largest number of pixels.
        bands: the bands that become red, green and blue, counted from 1; None for the colours that the file names.

    Raises:
        ImageRefused: the data are not an image, or are truncated, too small or too large, or lack a band.
    """
    if not data:
        raise ImageRefused("empty file")
    try:
        tiff = _open_samples(data, bands)
        if tiff is not None:
            _check_size(tiff.size, min_side_px, max_pixels, tiff.num_bands)
            return _turned(_from_tiff(tiff, bands), tiff.orientation)
        with warnings.catch_warnings():
            # The size is checked below against the configured limit, before decoding.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(image.size, min_side_px, max_pixels)
        if _is_deep_colour_png(image, data):
            return _turned(_from_png(image, data, bands), image.getexif().get(_ORIENTATION, 1))
        return _to_rgb(ImageOps.exif_transpose(image), bands)
    except UnidentifiedImageError:
        raise NotAnImage("not an image") from None
    except Image.DecompressionBombError:
        raise TooManyPixels(f"too large: above data.max_pixels={max_pixels}") from None
    except _DAMAGED as error:
        raise ImageRefused(f"damaged: {' '.join(str(error).split())[:120]}") from None


def _check_size(size: tuple[int, int], min_side_px: int, max_pixels: int, num_bands: int = 3) -> None:
    width, height = size
    if width * height > max_pixels:
        raise TooManyPixels(f"too large: {width} x {height} px, above data.max_pixels={max_pixels}")
    if width * height * num_bands > _MOST_BANDS * max_pixels:
        raise TooManyPixels(
            f"too large: {width} x {height} px of {num_bands} bands, above {_MOST_BANDS} x data.max_pixels={max_pixels}"
        )
    if min(width, height) < min_side_px:
        raise ImageRefused(f"too small: {width} x {height} px, below data.min_side_px={min_side_px}")


def _open_samples(data: bytes, bands: tuple[int, int, int] | None) -> Tiff | None:
    """Return the TIFF whose samples have to be read one by one; None for every other file."""
    try:
        tiff = open_tiff(data)
        return tiff if tiff is not None and (bands is not None or tiff.needs_more_than_pillow) else None
    except _DAMAGED:
        # Pillow says what it is.
        return None


def _from_tiff(tiff: Tiff, bands: tuple[int, int, int] | None) -> Image.Image:
    if bands is None and tiff.colours is None:
        raise ImageRefused(
            f"a TIFF of {tiff.num_bands} bands, none of them named red, green or blue; choose three with data.bands, "
            "e.g. data.bands=[3,2,1]"
        )
    if bands is not None:
        _check_bands(bands, tiff.num_bands)
    samples = tiff.read()
    colours = samples[..., [band - 1 for band in bands]] if bands else samples[..., : tiff.colours]
    tones = to_tones(colours, tiff.used_bits)
    alpha = None if bands or tiff.alpha is None else to_tones(samples[..., tiff.alpha], tiff.used_bits)
    return _to_image(255 - tones if tiff.white_is_zero else tones, alpha, is_premultiplied=tiff.is_premultiplied)


def _is_deep_colour_png(image: Image.Image, data: bytes) -> bool:
    """Return whether Pillow would drop the lower half of 16-bit samples; of grey alone it keeps them."""
    depth, colour_type = data[24:26] if image.format == "PNG" and len(data) > 25 else (8, 0)
    return depth == 16 and colour_type != 0 and "transparency" not in image.info


def _from_png(image: Image.Image, data: bytes, bands: tuple[int, int, int] | None) -> Image.Image:
    # Pillow notices more kinds of damage, and reads what stands behind the pixels.
    image.load()
    samples = imagecodecs.png_decode(data)
    num_colours = 1 if samples.shape[2] < 3 else 3
    if bands is not None:
        _check_bands(bands, samples.shape[2])
        return _to_image(to_tones(samples[..., [band - 1 for band in bands]]))
    alpha = to_tones(samples[..., num_colours]) if samples.shape[2] > num_colours else None
    return _to_image(to_tones(samples[..., :num_colours]), alpha)


def _to_rgb(image: Image.Image, bands: tuple[int, int, int] | None) -> Image.Image:
    if bands is not None:
        return _pick(image, bands)
    if image.mode.startswith("I") or image.mode == "F":
        return _to_image(to_tones(np.asarray(image))[..., None])
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        return _over_white(image.convert("RGBA"))
    return image.convert("RGB")


def _pick(image: Image.Image, bands: tuple[int, int, int]) -> Image.Image:
    plain = image if image.mode in ("L", "LA", "RGB", "RGBA", "CMYK", "F") or image.mode[0] == "I" else None
    samples = np.atleast_3d(np.asarray(image.convert("RGB") if plain is None else plain))
    _check_bands(bands, samples.shape[2])
    return _to_image(to_tones(samples[..., [band - 1 for band in bands]]))


def _check_bands(bands: tuple[int, int, int], num_bands: int) -> None:
    if max(bands) > num_bands:
        raise ImageRefused(f"bands 1 to {num_bands} are there, not the {max(bands)} of data.bands={list(bands)}")


def _to_image(
    tones: UInt8[np.ndarray, "h w c"], alpha: UInt8[np.ndarray, "h w"] | None = None, *, is_premultiplied: bool = False
) -> Image.Image:
    """Return RGB from one or three bands, transparency laid over white."""
    rgb = np.repeat(tones, 3, axis=2) if tones.shape[2] == 1 else np.ascontiguousarray(tones)
    image = Image.fromarray(rgb)
    if alpha is None:
        return image
    merged = Image.merge("RGBa" if is_premultiplied else "RGBA", (*image.split(), Image.fromarray(alpha)))
    return _over_white(merged.convert("RGBA"))


def _over_white(image: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    image.getexif()[_ORIENTATION] = orientation
    return ImageOps.exif_transpose(image)


def to_tones(samples: Shaped[np.ndarray, "*shape"], used_bits: int | None = None) -> UInt8[np.ndarray, "*shape"]:
    """Scale samples to 0-255, with zero as black.

    Samples of 8 bits stay. Of other whole numbers 255 is the largest number of as many bits as the file says are used;
    where it does not say so, or some sample is larger, of the fewest bits among 8, 10, 12, 14 and 16 (15 where samples
    have a sign) that hold the largest sample. So a camera's 12 bits in 16-bit samples have the camera's tones. Of
    fractions 255 is 1, or, if the largest is above 1, as of whole numbers.

    Args:
        samples: of all bands that make the picture, since these share a scale.
        used_bits: what the tags of the file say.

    Raises:
        ImageRefused: a sample is not finite, negative or above 65535.
    """
    if samples.dtype == np.uint8:
        return samples
    is_fraction = samples.dtype.kind == "f"
    if is_fraction:
        samples = samples.astype(np.float32)
    if not np.isfinite(samples).all() or samples.min() < 0 or samples.max() > 65535:
        raise ImageRefused("pixel values outside 0-65535; save it as 8 or 16 bit")
    largest = round(float(samples.max()))
    depths = (1, *DEPTHS) if is_fraction else (*DEPTHS[:-1], 15, 16) if samples.dtype == np.int16 else DEPTHS
    if used_bits is None or largest >= 2**used_bits:
        used_bits = next(bits for bits in depths if largest < 2**bits)
    white = 2**used_bits - 1
    tones: np.ndarray
    if is_fraction:
        # Resampled fractions overshoot 1 a little.
        tones = np.rint(samples.clip(0, white) * (255 / white)).astype(np.uint8)
    else:
        tones = np.rint(np.arange(largest + 1) * 255 / white).astype(np.uint8)[samples]
    return tones


def to_working(image: Image.Image, size_hw: tuple[int, int], resample: Resampling) -> UInt8[np.ndarray, "3 h w"]:
    """Resize a photograph to (height, width) without keeping proportions, channels first; see `Resampling`."""
    return np.ascontiguousarray(_resize(np.asarray(image), size_hw, resample).transpose(2, 0, 1))


def _resize(pixels: UInt8[np.ndarray, "y x 3"], size_hw: tuple[int, int], resample: Resampling) -> np.ndarray:
    height, width = size_hw
    if resample == "nearest":
        return _take_nearest(pixels, size_hw)
    if resample == "bicubic":
        resized: np.ndarray = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
        return resized
    # Imported late: commands that only read pictures start without it.
    import torch
    from torch.nn.functional import interpolate

    planes = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).unsqueeze(0).float()
    smooth = interpolate(planes, size_hw, mode="bilinear", align_corners=False)[0]
    return smooth.round_().to(torch.uint8).permute(1, 2, 0).numpy()


def _take_nearest(pixels: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    rows, columns = (_nearest_rows(length, side) for length, side in zip(pixels.shape, size_hw, strict=False))
    taken: np.ndarray = pixels[rows][:, columns]
    return taken


def _nearest_rows(length: int, resized: int) -> Int64[np.ndarray, " resized"]:
    """Return the source index of each pixel along a side, as torch and OpenCV choose it: rounded down in float32."""
    rows = np.floor(np.arange(resized, dtype=np.float32) * np.float32(length / resized)).astype(np.int64)
    last: Int64[np.ndarray, " resized"] = np.minimum(rows, length - 1)
    return last


def to_square(image: Image.Image, size_px: int, resample: int = Image.Resampling.BICUBIC) -> Image.Image:
    """Cut the centre square, as wide as the shorter side, and resize it to `size_px`."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size_px, size_px), resample)


def centre_crop(image: Image.Image, size_px: int, resample: int) -> Image.Image:
    """Resize the shorter side to `size_px` and the longer in proportion, then cut the centre square.

    Reference: torchvision's Resize and CenterCrop, which the evaluations of PiCIE and STEGO call. Departures: none. The
    longer side is rounded down and the margins as Python rounds, since a shift by one pixel would change the scores.
    """
    shorter = min(image.size)
    width, height = (int(size_px * side / shorter) for side in image.size)
    left, top = round((width - size_px) / 2), round((height - size_px) / 2)
    return image.resize((width, height), resample).crop((left, top, left + size_px, top + size_px))


def cut_crops(
    working: UInt8[np.ndarray, "3 h w"], boxes: np.ndarray, crop_size: int, resample: Resampling
) -> UInt8[np.ndarray, "n 3 crop crop"]:
    """Cut windows (x0, y0, x1, y1) of the working image and resize each to a square; see `Resampling`."""
    pixels = working.transpose(1, 2, 0)
    crops = np.empty((len(boxes), 3, crop_size, crop_size), dtype=np.uint8)
    for crop, box in zip(crops, boxes, strict=True):
        # Cut before resizing, so that no filter reads pixels outside the window.
        left, top, right, bottom = map(int, box)
        crop[:] = _resize(pixels[top:bottom, left:right], (crop_size, crop_size), resample).transpose(2, 0, 1)
    return crops


def decode_label(data: bytes, size: tuple[int, int] | None = None) -> UInt8[np.ndarray, "h w"]:
    """Read the label ids of a greyscale or palette image, upright as its photograph.

    Args:
        data: encoded label.
        size: (width, height) of the upright photograph, px; None where the label is looked at alone.

    Raises:
        ImageRefused: it is not such an image, may have lost ids, or is of another size.
    """
    try:
        with warnings.catch_warnings():
            # A label is as large as its photograph, whose size has been checked.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        if (lossy := _lossy_kind(image, data)) is not None:
            raise ImageRefused(f"its label is {lossy}, which changes ids; labels are lossless: PNG, BMP or TIFF")
        if image.mode not in ("P", "L"):
            raise ImageRefused(f"its label is not an 8-bit palette or greyscale PNG: mode {image.mode}")
        if size is not None and {*image.size} != {*size}:
            raise _of_other_size(image.size, size)
        image = ImageOps.exif_transpose(image)
        if size is not None and image.size != size:
            raise _of_other_size(image.size, size)
        return np.asarray(image)
    except (*_DAMAGED, Image.DecompressionBombError) as error:
        raise ImageRefused(f"its label is damaged: {error}") from None


def _of_other_size(size: tuple[int, int], wanted: tuple[int, int]) -> ImageRefused:
    return ImageRefused(
        f"its label is of another size: {size[0]} x {size[1]} px, the upright photograph {wanted[0]} x {wanted[1]} px"
    )


def _lossy_kind(image: Image.Image, data: bytes) -> str | None:
    """Return in words how an image is stored if that does not keep every pixel; None if it does."""
    if image.format not in ("PNG", "BMP", "WEBP", "TIFF"):
        return f"a {'JPEG' if image.format == 'MPO' else image.format} inside"
    # Lossless WebP says VP8L there.
    if image.format == "WEBP" and b"VP8L" not in data[:4096]:
        return "a lossy WebP"
    if image.format == "TIFF" and image.info["compression"] not in _LOSSLESS_TIFF:
        return f"a TIFF of compression {image.info['compression']}"
    return None


def to_classes(label: UInt8[np.ndarray, "h w"], table: Int16[np.ndarray, " 256"]) -> UInt8[np.ndarray, "h w"]:
    """Map a label's ids to class ids; 255 is void.

    Args:
        label: ids as stored.
        table: class of each id, -1 for an id that must not occur; see `DatasetSpec.label_table`.

    Raises:
        ImageRefused: such an id occurs.
    """
    classes: np.ndarray = table[label]
    if classes.min() < 0:
        known = np.flatnonzero(table >= 0)
        raise ImageRefused(
            f"its label holds an unknown id: {label[classes < 0].min()}; known are {', '.join(_runs(known))}"
        )
    return classes.astype(np.uint8)


def _runs(ids: np.ndarray) -> list[str]:
    """Describe ascending ids by their runs: 0, 1, 2, 5 -> `0 to 2`, `5`."""
    runs = np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1)
    return [f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]


def resize_label(label: UInt8[np.ndarray, "y x"], size_hw: tuple[int, int]) -> UInt8[np.ndarray, "h w"]:
    """Resize label ids to the nearest pixel, as the published evaluation does; see `Resampling`."""
    return _take_nearest(label, size_hw)
