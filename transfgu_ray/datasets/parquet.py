"""Photographs in Parquet tables: a column of encoded bytes, or a Hugging Face column of images."""

from transfgu_ray.datasets.dataset import DatasetSpec
from transfgu_ray.datasets.listing import Listing
from transfgu_ray.datasets.photographs import ImageRef
from transfgu_ray.datasets.places import in_table
from transfgu_ray.datasets.shards import list_split
from transfgu_ray.datasets.tables import ENDINGS, read_layout, read_names
from transfgu_ray.storage import Folder


def list_table(root: Folder, name: str) -> Listing:
    """Return the photographs in a table, under the names that they have in it, or TABLE#ROW.

    Raises:
        DataError, OSError, StorageError: see `tables.read_layout`.
    """
    layout = read_layout(root, name)
    rows = ((group, row) for group, count in enumerate(layout.group_rows) for row in range(count))
    images = (
        ImageRef(
            f"{name}#{number}" if called is None else called,
            layout.mask and in_table(name, layout.mask, *at),
            -1,
            in_table(name, layout.image, *at),
        )
        for number, (called, at) in enumerate(zip(read_names(root, name, layout), rows, strict=True))
    )
    return Listing(tuple(images))


def _list_split(root: Folder, split: str, granularity: str) -> tuple[Listing, str]:
    return list_split(root, split, endings=ENDINGS, list_shard=list_table), ""


PARQUET = DatasetSpec(
    name="parquet",
    expects="**/*.parquet with a column `bytes` or `image` of encoded photographs (binary, or a struct with `bytes`), "
    "if they have names one of `path`, `file_name`, `image_id` or `id`, and if there are labels a column `mask` or "
    "`label` of encoded masks and names.txt as in dataset paired. Where tables are named train-*, the splits are those "
    "named train-*, val-* or validation-* and test-*, or in folders of these names; else each split holds all tables",
    list_split=_list_split,
    region_mode="no_prior",
    train_split="train",
    has_own_names=True,
)
