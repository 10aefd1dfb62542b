"""Which photographs a dataset holds, and where its labels are."""

import hashlib
import posixpath
from dataclasses import dataclass, replace

from transfgu_ray.benchmarks import BENCHMARKS
from transfgu_ray.config import DataConfig
from transfgu_ray.errors import ArtifactError, DataError
from transfgu_ray.images import EXTENSIONS
from transfgu_ray.storage import Folder


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
    """Photographs in order of image_id, and how many other files were passed over."""

    images: tuple[ImageRef, ...]
    num_other_files: int

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
    root, benchmark = open_root(config), BENCHMARKS[config.dataset]
    try:
        listing = _LISTERS[config.dataset](root, split)
    except UnicodeDecodeError as error:
        raise DataError(
            f"data.root={config.root} holds a name that is not UTF-8, {error.object!r}; rename it"
        ) from None
    if not listing.images:
        of_split = f"dataset {config.dataset}, split {split}" if split else f"dataset {config.dataset}"
        hint = "" if config.dataset == "folder" else "; a plain tree of photographs is dataset folder"
        raise DataError(f"no photograph in {config.root} ({of_split}): expected {benchmark.expects}{hint}")
    if granularity is None or benchmark.masks is None:
        return listing
    masks = benchmark.masks.format(granularity=granularity, split=split)
    if not root.exists(masks):
        raise DataError(f"no labels in {config.root}/{masks} (dataset {config.dataset}): expected {benchmark.expects}")
    return replace(listing, images=tuple(_with_mask(image, masks) for image in listing.images))


def _with_mask(image: ImageRef, folder: str) -> ImageRef:
    stem, _ = posixpath.splitext(posixpath.basename(image.image_id))
    return replace(image, label_id=f"{folder}/{stem}.png")


def _list_folder(root: Folder, split: str) -> Listing:
    return _photos_of(root, "", recursive=True)


def _list_scenes(root: Folder, split: str) -> Listing:
    return _photos_of(root, f"images/{split}")


def _list_voc(root: Folder, split: str) -> Listing:
    name = f"ImageSets/Segmentation/{split}.txt"
    try:
        stems = set(root.read_bytes(name).decode().split())
    except (OSError, UnicodeDecodeError):
        raise DataError(f"{root.uri} has no readable {name}; dataset voc expects {BENCHMARKS['voc'].expects}") from None
    sizes = dict(root.files("JPEGImages"))
    photos = sorted(f"JPEGImages/{stem}.jpg" for stem in stems)
    return Listing(tuple(ImageRef(photo, None, sizes.get(photo, -1)) for photo in photos), 0)


def _photos_of(root: Folder, name: str, recursive: bool = False) -> Listing:
    images, others = [], 0
    for path, num_bytes in root.files(name, recursive):
        if path.lower().endswith(EXTENSIONS) and not posixpath.basename(path).startswith("."):
            images.append(ImageRef(path, None, num_bytes))
        else:
            others += 1
    return Listing(tuple(images), others)


_LISTERS = {"folder": _list_folder, "voc": _list_voc, "scenes": _list_scenes}
