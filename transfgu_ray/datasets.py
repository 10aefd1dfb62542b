"""Which photographs a dataset holds, and where its labels are."""

import hashlib
import os
import posixpath
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import itemgetter

from transfgu_ray.benchmarks import Benchmark
from transfgu_ray.config import DataConfig
from transfgu_ray.errors import ArtifactError, DataError
from transfgu_ray.images import EXTENSIONS
from transfgu_ray.storage import Folder, leads_out


@dataclass(frozen=True)
class ImageRef:
    """One photograph of a dataset.

    Attributes:
        image_id: path relative to the dataset root; stable on every machine.
        label_id: path of its label relative to the root; None without one, or where labels were not asked for.
        num_bytes: size of the file; -1 where the listing does not tell.
    """

    image_id: str
    label_id: str | None
    num_bytes: int


@dataclass(frozen=True)
class Listing:
    """What a folder holds.

    Attributes:
        images: photographs in order of image_id.
        num_other_files: files that are none, passed over.
        refused: links and names that cannot be used, each with its reason, in order of image_id.
    """

    images: tuple[ImageRef, ...]
    num_other_files: int
    refused: tuple[dict[str, str], ...] = ()

    @property
    def fingerprint(self) -> str:
        """Hash of every image_id and file size: the input of a run."""
        text = "\n".join(f"{image.image_id}\t{image.num_bytes}" for image in self.images)
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def open_root(config: DataConfig) -> Folder:
    """The dataset's root folder.

    Raises:
        DataError: it is not given or not there.
    """
    if not config.root:
        raise DataError("no photographs were named; give --data DIR or set data.root")
    try:
        root = Folder(config.root)
        found = root.exists()
    except (ArtifactError, OSError) as error:
        raise DataError(f"data.root={config.root} cannot be opened: {error}") from None
    if not found:
        raise DataError(f"data.root={config.root} does not exist; give the folder of photographs with --data")
    if root.is_file():
        raise DataError(f"data.root={config.root} is a file; give the folder of photographs with --data")
    return root


def list_images(config: DataConfig, split: str, granularity: str | None = None) -> Listing:
    """The photographs of a split, in order of image_id.

    Args:
        config: dataset and root.
        split: its split.
        granularity: which labels go with the photographs, `fine` or `super`; None where none are wanted.

    Raises:
        DataError: the root, a list or the folder of labels is missing, or there is no photograph.
    """
    root, benchmark = open_root(config), config.benchmark
    try:
        listing, masks = _LAYOUTS[benchmark.layout](root, benchmark, split, granularity or "fine")
    except _ListMissing as missing:
        raise DataError(
            f"{config.root} has no readable {missing}; dataset {config.dataset} expects {benchmark.expects}"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"data.root={config.root} holds a name that is not UTF-8, {error.object!r}; rename it"
        ) from None
    if not listing.images and listing.refused:
        first = listing.refused[0]
        raise DataError(
            f"no photograph in {config.root} can be used: {len(listing.refused)} names were refused, the first, "
            f"{first['image_id']}: {first['reason']}"
        )
    if not listing.images:
        of_split = f"dataset {config.dataset}, split {split}" if split else f"dataset {config.dataset}"
        hint = "" if config.dataset == "folder" else "; a plain tree of photographs is dataset folder"
        raise DataError(f"no photograph in {config.root} ({of_split}): expected {benchmark.expects}{hint}")
    if granularity is None:
        return replace(listing, images=tuple(replace(image, label_id=None) for image in listing.images))
    if benchmark.class_names and not root.exists(masks):
        raise DataError(f"no labels in {config.root}/{masks} (dataset {config.dataset}): expected {benchmark.expects}")
    return listing


class _ListMissing(Exception):
    """A file that says which photographs a split holds cannot be read."""


# What a layout gives: photographs with the paths of their labels, and the folder of the labels.
_Layout = tuple[Listing, str]


def _list_folder(root: Folder, benchmark: Benchmark, split: str, granularity: str) -> _Layout:
    return _photos_of(root, "", lambda path: None, recursive=True), ""


def _list_scenes(root: Folder, benchmark: Benchmark, split: str, granularity: str) -> _Layout:
    masks = f"masks/{granularity}/{split}"
    return _photos_of(root, f"images/{split}", lambda path: f"{masks}/{_stem(path)}.png"), masks


def _list_paired(root: Folder, benchmark: Benchmark, split: str, granularity: str) -> _Layout:
    folder = f"images/{split}" if root.exists("images/train") and root.exists("images/val") else "images"

    def mask_of(path: str) -> str:
        return f"masks/{posixpath.splitext(path.removeprefix('images/'))[0]}.png"

    return _photos_of(root, folder, mask_of, recursive=True), "masks"


def _list_voc(root: Folder, benchmark: Benchmark, split: str, granularity: str) -> _Layout:
    stems = _read_list(root, f"ImageSets/Segmentation/{split}.txt")
    masks = "SegmentationClass"
    return _photos_named(root, "JPEGImages", stems, lambda stem: f"{masks}/{stem}.png"), masks


def _list_lip(root: Folder, benchmark: Benchmark, split: str, granularity: str) -> _Layout:
    stems, masks = _read_list(root, f"{split}_id.txt"), f"{split}_segmentations"
    return _photos_named(root, f"{split}_images", stems, lambda stem: f"{masks}/{stem}.png"), masks


