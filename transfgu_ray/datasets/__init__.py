"""Known datasets as data: what each expects on disk, its classes, its defaults and its training recipe."""

from transfgu_ray.datasets.cityscapes import CITYSCAPES_27
from transfgu_ray.datasets.coco import COCO_80, COCO_STUFF_27, COCO_STUFF_27_CURATED, COCO_STUFF_171
from transfgu_ray.datasets.dataset import UNKNOWN, VOID, DatasetSpec
from transfgu_ray.datasets.folder import FOLDER
from transfgu_ray.datasets.lip import LIP_5, LIP_16, LIP_19
from transfgu_ray.datasets.paired import PAIRED, named_dataset
from transfgu_ray.datasets.parquet import PARQUET
from transfgu_ray.datasets.scenes import SCENES
from transfgu_ray.datasets.voc import VOC
from transfgu_ray.datasets.webdataset import WEBDATASET

__all__ = ["DATASETS", "FOLDER", "PAIRED", "UNKNOWN", "VOID", "DatasetSpec", "add_dataset", "named_dataset"]

# Name -> dataset, in the order in which they are shown.
DATASETS: dict[str, DatasetSpec] = {}


def add_dataset(spec: DatasetSpec) -> None:
    """Make a dataset known by its name.

    Raises:
        ValueError: the name is taken.
    """
    if spec.name in DATASETS:
        raise ValueError(f"dataset {spec.name} is known already")
    DATASETS[spec.name] = spec


for _spec in (
    FOLDER,
    PAIRED,
    PARQUET,
    WEBDATASET,
    COCO_STUFF_27,
    COCO_STUFF_27_CURATED,
    COCO_STUFF_171,
    COCO_80,
    CITYSCAPES_27,
    VOC,
    LIP_5,
    LIP_16,
    LIP_19,
    SCENES,
):
    add_dataset(_spec)
