"""Decoding of photographs and labels, or a reason why one is refused; resizing and cropping."""

import io
import struct
import warnings
from typing import Any, Literal

import numpy as np
from jaxtyping import Int16, Int64, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError, features

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
    """Resize label ids to the nearest pixel, as the published evaluation does; see `Resampling`."""
    return _take_nearest(label, size_hw)
