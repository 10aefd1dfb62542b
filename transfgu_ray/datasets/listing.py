"""List the photographs of a dataset and find their labels."""

import hashlib
import itertools
import os
import posixpath
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter

import numpy as np
import pyarrow as pa

from transfgu_ray.datasets.dataset import DatasetSpec
from transfgu_ray.datasets.outputs import MARK, marked_outputs
from transfgu_ray.datasets.photographs import ImageRef, Images
from transfgu_ray.datasets.places import read_places
from transfgu_ray.errors import ArtifactError, DataError, StorageError
from transfgu_ray.images import EXTENSIONS, OTHER_PICTURES
from transfgu_ray.storage import Folder, leads_out

# Why files are passed over, beside the endings of pictures in a format that is not read.
NO_PICTURE, HIDDEN, OUTPUT = "no picture", "hidden, or in a hidden or system folder", "output of transfgu"
_ROWS_AT_ONCE = 2**16
_A_FOLDER = -1
_FILE = pa.struct({"name": pa.string(), "num_bytes": pa.int64()})
_PICTURES = {*EXTENSIONS, *OTHER_PICTURES}
# Who has such files expects them to be read; they are by these datasets.
_SHARDS = {".tar": "webdataset", ".parquet": "parquet"}
# Trash and thumbnails of macOS, Windows, Linux and network drives, and MLflow's artifacts; others begin with a dot.
_SYSTEM_FOLDERS = {
    *("__macosx", "$recycle.bin", "system volume information", "lost+found", "@eadir", "#recycle", "@recycle"),
    *("mlruns", "mlartifacts"),
}


