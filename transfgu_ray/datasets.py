"""Which photographs a dataset holds, and where its labels are."""

import hashlib
from dataclasses import dataclass

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
        label_id: path of its label relative to the root; None without one.
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


def list_images(config: DataConfig, split: str) -> Listing:
    """The photographs of a split, in order of image_id.

    Raises:
        DataError: the root or a list is missing, or there is no photograph.
    """
    root = open_root(config)
    try:
        listing = _list_voc(root, split) if config.dataset == "voc" else _list_folder(root)
    except UnicodeDecodeError as error:
        raise DataError(
            f"data.root={config.root} holds a name that is not UTF-8, {error.object!r}; rename it"
        ) from None
    if not listing.images:
        raise DataError(
            f"no photograph in {config.root} (dataset {config.dataset}): expected {BENCHMARKS[config.dataset].expects}"
        )
    return listing


def _list_folder(root: Folder) -> Listing:
    images, others = [], 0
    for name, num_bytes in root.files(recursive=True):
        if name.lower().endswith(EXTENSIONS) and not name.rpartition("/")[2].startswith("."):
            images.append(ImageRef(name, None, num_bytes))
        else:
            others += 1
    return Listing(tuple(images), others)


def _list_voc(root: Folder, split: str) -> Listing:
    name = f"ImageSets/Segmentation/{split}.txt"
    try:
        stems = set(root.read_bytes(name).decode().split())
    except (OSError, UnicodeDecodeError):
        raise DataError(f"{root.uri} has no readable {name}; dataset voc expects {BENCHMARKS['voc'].expects}") from None
    sizes = dict(root.files("JPEGImages"))
    photos = sorted((f"JPEGImages/{stem}.jpg", f"SegmentationClass/{stem}.png") for stem in stems)
    return Listing(tuple(ImageRef(photo, label, sizes.get(photo, -1)) for photo, label in photos), 0)