def _list_coco(root: Folder, benchmark: Benchmark, split: str, granularity: str) -> _Layout:
    if benchmark.list_name:
        stems = _read_list(root, f"curated/{split}2017/{benchmark.list_name}")
    else:
        name = f"annotations/instances_{split}2017.json"
        # Only which photographs are annotated is asked for: parsed whole, the JSON takes gigabytes.
        stems = {f"{int(image_id):012d}" for image_id in _IMAGE_ID.findall(_read(root, name))}
    masks = f"annotations/{split}2017"
    return _photos_named(root, f"images/{split}2017", stems, lambda stem: f"{masks}/{stem}.png"), masks


def _list_cityscapes(root: Folder, benchmark: Benchmark, split: str, granularity: str) -> _Layout:
    masks = f"gtFine/{split}"

    def mask_of(path: str) -> str:
        city, name = path.split("/")[-2:]
        return f"{masks}/{city}/{name.removesuffix(_LEFT)}_gtFine_labelIds.png"

    listing = _photos_of(root, f"leftImg8bit/{split}", mask_of, recursive=True)
    images = tuple(image for image in listing.images if image.image_id.endswith(_LEFT))
    num_other_files = listing.num_other_files + len(listing.images) - len(images)
    return replace(listing, images=images, num_other_files=num_other_files), masks


_IMAGE_ID = re.compile(rb'"image_id"\s*:\s*(\d+)')
_LEFT = "_leftImg8bit.png"


def _stem(path: str) -> str:
    return posixpath.splitext(posixpath.basename(path))[0]


def _read(root: Folder, name: str) -> bytes:
    try:
        return root.read_bytes(name)
    except OSError:
        raise _ListMissing(name) from None


def _read_list(root: Folder, name: str) -> set[str]:
    try:
        return set(_read(root, name).decode().split())
    except UnicodeDecodeError:
        raise _ListMissing(name) from None


def _photos_named(root: Folder, folder: str, stems: set[str], mask_of: Callable[[str], str]) -> Listing:
    sizes = dict(root.files(folder))
    photos = {stem: f"{folder}/{stem}.jpg" for stem in sorted(stems)}
    refused = [{"image_id": photo, "reason": "name out of the folder"} for photo in photos.values() if leads_out(photo)]
    images = [
        ImageRef(photo, mask_of(stem), sizes.get(photo, -1)) for stem, photo in photos.items() if not leads_out(photo)
    ]
    return Listing(tuple(images), 0, tuple(refused))


def _photos_of(root: Folder, name: str, mask_of: Callable[[str], str | None], recursive: bool = False) -> Listing:
    images, others, names = [], 0, {}
    found, refused = _walk(root, name) if recursive and root.is_local else (root.files(name, recursive), [])
    for path, num_bytes in found:
        if not _is_photo(path):
            others += 1
        elif leads_out(path):
            # Object stores know no folders: their names may be any text.
            refused.append({"image_id": path, "reason": "name out of the folder"})
        elif (twin := names.setdefault(path.casefold(), path)) != path:
            refused.append({"image_id": path, "reason": f"named as another but for case: {twin}"})
        else:
            images.append(ImageRef(path, mask_of(path), num_bytes))
    return Listing(tuple(images), others, tuple(sorted(refused, key=itemgetter("image_id"))))


def _is_photo(path: str) -> bool:
    return path.lower().endswith(EXTENSIONS) and not posixpath.basename(path).startswith(".")


def _walk(root: Folder, name: str) -> tuple[list[tuple[str, int]], list[dict[str, str]]]:
    """Files below a local folder with their sizes, sorted, and what is refused with its reason.

    Links below the folder are not followed: they show a photograph twice, lead out of the folder, or in circles.
    """
    top, found, refused = os.path.realpath(root.path), [], []

    def refuse(path: str, reason: str) -> None:
        shown = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        refused.append({"image_id": shown, "reason": reason})

    def unreadable(error: OSError) -> None:
        refuse(os.path.relpath(error.filename, root.path), f"folder cannot be read: {error.strerror}")

    walked = os.walk(root.join(name), onerror=unreadable) if root.exists(name) else ()
    for folder, folders, files in walked:
        for each, is_folder in [*((each, True) for each in folders), *((each, False) for each in files)]:
            path = os.path.join(folder, each)
            shown = os.path.relpath(path, root.path)
            status = os.lstat(path)
            if not _is_utf8(each):
                refuse(shown, "name is not UTF-8")
                if is_folder:
                    folders.remove(each)
            elif stat.S_ISLNK(status.st_mode) and (is_folder or _is_photo(each)):
                inside = f"{os.path.realpath(path)}{os.sep}".startswith(f"{top}{os.sep}")
                where = "within" if inside else "out of"
                refuse(shown, f"link {where} the folder" if os.path.exists(path) else "link to nothing")
            elif not is_folder and _is_photo(each) and not stat.S_ISREG(status.st_mode):
                # A pipe without a writer would be waited for without an end.
                refuse(shown, "not a regular file")
            elif not is_folder:
                found.append((shown.replace(os.sep, "/"), status.st_size))
    return sorted(found), refused


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


_LAYOUTS: dict[str, Callable[[Folder, Benchmark, str, str], _Layout]] = {
    "folder": _list_folder,
    "paired": _list_paired,
    "voc": _list_voc,
    "lip": _list_lip,
    "coco": _list_coco,
    "cityscapes": _list_cityscapes,
    "scenes": _list_scenes,
}