@dataclass(frozen=True)
class Listing:
    """The photographs in a folder.

    Attributes:
        images: photographs in order of image_id; in shards, of the shards and as they lie in them.
        passed_over: number of files that are not read as photographs, by reason: `NO_PICTURE`, `HIDDEN`,
            `OUTPUT`, or an ending.
        refused: links and names that cannot be used, each with its reason, in order of image_id.
        shards: bytes of each tar or table that photographs lie in.
    """

    images: Sequence[ImageRef]
    passed_over: Mapping[str, int] = field(default_factory=dict)
    refused: tuple[dict[str, str], ...] = ()
    shards: Mapping[str, int] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Hash of every image_id, file size and place in a shard, which identifies the input of a run."""
        lines = (
            f"{image.image_id}\t{image.num_bytes}" + ("" if image.place == image.image_id else f"\t{image.place}")
            for image in self.images
        )
        of_shards = (f"{name}\t{num_bytes}" for name, num_bytes in self.shards.items())
        found, between = hashlib.sha256(), ""
        for line in itertools.chain(lines, of_shards):
            found.update(f"{between}{line}".encode("utf-8", "surrogateescape"))
            between = "\n"
        return found.hexdigest()


def read_pairs(
    root: Folder, places: Sequence[str], label_places: Sequence[str | None]
) -> list[tuple[bytes | None, bytes | None, str | None]]:
    """Return encoded photographs, each with its encoded label, and why one of the two cannot be read.

    Args:
        root: of the dataset.
        places: of the photographs, see `ImageRef`.
        label_places: of their labels; None for a photograph without one.

    Raises:
        StorageError: the storage does not answer, which says nothing of the files.
    """
    labels = iter(read_places(root, [place for place in label_places if place is not None]))
    pairs = []
    for (data, problem), place in zip(read_places(root, places), label_places, strict=True):
        label, problem_of_label = (None, None) if place is None else next(labels)
        if problem is None and problem_of_label is not None:
            problem = f"its label {problem_of_label} ({place})"
        pairs.append((data, label, problem))
    return pairs


@contextmanager
def opening(what: str) -> Iterator[None]:
    """Refuse a place of images that the body cannot open.

    Args:
        what: the setting or option, and its value.

    Raises:
        DataError: it cannot be opened.
        StorageError: the storage does not answer, which says nothing of the place.
    """
    try:
        yield
    except StorageError:
        raise
    except (ArtifactError, OSError) as error:
        raise DataError(f"{what} cannot be opened: {error}") from None


def open_root(uri: str) -> Folder:
    """Return the root folder of a dataset.

    Args:
        uri: the setting `data.root`.

    Raises:
        DataError: it is not given or does not exist.
        StorageError: the storage does not answer.
    """
    if not uri:
        raise DataError("no photographs were given; use --data DIR or set data.root")
    with opening(f"data.root={uri}"):
        root = Folder(uri)
        found = root.exists()
    if not found:
        raise DataError(f"data.root={uri} does not exist; give the folder of photographs with --data")
    if root.is_file():
        raise DataError(f"data.root={uri} is a file; give the folder of photographs with --data")
    return root


def list_images(
    uri: str, spec: DatasetSpec, *, split: str, granularity: str | None = None, whole: bool = False
) -> Listing:
    """Return the photographs of a split, in order of image_id.

    Args:
        uri: root of the dataset, the setting `data.root`.
        spec: the dataset.
        split: one of its splits; "" for a dataset without splits.
        granularity: labels to go with the photographs, `fine` or `super`; None for none.
        whole: whether to list all photographs of which the split is a selection; see `DatasetSpec.list_all`.

    Raises:
        DataError: the root, a list or the folder of labels is missing, or there is no photograph.
        StorageError: the storage does not answer.
    """
    root = open_root(uri)
    list_split = (whole and spec.list_all) or spec.list_split
    try:
        listing, masks = list_split(root, split, granularity or "fine")
    except ListMissing as missing:
        raise DataError(f"{uri} has no readable {missing}; dataset {spec.name} expects {spec.expects}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"data.root={uri} holds a name that is not UTF-8, {error.object!r}; rename it") from None
    if not listing.images and listing.refused:
        first = listing.refused[0]
        raise DataError(
            f"no photograph in {uri} can be used: {len(listing.refused)} names were refused, the first is "
            f"{first['image_id']}: {first['reason']}"
        )
    if not listing.images:
        of_split = f"dataset {spec.name}, split {split}" if split else f"dataset {spec.name}"
        hint = "" if spec.name == "folder" else "; for a plain tree of photographs use dataset folder"
        others = passed_over_words(listing.passed_over)
        seen = f"; passed over: {', '.join(others)}" if others else ""
        raise DataError(f"no photograph in {uri} ({of_split}): expected {spec.expects}{hint}{seen}")
    if granularity is None:
        return replace(listing, images=_without_labels(listing.images))
    if spec.class_names and not (root.exists(masks) and any(image.label_id for image in listing.images)):
        where = f"{uri}/{masks}" if masks else uri
        raise DataError(f"no labels in {where} (dataset {spec.name}): expected {spec.expects}")
    return listing


def _without_labels(images: Sequence[ImageRef]) -> Sequence[ImageRef]:
    if isinstance(images, Images):
        return images.without_labels()
    return tuple(image if image.label_id is None else replace(image, label_id=None) for image in images)


def passed_over_words(passed_over: Mapping[str, int]) -> list[str]:
    """Return in words which files were passed over that somebody may miss, with what to do where something can be."""
    told = []
    for reason, count in sorted(passed_over.items()):
        if reason in (".heic", ".heif"):
            told.append(f"{count} {reason} (`pip install transfgu-ray[heif]` reads them)")
        elif reason in _SHARDS:
            told.append(f"{count} {reason} (dataset {_SHARDS[reason]} reads them)")
        elif reason.startswith("."):
            told.append(f"{count} {reason} (save them as JPEG or PNG)")
        elif reason != NO_PICTURE:
            told.append(f"{count} {reason}")
    return told


class ListMissing(Exception):
    """A file that lists the photographs of a split cannot be read."""


def stem_of(path: str) -> str:
    """Return the file name of a path without its extension."""
    return posixpath.splitext(posixpath.basename(path))[0]


def read_list_file(root: Folder, name: str) -> bytes:
    """Return the content of a file that lists the photographs of a split.

    Raises:
        ListMissing: it cannot be read.
    """
    try:
        return root.read_bytes(name)
    except OSError:
        raise ListMissing(name) from None


def read_list(root: Folder, name: str) -> set[str]:
    """Return the lines of a text file that lists the photographs of a split, one a line, without empty ones.

    Raises:
        ListMissing: it cannot be read, or is not UTF-8.
    """
    try:
        # A line is a file's name, which can hold blanks.
        lines = read_list_file(root, name).decode("utf-8-sig").splitlines()
        return {line.strip() for line in lines} - {""}
    except UnicodeDecodeError:
        raise ListMissing(name) from None


def photos_named(root: Folder, folder: str, *, stems: set[str], mask_of: Callable[[str], str]) -> Listing:
    """Return the photographs `folder/STEM.jpg`, each with the label path that `mask_of` gives for its stem."""
    sizes = dict(root.files(folder))
    photos = {stem: f"{folder}/{stem}.jpg" for stem in sorted(stems)}
    refused = [{"image_id": photo, "reason": "name out of the folder"} for photo in photos.values() if leads_out(photo)]
    images = [
        ImageRef(photo, mask_of(stem), sizes.get(photo, -1)) for stem, photo in photos.items() if not leads_out(photo)
    ]
    return Listing(tuple(images), refused=tuple(refused))


def photos_of(root: Folder, name: str, *, mask_of: Callable[[str], str | None], recursive: bool = False) -> Listing:
    """Return all photographs in a folder, each with the label path that `mask_of` gives for its path."""
    passed_over, refused = Counter[str](), list[dict[str, str]]()
    walks = recursive and root.is_local
    found = _in_columns(_walk(root, name, refused) if walks else root.files(name, recursive))
    outputs = _outputs(root, [path for path, _ in _each(found) if posixpath.basename(path) == MARK])
    doubtful = _alike(path for path, _ in _each(found))

    def photographs() -> Iterator[ImageRef]:
        names: dict[str, str] = {}
        for path, num_bytes in _each(found):
            if reason := why_passed_over(path, outputs):
                passed_over[reason] += 1
            elif leads_out(path):
                # Object stores have no folders: a name can be any text.
                refused.append({"image_id": path, "reason": "name out of the folder"})
            elif doubtful and (twin := names.setdefault(path.casefold(), path)) != path:
                refused.append({"image_id": path, "reason": f"named as another but for case: {twin}"})
            else:
                yield ImageRef(path, mask_of(path), num_bytes)

    images = Images(photographs())
    return Listing(images, dict(passed_over), tuple(sorted(refused, key=itemgetter("image_id"))))


def _in_columns(files: Iterable[tuple[str, int]]) -> list[pa.StructArray]:
    """Return the names and bytes of files in pieces; a million of them as Python's objects would take 200 MB."""
    files = iter(files)
    return [pa.array(some, _FILE) for some in iter(lambda: [*itertools.islice(files, _ROWS_AT_ONCE)], [])]


