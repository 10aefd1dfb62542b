"""Any tree of photographs, without labels: the default."""

from transfgu_ray.datasets.dataset import DatasetSpec
from transfgu_ray.datasets.listing import Listing, photos_of
from transfgu_ray.storage import Folder


def _list_split(root: Folder, split: str, granularity: str) -> tuple[Listing, str]:
    return photos_of(root, "", mask_of=lambda path: None, recursive=True), ""


FOLDER = DatasetSpec(
    name="folder",
    expects="any tree of JPEG, PNG, WebP, AVIF, BMP or TIFF files, HEIC with the extra `heif`; no labels, nothing is "
    "scored",
    list_split=_list_split,
    # Nothing is known about the photographs, so every window counts and all concepts form one group.
    region_mode="no_prior",
)
