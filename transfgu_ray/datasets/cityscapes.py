"""Cityscapes (Cordts et al., CVPR 2016): 27 of its 34 ids; PiCIE and the paper leave out the seven of group `void`."""

from collections import Counter
from dataclasses import replace

from transfgu_ray.datasets.dataset import MINI_BATCH, VOID, DatasetSpec, recipes, supplement
from transfgu_ray.datasets.listing import NO_PICTURE, Listing, photos_of
from transfgu_ray.storage import Folder


def _list_split(root: Folder, split: str, granularity: str) -> tuple[Listing, str]:
    masks = f"gtFine/{split}"

    def mask_of(path: str) -> str:
        city, name = path.split("/")[-2:]
        return f"{masks}/{city}/{name.removesuffix(_LEFT)}_gtFine_labelIds.png"

    listing = photos_of(root, f"leftImg8bit/{split}", mask_of=mask_of, recursive=True)
    images = tuple(image for image in listing.images if image.image_id.endswith(_LEFT))
    others = Counter(listing.passed_over) + Counter({NO_PICTURE: len(listing.images) - len(images)})
    return replace(listing, images=images, passed_over=dict(others)), masks


_LEFT = "_leftImg8bit.png"

# Ids 7 to 33 of labelIds; those below are void.
_FIRST_ID = 7
_THINGS = ("person", "rider", "car", "truck", "bus", "caravan", "trailer", "train", "motorcycle", "bicycle")
_NAMES = (
    "road", "sidewalk", "parking", "rail track", "building", "wall", "fence", "guard rail", "bridge", "tunnel", "pole",
    "polegroup", "traffic light", "traffic sign", "vegetation", "terrain", "sky", *_THINGS,
)  # fmt: skip

CITYSCAPES_27 = DatasetSpec(
    name="cityscapes27",
    expects="leftImg8bit/{train,val}/<city>/*_leftImg8bit.png, gtFine/{train,val}/<city>/*_gtFine_labelIds.png",
    list_split=_list_split,
    region_mode="no_prior",
    train_split="train",
    evaluate_split="val",
    class_names=_NAMES,
    class_kinds=tuple("thing" if name in _THINGS else "stuff" for name in _NAMES),
    class_of_id=dict.fromkeys(range(_FIRST_ID), VOID) | {_FIRST_ID + i: i for i in range(len(_NAMES))},
    settings=recipes(
        supplement(256, 5e-5, 50),
        silent={
            "data.image_size": (640, 1280),
            "train.round_epochs": (1,) * 50,
            "train.epoch_repeats": 20,
        }
        | MINI_BATCH,
        released={"cam.gradient_scale": 1 / 2},
    ),
    num_images={"train": 2_975, "val": 500},
)
