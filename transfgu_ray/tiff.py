"""TIFF files of samples that Pillow has no mode for: deeper than 8 bits, or of other bands than grey and colours."""

import io
import logging
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import tifffile
from jaxtyping import Shaped

# What it says of damaged files is told by whoever refuses them.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)

# TIFF and BigTIFF, in both byte orders.
_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# What is said of a pixel; palettes, YCbCr, CMYK and the like are Pillow's alone.
_GREY, _COLOUR = (0, 1), (2,)
_WHITE_IS_ZERO = 0
# Decoders that give no more bytes than are asked for: none, LZW, Deflate (two names), PackBits, LZMA, Zstandard.
_COMPRESSIONS = (1, 5, 8, 32946, 32773, 34925, 50000)
# Tags 274 and 281.
_ORIENTATION, _MAX_SAMPLE_VALUE = "Orientation", "MaxSampleValue"
# ExtraSamples of an opacity: colours are multiplied by it already, or not.
_PREMULTIPLIED, _ALPHA = 1, 2
# Bits of cameras and scanners.
DEPTHS = (8, 10, 12, 14, 16)


@dataclass(frozen=True)
class Tiff:
    """The first picture of a TIFF file, whose samples are not decoded yet.

    Attributes:
        page: it, as tifffile reads it.
    """

    page: Any

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) as stored, px."""
        return self.page.imagewidth, self.page.imagelength

    @property
    def num_bands(self) -> int:
        """Number of samples per pixel."""
        return int(self.page.samplesperpixel)

    @property
    def colours(self) -> int | None:
        """Number of bands, the first ones, that make the picture: 1 of grey, 3 of red, green, blue; None: unnamed."""
        if self.page.photometric in _COLOUR and self.num_bands >= 3:
            return 3
        return 1 if self.num_bands - len(self._extra) == 1 and (self.num_bands == 1 or self._has_alpha(1)) else None

    @property
    def alpha(self) -> int | None:
        """Which band, from 0, is the opacity; None without one."""
        return self.colours if self.colours is not None and self._has_alpha(self.colours) else None

    @property
    def is_premultiplied(self) -> bool:
        """Whether colours are multiplied by the opacity already."""
        return bool(self._extra) and self._extra[0] == _PREMULTIPLIED

    @property
    def needs_more_than_pillow(self) -> bool:
        """Whether Pillow would cut the samples to 8 bits, or has no mode for the bands."""
        return self.page.bitspersample > 8 or self.num_bands == 2 or self.colours is None

    @property
    def white_is_zero(self) -> bool:
        """Whether samples count from white to black."""
        return bool(self.page.photometric == _WHITE_IS_ZERO)

    @property
    def orientation(self) -> int:
        """EXIF orientation, 1 to 8."""
        return int(self._tag(_ORIENTATION, 1))

    @property
    def used_bits(self) -> int | None:
        """Bits of a sample that the tags say are used, where these are fewer than those it is stored in."""
        stored, most = int(self.page.bitspersample), int(self._tag(_MAX_SAMPLE_VALUE, 0))
        if stored not in (8, 16, 32, 64):
            return stored
        return next((bits for bits in DEPTHS if 0 < most < 2**bits and bits < stored), None)

    def read(self) -> Shaped[np.ndarray, "h w c"]:
        """Decode the samples.

        Raises:
            ValueError: they are stored in a way that is not read; damage raises many other kinds too.
        """
        page = self.page
        if page.compression not in _COMPRESSIONS:
            raise ValueError(f"TIFF compression {page.compression} with such samples is not read; use Deflate or LZW")
        if page.imagedepth > 1 or page.axes not in ("YX", "YXS", "SYX") or page.dtype is None:
            raise ValueError("not a flat picture of whole samples")
        if prod(page.chunks) > 4 * max(prod(page.shape), 2**20):
            raise ValueError("tiles are much larger than the picture")
        samples: np.ndarray = page.asarray(maxworkers=1)
        return np.moveaxis(samples, 0, 2) if page.axes == "SYX" else samples.reshape(*samples.shape[:2], -1)

    @cached_property
    def _extra(self) -> tuple[int, ...]:
        return tuple(map(int, self.page.extrasamples))

    def _has_alpha(self, band: int) -> bool:
        if self.num_bands == 4 and not self._extra:
            # As everybody reads four bands of which the fourth is not explained.
            return band == 3
        return self.num_bands > band and self._extra[:1] in ((_PREMULTIPLIED,), (_ALPHA,))

    def _tag(self, name: str, default: int) -> Any:
        value = self.page.tags.valueof(name, default)
        return max(value) if isinstance(value, tuple) else value


def open_tiff(data: bytes) -> Tiff | None:
    """Read the header of a file; None where it is no TIFF, or one that is better left to Pillow.

    Raises:
        Exception: tifffile raises many kinds on damaged files.
    """
    if data[:4] not in _MAGIC:
        return None
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
    is_known = isinstance(page, tifffile.TiffPage) and page.photometric in (*_GREY, *_COLOUR)
    return Tiff(page) if is_known and isinstance(page.bitspersample, int) else None