def _each(files: Iterable[pa.StructArray]) -> Iterator[tuple[str, int]]:
    for some in files:
        yield from zip(some.field("name").to_pylist(), some.field("num_bytes").to_pylist(), strict=True)


def _alike(paths: Iterable[str]) -> bool:
    """Return whether names may differ by case alone."""
    hashes = np.sort(np.fromiter((hash(path.casefold()) for path in paths), np.int64))
    return bool((hashes[1:] == hashes[:-1]).any())


def _outputs(root: Folder, marks: Sequence[str]) -> frozenset[str]:
    """Return what commands have written where these marks are, as files and folders; see `mark_outputs`."""
    return frozenset().union(*(marked_outputs(root, mark) for mark in marks))


def why_passed_over(path: str, outputs: Collection[str] = ()) -> str | None:
    """Return why a file is not read as a photograph; None if it is.

    Args:
        path: of the file.
        outputs: see `_outputs`.
    """
    ending = posixpath.splitext(path)[1].lower()
    if ending not in _PICTURES and ending not in _SHARDS:
        return NO_PICTURE
    if is_hidden(path):
        return HIDDEN
    if outputs and any(each in outputs for each in itertools.accumulate(path.split("/"), posixpath.join)):
        return OUTPUT
    return None if ending in EXTENSIONS else ending


