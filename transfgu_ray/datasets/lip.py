"""LIP (Gong et al., CVPR 2017): 19 parts of a person, merged into 16 and 5 by the paper (suppl., Table 3)."""

from typing import Any

from transfgu_ray.datasets.dataset import DatasetSpec, supplement
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


def _lip(name: str, names: tuple[str, ...], *, class_of_part: tuple[int, ...], released: dict[str, Any]) -> DatasetSpec:
    row = supplement(256, 2e-5, _LONG_ROUNDS)
    # People stand upright: the working size is twice as high as wide.
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
        settings={
            "paper": row | {"data.image_size": (1280, 640)},
            "released": row | {"data.image_size": (1280, 640)} | _sizes(320) | released,
        },
        num_images={"train": 30_462, "val": 10_000},
    )


def _sizes(resize: int) -> dict[str, Any]:
    """Return sizes of the published code: labels at 2 `resize` x `resize` px, crops at half, scores at 640 x 320."""
    return {
        "cam.image_size": (2 * resize, resize),
        "train.crop_size": (resize, resize // 2),
        "train.inference_size": (640, 320),
        "train.uncertainty": "foreground",
    }


_TWO_EPOCHS: dict[str, Any] = {"train.batch_size": 512, "train.round_epochs": (2,) * 50} | _sizes(240)

LIP_5 = _lip("lip5", _NAMES_5, class_of_part=_TO_5, released=_TWO_EPOCHS | {"train.learning_rate": 1e-4})
LIP_16 = _lip("lip16", _NAMES_16, class_of_part=_TO_16, released=_TWO_EPOCHS)
LIP_19 = _lip("lip19", _PARTS, class_of_part=tuple(range(20)), released={})
