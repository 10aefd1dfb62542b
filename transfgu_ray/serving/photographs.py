"""Find the photographs that `--images` gives: a folder, a file, a shard, a glob or a URI of one of these."""

import re
from dataclasses import replace

from fsspec.utils import glob_translate

from transfgu_ray.datasets import FOLDER
from transfgu_ray.datasets.found import SHARDS, list_found, list_in_shards
from transfgu_ray.datasets.listing import Listing, list_images, opening
from transfgu_ray.datasets.photographs import ImageRef
from transfgu_ray.errors import DataError
from transfgu_ray.images import EXTENSIONS
from transfgu_ray.storage import Folder

_WILD = re.compile(r"[*?[]")


def find_photographs(images: str) -> tuple[Folder, Listing]:
    """Return the folder of the photographs, and those that match, in the order of their frame numbers.

    Those in tars and tables come in the order in which they lie there, so that neighbours are read together.

    Args:
        images: a folder, a photograph, a tar or Parquet table, a glob such as `photos/**/*.jpg`, or a URI of these.

    Raises:
        DataError: there are no photographs.
        StorageError: the storage does not answer.
    """
    with opening(f"--images {images}"):
        whole = Folder(images)
        is_file, is_there = whole.is_file(), whole.exists()
    if is_file:
        root, listing = _single(images)
    elif is_there:
        root, listing = whole, list_found(images)
    elif wild := _WILD.search(images):
        parent, pattern = _parent(images[: wild.start()])
        root, listing = _matching(images, parent, pattern + images[wild.start() :])
    else:
        raise DataError(f"--images {images} does not exist; give a folder, a file, a glob in quotes or a URI")
    if listing.shards:
        return root, listing
    return root, replace(listing, images=tuple(sorted(listing.images, key=lambda image: _natural(image.image_id))))


def _parent(path: str) -> tuple[str, str]:
    """Return the folder of a path or URI, and what comes after it."""
    folder, slash, name = path.rpartition("/")
    return folder or slash or ".", name


def _single(images: str) -> tuple[Folder, Listing]:
    folder, name = _parent(images)
    if images.lower().endswith(SHARDS):
        root = Folder(folder)
        return root, list_in_shards(root, [name])
    if not images.lower().endswith(EXTENSIONS):
        raise DataError(
            f"--images {images} is not a photograph ({', '.join(EXTENSIONS)}); save the frames of a video as "
            "photographs first, e.g. with `ffmpeg -i VIDEO frames/%06d.jpg`"
        )
    return Folder(folder), Listing((ImageRef(name, None, -1),))


def _matching(images: str, folder: str, pattern: str) -> tuple[Folder, Listing]:
    root = Folder(folder)
    if not root.exists() or root.is_file():
        raise DataError(f"--images {images}: there is no folder {folder}")
    meant = re.compile(glob_translate(pattern))
    if pattern.lower().endswith(SHARDS) and (
        names := [name for name, _ in root.files(recursive=True) if meant.match(name)]
    ):
        return root, list_in_shards(root, names)
    listing = list_images(folder, FOLDER, split="")
    found = tuple(image for image in listing.images if meant.match(image.image_id))
    if not found:
        raise DataError(f"no photograph matches --images {images}; {root.uri} holds {len(listing.images)}")
    refused = tuple(refusal for refusal in listing.refused if meant.match(refusal["image_id"]))
    return root, Listing(found, refused=refused)


def _natural(image_id: str) -> list[tuple[bool, int, str]]:
    """Return a sort key that puts frame 10 after frame 9, not after frame 1."""
    pieces = re.split(r"(\d+)", image_id)
    return [(piece.isdecimal(), int(piece) if piece.isdecimal() else 0, piece) for piece in pieces]
