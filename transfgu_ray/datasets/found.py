"""Photographs of which nobody said how they are stored: files, or else tars, or else tables."""

from collections.abc import Sequence

from transfgu_ray.datasets.dataset import DatasetSpec
from transfgu_ray.datasets.folder import FOLDER
from transfgu_ray.datasets.listing import Listing, list_images
from transfgu_ray.datasets.parquet import PARQUET, list_table
from transfgu_ray.datasets.shards import ListShard, list_shards
from transfgu_ray.datasets.tables import ENDINGS as OF_TABLES
from transfgu_ray.datasets.tars import ENDINGS as OF_TARS
from transfgu_ray.datasets.webdataset import WEBDATASET, list_tar
from transfgu_ray.errors import DataError
from transfgu_ray.storage import Folder

_KINDS: tuple[tuple[tuple[str, ...], ListShard, DatasetSpec], ...] = (
    (OF_TARS, list_tar, WEBDATASET),
    (OF_TABLES, list_table, PARQUET),
)
SHARDS = (*OF_TARS, *OF_TABLES)


def list_found(uri: str) -> Listing:
    """Return the photographs in a folder: its files, and only where there are none, all those in its tars or tables.

    An archive beside the files that were unpacked from it is thus not read.

    Raises:
        DataError: there are none, or shards cannot be read.
        StorageError: the storage does not answer.
    """
    try:
        return list_images(uri, FOLDER, split="")
    except DataError:
        names = [name for name, _ in Folder(uri).files(recursive=True)]
        for endings, _, spec in _KINDS:
            if any(name.lower().endswith(endings) for name in names):
                return list_images(uri, spec, split="")
        raise


def list_in_shards(root: Folder, names: Sequence[str]) -> Listing:
    """Return the photographs in some shards of one kind.

    Args:
        root: any folder.
        names: of the shards in it, all tars or all tables.

    Raises:
        DataError: they cannot be read.
        StorageError: the storage does not answer.
    """
    ((_, list_shard, _),) = (kind for kind in _KINDS if names[0].lower().endswith(kind[0]))
    return list_shards(root, {name: size for each in names for name, size in root.files(each)}, list_shard)
