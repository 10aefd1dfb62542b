"""Corpora as found in practice: mostly photographs, with every kind of file that is not one or must not be read."""

import functools
import io
import itertools
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from tests.builders import encode_png, scene

BOMB_PX = 50_000
MANY = 10_000
_FILES_PER_FOLDER = 100
_DISTINCT = 16


def make_hostile_corpus(
    path: Path | str, num_images: int, share: float = 0.05, seed: int = 0
) -> tuple[set[str], dict[str, str]]:
    """Make a tree of photographs of 48 x 40 px with hostile entries of each kind spread evenly among them.

    From 10,000 entries on, one folder holds 10,000. Links out of the tree lead to `path` + " outside".

    Args:
        path: of the tree, which must not exist yet.
        num_images: number of all entries.
        share: of hostile entries; some of them are valid photographs with a line break in the name, or a PNG named
            as JPEG.
        seed: of the photographs.

    Returns:
        The image_ids of the photographs, and the reason (up to the colon) by image_id of all that must be refused.
    """
    root, outside = Path(path), Path(f"{path} outside")
    outside.mkdir(parents=True)
    photos = _photographs(seed)
    (outside / "photo.jpg").write_bytes(photos[0])
    kinds = itertools.cycle(_kinds(root, outside, photos[0]))
    every = round(1 / share)
    good, bad, last = set(), {}, ""
    for n in range(num_images):
        folder = root / ("many" if n < MANY <= num_images else f"album {n // _FILES_PER_FOLDER}")
        if n % (MANY if n < MANY <= num_images else _FILES_PER_FOLDER) == 0:
            folder.mkdir(parents=True)
        if n % every != every - 1:
            last = f"IMG_{n:06}.JPG"
            (folder / last).write_bytes(_commented(photos[n % len(photos)], n))
            good.add(f"{folder.name}/{last}")
            continue
        name, make, reason = next(kinds)
        # Sorted after its twin, so that this one is refused.
        name = last.lower() if name is None else name.format(n)
        make(folder / os.fsdecode(name.encode("latin-1")) if reason == _NOT_UTF8 else folder / name)
        if reason is None:
            good.add(f"{folder.name}/{name}")
        else:
            shown = name.encode("latin-1").decode("utf-8", "backslashreplace") if reason == _NOT_UTF8 else name
            bad[f"{folder.name}/{shown}"] = reason
    return good, bad


_NOT_UTF8 = "name is not UTF-8"
# Name with a place for a number (None: that of the last photograph in lower case), maker, reason (None: valid).
_Kind = tuple[str | None, Callable[[Path], object], str | None]


def _kinds(root: Path, outside: Path, photo: bytes) -> Iterator[_Kind]:
    png = encode_png(Image.open(io.BytesIO(photo)))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
    files: dict[str, tuple[bytes, str | None]] = {
        "truncated_{}.jpg": (photo[: len(photo) // 2], "damaged"),
        "truncated_{}.png": (png[: len(png) // 2], "damaged"),
        "bomb_{}.png": (_png_bomb(), "too large"),
        "bomb_{}.jpg": (_jpeg_bomb(photo), "too large"),
        "bomb_{}.tif": (_tiff_bomb(), "too large"),
        "bomb_{}.webp": (_webp_bomb(), "too large"),
        "text_{}.jpg": (b"this is not a photograph\n", "not an image"),
        "program_{}.png": (eps, "not an image"),
        "a_png_{}.jpg": (png, None),
        "empty_{}.jpg": (b"", "empty file"),
        "new\nline_{}.jpg": (photo, None),
        "new\nline \x1b[31m<b>_{}.jpg": (b"no photograph", "not an image"),
        "caf\xe9_{}.jpg": (photo, _NOT_UTF8),
    }
    for name, (data, reason) in files.items():
        yield name, functools.partial(Path.write_bytes, data=data), reason
    links = {
        "loop_{}": (root, "link within the folder"),
        "outside_{}": (outside, "link out of the folder"),
        "outside_{}.jpg": (outside / "photo.jpg", "link out of the folder"),
        "nowhere_{}.jpg": (root / "nowhere.jpg", "link to nothing"),
    }
    for name, (target, reason) in links.items():
        yield name, functools.partial(Path.symlink_to, target=target), reason
    yield "itself_{}.jpg", lambda path: path.symlink_to(path.name), "link to nothing"
    yield "pipe_{}.jpg", os.mkfifo, "not a regular file"
    yield None, functools.partial(Path.write_bytes, data=photo), "named as another but for case"


def _photographs(seed: int) -> list[bytes]:
    rng, found = np.random.default_rng(seed), []
    for _ in range(_DISTINCT):
        buffer = io.BytesIO()
        scene((48, 40), rng)[0].save(buffer, "JPEG", quality=85)
        found.append(buffer.getvalue())
    return found


def _commented(jpeg: bytes, number: int) -> bytes:
    """Return the photograph with a comment, so that no two files are equal."""
    comment = f"{number:010}".encode()
    return jpeg[:2] + b"\xff\xfe" + struct.pack(">H", 2 + len(comment)) + comment + jpeg[2:]


@functools.cache
def _png_bomb() -> bytes:
    """Return a complete black PNG, made without holding all rows in memory."""
    packer = zlib.compressobj(9)
    row = bytes(1 + BOMB_PX // 8)
    data = b"".join(packer.compress(row * 100) for _ in range(BOMB_PX // 100)) + packer.flush()
    header = struct.pack(">IIBBBBB", BOMB_PX, BOMB_PX, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body)) for tag, body in chunks
    )


def _jpeg_bomb(jpeg: bytes) -> bytes:
    """Return a photograph whose frame header claims another size."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", BOMB_PX, BOMB_PX) + jpeg[at + 4 :]


def _tiff_bomb() -> bytes:
    """Return a greyscale TIFF that consists only of a directory."""
    size = BOMB_PX * BOMB_PX
    tags = {256: BOMB_PX, 257: BOMB_PX, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: BOMB_PX, 279: size}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


def _webp_bomb() -> bytes:
    """Return an animation with a huge canvas and a small frame."""

    def chunk(tag: bytes, body: bytes) -> bytes:
        return tag + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)

    def three(number: int) -> bytes:
        return number.to_bytes(3, "little")

    small = io.BytesIO()
    Image.new("RGB", (8, 8)).save(small, "WEBP", lossless=True)
    frame = bytes(6) + three(7) + three(7) + three(100) + b"\0" + small.getvalue()[12:]
    canvas = b"\x02\0\0\0" + three(BOMB_PX - 1) * 2
    return chunk(b"RIFF", b"WEBP" + chunk(b"VP8X", canvas) + chunk(b"ANIM", bytes(6)) + chunk(b"ANMF", frame))
