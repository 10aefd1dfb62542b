"""Photographs in tar files, as WebDataset has them: what belongs together shares its name up to the ending."""

import posixpath
from collections import Counter

from transfgu_ray.datasets.dataset import DatasetSpec
from transfgu_ray.datasets.listing import Listing, why_passed_over
from transfgu_ray.datasets.photographs import ImageRef
from transfgu_ray.datasets.places import in_tar
from transfgu_ray.datasets.shards import list_split
from transfgu_ray.datasets.tars import ENDINGS, list_members
from transfgu_ray.storage import Folder

# Of a label, whose photograph has the same name but for this.
_LABELS = (".seg.png", ".mask.png")
_NO_PHOTOGRAPH = "label without its photograph"


def list_tar(root: Folder, name: str) -> Listing:
    """Return the photographs in a tar, under the names that they have in it.

    Raises:
        DataError, OSError, StorageError: see `tars.list_members`.
    """
    labels: dict[str, str] = {}
    photos, refused, passed_over = [], [], Counter[str]()
    for member in list_members(root, name):
        label = next((each for each in _LABELS if member.name.lower().endswith(each)), None)
        if label is None and (reason := why_passed_over(member.name)):
            passed_over[reason] += 1
        elif member.problem is not None:
            shown = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            refused.append({"image_id": shown, "reason": member.problem})
        elif label is not None:
            labels[member.name[: -len(label)]] = in_tar(name, member.offset, member.num_bytes)
        else:
            photos.append((posixpath.splitext(member.name)[0], member))
    images = tuple(
        ImageRef(each.name, labels.get(stem), each.num_bytes, in_tar(name, each.offset, each.num_bytes))
        for stem, each in photos
    )
    passed_over[_NO_PHOTOGRAPH] += len(labels.keys() - {stem for stem, _ in photos})
    return Listing(images, +passed_over, tuple(refused))


def _list_split(root: Folder, split: str, granularity: str) -> tuple[Listing, str]:
    return list_split(root, split, endings=ENDINGS, list_shard=list_tar), ""


WEBDATASET = DatasetSpec(
    name="webdataset",
    expects="**/*.tar, not compressed, of KEY.jpg (or any other ending that is read), with KEY.seg.png or KEY.mask.png "
    "as its label, if there are labels, and names.txt as in dataset paired. Where shards are named train-*, the splits "
    "are those named train-*, val-* or validation-* and test-*, or in folders of these names; else each split holds "
    "all shards",
    list_split=_list_split,
    region_mode="no_prior",
    train_split="train",
    has_own_names=True,
)
