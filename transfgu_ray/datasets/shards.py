"""Photographs in shards, tars or tables: splits by the names of the shards, and one name for each photograph."""

import functools
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from operator import itemgetter

import pyarrow.fs as pafs

from transfgu_ray.datasets.listing import HIDDEN, Listing, is_hidden, is_utf8, why_passed_over
from transfgu_ray.datasets.photographs import ImageRef
from transfgu_ray.errors import DataError
from transfgu_ray.storage import Folder, leads_out

_BESIDE, _NO_SPLIT = "photograph beside the shards", "shard of no split"
ListShard = Callable[[Folder, str], Listing]
_SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
# Listing waits for the storage more than it computes.
_THREADS = 8


def split_of(name: str) -> str | None:
    """Return the split of a shard such as `train-00000-of-00004.parquet` or `train/0000.parquet`; None for others."""
    folder, file = posixpath.split(name)
    start = posixpath.splitext(file)[0].split("-")[0]
    return _SPLITS.get(start) or _SPLITS.get(posixpath.basename(folder))


def splits_of(names: Iterable[str]) -> dict[str, str] | None:
    """Return the split of each shard that has one; None where no shard is named as one to train on."""
    found = {name: split for name in names if (split := split_of(name)) is not None}
    return found if "train" in found.values() else None


def list_split(root: Folder, split: str, *, endings: tuple[str, ...], list_shard: ListShard) -> Listing:
    """Return the photographs in the shards of a split, in order of the shards and of their place in them.

    Neighbours stay neighbours, so that they can be read together.

    Args:
        root: of the dataset; shards lie in any folder below.
        split: one of its splits; "" for all. Where no shard is named `train`, each split holds all shards.
        endings: of the shards.
        list_shard: returns the photographs of one shard, under the names that they have in it.

    Raises:
        DataError: raised by `list_shard`.
        StorageError: the storage does not answer.
    """
    sizes, passed_over = {}, Counter[str]()
    for name, num_bytes in root.files(recursive=True):
        if is_hidden(name):
            passed_over[HIDDEN] += 1
        elif name.lower().endswith(endings):
            sizes[name] = num_bytes
        else:
            passed_over[why_passed_over(name) or _BESIDE] += 1
    if split and (named := splits_of(sizes)) is not None:
        passed_over[_NO_SPLIT] += len(sizes) - len(named)
        sizes = {name: sizes[name] for name, of in named.items() if of == _SPLITS.get(split, split)}
    return list_shards(root, sizes, list_shard, +passed_over)


def list_shards(
    root: Folder, sizes: Mapping[str, int], list_shard: ListShard, passed_over: Mapping[str, int] | None = None
) -> Listing:
    """Return the photographs in some shards; see `list_split`.

    Args:
        root: of the dataset.
        sizes: bytes of each shard.
        list_shard: see `list_split`.
        passed_over: files beside the shards, by reason.
    """
    with ThreadPoolExecutor(_THREADS) as threads:
        listings = dict(zip(sizes, threads.map(lambda name: _listed(root, name, list_shard), sizes), strict=True))
    images, refused = _named(listings)
    others = Counter(passed_over or {})
    for listing in listings.values():
        others.update(listing.passed_over)
        refused += listing.refused
    return Listing(tuple(images), dict(others), tuple(sorted(refused, key=itemgetter("image_id"))), dict(sizes))


def _listed(root: Folder, name: str, list_shard: ListShard) -> Listing:
    try:
        info: pafs.FileInfo = root.patiently(name, lambda: root.fs.get_file_info(root.join(name)))
        # Where a store has no times, another file of this size may lie there by now.
        listed = _kept if info.mtime_ns else _kept.__wrapped__
        return listed(list_shard, root.uri, name, info.size, info.mtime_ns)
    except OSError as error:
        raise DataError(f"{root.uri_of(name)} cannot be read: {error}") from None


@functools.lru_cache(maxsize=4096)
def _kept(list_shard: ListShard, uri: str, name: str, num_bytes: int, mtime_ns: int | None) -> Listing:
    """Return the photographs of a shard, which are listed once: a command asks for them several times."""
    return list_shard(Folder(uri), name)


def _named(listings: Mapping[str, Listing]) -> tuple[list[ImageRef], list[dict[str, str]]]:
    """Return the photographs of shards under names that are theirs alone, and those whose names cannot be used.

    Where a name is in several shards, as where each counts from 0, all names begin with their shard.
    """
    apart = _is_repeated([listing.images for listing in listings.values()])
    images: list[ImageRef] = []
    refused: list[dict[str, str]] = []
    taken: dict[str, str] = {}
    for shard, listing in listings.items():
        before = f"{posixpath.splitext(shard)[0]}/" if apart else ""
        for image in listing.images:
            reason = _unusable(image.image_id)
            name = before + posixpath.normpath(image.image_id)
            if reason is None and (twin := taken.get(name.casefold())) is not None:
                reason = "another has the same name" if twin == name else f"named as another but for case: {twin}"
            if reason is not None:
                shown = image.image_id.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
                refused.append({"image_id": before + shown, "reason": reason})
                continue
            taken[name.casefold()] = name
            images.append(image if name == image.image_id else replace(image, image_id=name))
    return images, refused


def _is_repeated(shards: Iterable[Sequence[ImageRef]]) -> bool:
    """Return whether a name is in more than one shard."""
    seen: set[str] = set()
    for images in shards:
        names = {image.image_id.casefold() for image in images}
        if not seen.isdisjoint(names):
            return True
        seen |= names
    return False


def _unusable(name: str) -> str | None:
    """Return why a name cannot be that of a photograph; None if it can."""
    if not is_utf8(name):
        return "name is not UTF-8"
    if leads_out(name):
        return "name out of the folder"
    return "name of no file" if "\0" in name or posixpath.normpath(name) == "." else None