def is_hidden(path: str) -> bool:
    """Return whether a file is hidden, or lies in a hidden or system folder."""
    # Dots alone are no names, and lead out of the folder.
    return any(
        (part.startswith(".") and part.strip(".")) or part.lower() in _SYSTEM_FOLDERS for part in path.split("/")
    )


def _walk(root: Folder, name: str, refused: list[dict[str, str]]) -> Iterator[tuple[str, int]]:
    """Yield the files below a local folder with their sizes, in the order of their paths.

    Links are not followed: they can show a photograph twice, lead out of the folder, or go in circles.

    Args:
        root: of the dataset.
        name: the folder.
        refused: gets what is refused with its reason.

    Raises:
        StorageError: the storage does not answer, which refuses nothing.
    """

    def refuse(path: str, reason: str) -> None:
        if not is_hidden(path):
            shown = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            refused.append({"image_id": shown, "reason": reason})

    top = root.patiently("", partial(os.path.realpath, root.path, strict=True))
    waiting = [(name, _A_FOLDER)] if root.exists(name) else []
    while waiting:
        folder, num_bytes = waiting.pop()
        if num_bytes != _A_FOLDER:
            yield folder, num_bytes
            continue
        found: list[tuple[str, int]] = []
        try:
            inside = root.patiently(folder, partial(os.listdir, root.join(folder)))
        except OSError as error:
            refuse(folder or ".", f"folder cannot be read: {error.strerror}")
            continue
        for path in (posixpath.join(folder, each) for each in inside):
            if not is_utf8(path):
                refuse(path, "name is not UTF-8")
                continue
            try:
                status = _lstat(root, path)
            except OSError as error:
                refuse(path, f"cannot be read: {error.strerror}")
                continue
            is_link, is_folder = stat.S_ISLNK(status.st_mode), stat.S_ISDIR(status.st_mode)
            where, leads_to_folder = _target(root, path, top) if is_link else ("", False)
            if is_folder:
                found.append((path, _A_FOLDER))
            elif leads_to_folder or (is_link and not why_passed_over(path)):
                refuse(path, f"link {where}")
            elif not stat.S_ISREG(status.st_mode) and not why_passed_over(path):
                # Reading a pipe without a writer would never end.
                refuse(path, "not a regular file")
            else:
                found.append((path, status.st_size))
        # What a folder holds stands where its name with a slash would.
        waiting += sorted(found, key=lambda each: each[0] + "/" * (each[1] == _A_FOLDER), reverse=True)


def _lstat(root: Folder, path: str) -> os.stat_result:
    """Return the status of a local file itself, not of what it links to.

    Raises:
        OSError: it is missing or forbidden.
        StorageError: the storage does not answer.
    """
    at = os.path.join(root.path, path)
    try:
        # Patience has its price, a million times.
        return os.lstat(at)
    except (FileNotFoundError, PermissionError):
        raise
    except OSError:
        return root.patiently(path, partial(os.lstat, at))


def _target(root: Folder, path: str, top: str) -> tuple[str, bool]:
    """Return in words where a link leads, and whether to a folder."""

    def follow() -> tuple[str, bool]:
        link = root.join(path)
        return os.path.realpath(link, strict=True), stat.S_ISDIR(os.stat(link).st_mode)

    try:
        target, is_folder = root.patiently(path, follow)
    except OSError:
        return "to nothing", False
    inside = f"{target}{os.sep}".startswith(f"{top}{os.sep}")
    return f"{'within' if inside else 'out of'} the folder", is_folder


def is_utf8(name: str) -> bool:
    """Return whether a name was UTF-8; other bytes become surrogates in it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
