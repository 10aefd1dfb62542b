"""Decoding of photographs and labels, or a reason why one is refused; resizing and cropping."""

import io
import struct
import warnings
from typing import Any

import numpy as np
from jaxtyping import Int16, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# Pillow goes by content, not by name, and decodes fifty formats; for EPS it has another program run the file.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
# Raised by Pillow's decoders and metadata readers on damaged files.
_DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError,
    struct.error,
)  # fmt: skip


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


def decode_rgb(data: bytes, min_side_px: int, max_pixels: int) -> Image.Image:
    """Decode the first frame to upright 8-bit RGB.

    EXIF orientation is applied; transparency is laid over white; 16-bit grey is scaled to 8 bits; CMYK, palette and
    greyscale are converted.

    Raises:
        ImageRefused: the data are not an image, or are truncated, too small or too large.
    """
    if not data:
        raise ImageRefused("empty file")
    try:
        with warnings.catch_warnings():
            # The size is checked below against the configured limit, before decoding.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            raise TooManyPixels(f"too large: {width} x {height} px, above data.max_pixels={max_pixels}")
        if min(width, height) < min_side_px:
            raise ImageRefused(f"too small: {width} x {height} px, below data.min_side_px={min_side_px}")
        return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise NotAnImage("not an image") from None
    except Image.DecompressionBombError:
        raise TooManyPixels(f"too large: above data.max_pixels={max_pixels}") from None
    except _DAMAGED as error:
        raise ImageRefused(f"damaged: {' '.join(str(error).split())[:120]}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_uint8(np.asarray(image))).convert("RGB")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    if not np.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 65535:
        raise ImageRefused("pixel values outside 0-65535; save it as 8 or 16 bit")
    if pixels.dtype.kind == "f" and pixels.max() <= 1:
        scaled = pixels * 255
    elif pixels.dtype.kind == "f" and pixels.max() <= 255:
        scaled = pixels
    else:
        scaled = pixels / 257
    grey: np.ndarray = np.rint(scaled).astype(np.uint8)
    return grey


def to_working(image: Image.Image, size_hw: tuple[int, int]) -> UInt8[np.ndarray, "3 h w"]:
    """Resize a photograph to (height, width) without keeping proportions, antialiased bicubic, channels first."""
    resized = image.resize((size_hw[1], size_hw[0]), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


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
    working: UInt8[np.ndarray, "3 h w"], boxes: np.ndarray, crop_size: int
) -> UInt8[np.ndarray, "n 3 crop crop"]:
    """Cut windows (x0, y0, x1, y1) of the working image and resize each to a square, antialiased bicubic."""
    image = Image.fromarray(working.transpose(1, 2, 0))
    size = (crop_size, crop_size)
    crops = np.empty((len(boxes), 3, crop_size, crop_size), dtype=np.uint8)
    for crop, box in zip(crops, boxes, strict=True):
        # Cut before resizing: with resize(box=...) the filter would read pixels outside the window.
        left, top, right, bottom = map(int, box)
        window = image.crop((left, top, right, bottom))
        crop[:] = np.asarray(window.resize(size, Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    return crops


def decode_label(data: bytes) -> UInt8[np.ndarray, "h w"]:
    """Read the label ids of a greyscale or palette PNG.

    Raises:
        ImageRefused: it is not such an image.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.mode not in ("P", "L"):
            raise ImageRefused(f"its label is not an 8-bit palette or greyscale PNG: mode {image.mode}")
        return np.asarray(image)
    except (*_DAMAGED, Image.DecompressionBombError) as error:
        raise ImageRefused(f"its label is damaged: {error}") from None


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
    """Resize label ids, nearest neighbour."""
    return np.asarray(Image.fromarray(label).resize((size_hw[1], size_hw[0]), Image.Resampling.NEAREST))
