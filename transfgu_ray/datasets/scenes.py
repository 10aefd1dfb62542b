"""Rendered scenes, as `transfgu demo` and `transfgu render` write them: 12 kinds of things and 4 of stuff."""

from transfgu_ray.datasets.dataset import DatasetSpec
from transfgu_ray.datasets.listing import Listing, photos_of, stem_of
from transfgu_ray.scenes.classes import CLASSES, SUPER_IDS, SUPER_NAMES
from transfgu_ray.storage import Folder


def _list_split(root: Folder, split: str, granularity: str) -> tuple[Listing, str]:
    masks = f"masks/{granularity}/{split}"
    return photos_of(root, f"images/{split}", mask_of=lambda path: f"{masks}/{stem_of(path)}.png"), masks


SCENES = DatasetSpec(
    name="scenes",
    expects="images/{train,val}/*.png, masks/fine/{train,val}/*.png, masks/super/{train,val}/*.png",
    list_split=_list_split,
    region_mode="things_and_stuff",
    train_split="train",
    evaluate_split="val",
    class_names=tuple(each.name for each in CLASSES),
    class_kinds=tuple(each.kind for each in CLASSES),
    super_names=SUPER_NAMES,
    super_of=SUPER_IDS,
)
