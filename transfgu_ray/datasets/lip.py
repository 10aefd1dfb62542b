"""LIP (Gong et al., CVPR 2017): 19 parts of a person, merged into 16 and 5 by the paper (suppl., Table 3)."""

from collections.abc import Mapping
from typing import Any

from transfgu_ray.datasets.dataset import MINI_BATCH, DatasetSpec, recipes, supplement
from transfgu_ray.datasets.listing import Listing, photos_named, read_list
from transfgu_ray.storage import Folder


def _list_split(root: Folder, split: str, granularity: str) -> tuple[Listing, str]:
    stems, masks = read_list(root, f"{split}_id.txt"), f"{split}_segmentations"
    return photos_named(root, f"{split}_images", stems=stems, mask_of=lambda stem: f"{masks}/{stem}.png"), masks


_PARTS = (
    "background", "hat", "hair", "glove", "sunglasses", "upper-clothes", "dress", "coat", "socks", "pants", "jumpsuits",
    "scarf", "skirt", "face", "left-arm", "right-arm", "left-leg", "right-leg", "left-shoe", "right-shoe",
)  # fmt: skip
_NAMES_16 = (*_PARTS[:14], "arm", "leg", "shoe")
_NAMES_5 = ("background", "head", "upper body", "arm", "leg", "foot")
# Id of each part at the two coarser granularities.
_TO_16 = (*range(14), 14, 14, 15, 15, 16, 16)
_TO_5 = (0, 1, 1, 3, 1, 2, 2, 2, 5, 4, 2, 2, 2, 1, 3, 3, 4, 4, 5, 5)
_LONG_ROUNDS = (*[3] * 10, *[2] * 35)


# People stand upright: photographs are twice as high as wide.
_SILENT: dict[str, Any] = {"data.image_size": (1280, 640), "train.round_epochs": _LONG_ROUNDS} | MINI_BATCH
# Of LIP-5 and LIP-16.
_SMALLER: dict[str, Any] = {
    "train.round_epochs": (2,) * 50,
    "train.image_size": (480, 240),
    "train.inference_size": (640, 320),
}


def _lip(
    name: str,
    names: tuple[str, ...],
    *,
    class_of_part: tuple[int, ...],
    silent: Mapping[str, Any] | None = None,
    released: Mapping[str, Any] | None = None,
) -> DatasetSpec:
    return DatasetSpec(
        name=name,
        expects="{train,val}_images/*.jpg, {train,val}_segmentations/*.png, {train,val}_id.txt",
        list_split=_list_split,
        region_mode="all_foreground",
        train_split="train",
        evaluate_split="val",
        class_names=names,
        class_kinds=("stuff", *["thing"] * (len(names) - 1)),
        class_of_id=dict(enumerate(class_of_part)),
        settings=recipes(
            supplement(256, 2e-5, 100),
            silent={**_SILENT, **(silent or {})},
            released={"cam.gradient_scale": 1 / 2, "train.uncertainty": "foreground", **(released or {})},
        ),
        num_images={"train": 30_462, "val": 10_000},
    )


_BATCH: dict[str, Any] = {"train.batch_size": 512}
LIP_5 = _lip("lip5", _NAMES_5, class_of_part=_TO_5, silent=_SMALLER, released={**_BATCH, "train.learning_rate": 1e-4})
LIP_16 = _lip("lip16", _NAMES_16, class_of_part=_TO_16, silent=_SMALLER, released=_BATCH)
LIP_19 = _lip("lip19", _PARTS, class_of_part=tuple(range(20)))
