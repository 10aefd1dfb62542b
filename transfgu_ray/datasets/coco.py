"""COCO 2017 with the labels of COCO-Stuff (Caesar et al., CVPR 2018): 171 classes, 27 coarse ones, or 80 things.

A pixel of the published `stuffthingmaps` holds COCO-Stuff's id less one: 0-90 things, 91-181 stuff, 255 unlabelled. Of
the 91 ids of things COCO uses 80.
"""

import re
from collections.abc import Mapping
from typing import Any

from transfgu_ray.datasets.dataset import DatasetSpec, recipes, supplement
from transfgu_ray.datasets.listing import Listing, photos_named, read_list, read_list_file
from transfgu_ray.storage import Folder

_IMAGE_ID = re.compile(rb'"image_id"\s*:\s*(\d+)')

# Names in order of id, under the coarse class that IIC, PiCIE and the paper merge them into.
_THINGS = {
    "person": ("person",),
    "vehicle": ("bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat"),
    "outdoor": ("traffic light", "fire hydrant", "street sign", "stop sign", "parking meter", "bench"),
    "animal": ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"),
    "accessory": ("hat", "backpack", "umbrella", "shoe", "eye glasses", "handbag", "tie", "suitcase"),
    "sports": (
        "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard",
        "surfboard", "tennis racket",
    ),
    "kitchen": ("bottle", "plate", "wine glass", "cup", "fork", "knife", "spoon", "bowl"),
    "food-things": (
        "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake",
    ),
    "furniture-things": (
        "chair", "couch", "potted plant", "bed", "mirror", "dining table", "window", "desk", "toilet", "door",
    ),
    "electronic": ("tv", "laptop", "mouse", "remote", "keyboard", "cell phone"),
    "appliance": ("microwave", "oven", "toaster", "sink", "refrigerator", "blender"),
    "indoor": ("book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush", "hair brush"),
}  # fmt: skip
_UNUSED = {
    "street sign", "hat", "shoe", "eye glasses", "plate", "mirror", "window", "desk", "door", "blender", "hair brush",
}  # fmt: skip
_STUFF = {
    "ceiling": ("ceiling-other", "ceiling-tile"),
    "floor": ("carpet", "floor-marble", "floor-other", "floor-stone", "floor-tile", "floor-wood"),
    "food-stuff": ("food-other", "fruit", "salad", "vegetable"),
    "furniture-stuff": (
        "cabinet", "counter", "cupboard", "desk-stuff", "door-stuff", "furniture-other", "light", "mirror-stuff",
        "shelf", "stairs", "table",
    ),
    "raw-material": ("cardboard", "metal", "paper", "plastic"),
    "textile": (
        "banner", "blanket", "cloth", "clothes", "curtain", "mat", "napkin", "pillow", "rug",
        "textile-other", "towel",
    ),
    "wall": ("wall-brick", "wall-concrete", "wall-other", "wall-panel", "wall-stone", "wall-tile", "wall-wood"),
    "window": ("window-blind", "window-other"),
    "building": ("bridge", "building-other", "house", "roof", "skyscraper", "tent"),
    "ground": (
        "dirt", "gravel", "ground-other", "mud", "pavement", "platform", "playingfield", "railroad", "road", "sand",
        "snow",
    ),
    "plant": ("branch", "bush", "flower", "grass", "leaves", "moss", "plant-other", "straw", "tree"),
    "sky": ("clouds", "sky-other"),
    "solid": ("hill", "mountain", "rock", "solid-other", "stone", "wood"),
    "structural": ("cage", "fence", "net", "railing", "structural-other"),
    "water": ("fog", "river", "sea", "water-other", "waterdrops"),
}  # fmt: skip
# In the order of IIC and PiCIE.
_COARSE = (
    "electronic", "appliance", "food-things", "furniture-things", "indoor", "kitchen", "accessory", "animal", "outdoor",
    "person", "sports", "vehicle", "ceiling", "floor", "food-stuff", "furniture-stuff", "raw-material", "textile",
    "wall", "window", "building", "ground", "plant", "sky", "solid", "structural", "water",
)  # fmt: skip

_THING_NAMES = tuple(name for names in _THINGS.values() for name in names)
# Stuff is numbered alphabetically.
_STUFF_NAMES = tuple(sorted(name for names in _STUFF.values() for name in names))
_NAME_OF_ID = (*_THING_NAMES, *_STUFF_NAMES)
_COARSE_OF_NAME = {name: coarse for groups in (_THINGS, _STUFF) for coarse, names in groups.items() for name in names}
_USED = tuple(i for i, name in enumerate(_NAME_OF_ID) if name not in _UNUSED)
_USED_THINGS = tuple(i for i in _USED if i < len(_THING_NAMES))

_EXPECTS = (
    "images/{train,val}2017/*.jpg, annotations/{train,val}2017/*.png (stuffthingmaps), "
    "annotations/instances_{train,val}2017.json (the photographs annotated in it form the split)"
)
_CURATED_EXPECTS = (
    "images/{train,val}2017/*.jpg, annotations/{train,val}2017/*.png (stuffthingmaps), "
    "curated/{train,val}2017/Coco164kFull_Stuff_Coarse_7.txt, annotations/instances_{train,val}2017.json"
)
_ANNOTATED = {"train": 117_266, "val": 4_952}
# teacher_update_interval 3,3,3,2 of the published code, one value per 10 epochs.
_ROUNDS = (*[3] * 10, *[2] * 85)
_SILENT: dict[str, Any] = {"extract.resample": "nearest", "cam.resample": "nearest"}


def _settings(
    round_epochs: tuple[int, ...],
    *,
    silent: Mapping[str, Any] | None = None,
    released: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    rounds = {"train.round_epochs": round_epochs}
    return recipes(supplement(256, 1e-4, 200), silent={**_SILENT, **rounds, **(silent or {})}, released=released)


def _list_annotated(root: Folder, split: str, granularity: str) -> tuple[Listing, str]:
    # Only the ids are read: parsing the whole JSON takes gigabytes.
    annotations = read_list_file(root, f"annotations/instances_{split}2017.json")
    return _photos_with_masks(root, split, {f"{int(image_id):012d}" for image_id in _IMAGE_ID.findall(annotations)})


def _list_curated(root: Folder, split: str, granularity: str) -> tuple[Listing, str]:
    return _photos_with_masks(root, split, read_list(root, f"curated/{split}2017/Coco164kFull_Stuff_Coarse_7.txt"))


def _photos_with_masks(root: Folder, split: str, stems: set[str]) -> tuple[Listing, str]:
    masks = f"annotations/{split}2017"
    return photos_named(root, f"images/{split}2017", stems=stems, mask_of=lambda stem: f"{masks}/{stem}.png"), masks


_SPLITS: dict[str, Any] = {"train_split": "train", "evaluate_split": "val"}
_STUFF_27: dict[str, Any] = {
    **_SPLITS,
    "region_mode": "things_and_stuff",
    "class_names": _COARSE,
    "class_kinds": tuple("thing" if name in _THINGS else "stuff" for name in _COARSE),
    "class_of_id": {i: _COARSE.index(_COARSE_OF_NAME[name]) for i, name in enumerate(_NAME_OF_ID)},
}

COCO_STUFF_27 = DatasetSpec(
    name="coco_stuff27",
    expects=_EXPECTS,
    list_split=_list_annotated,
    num_images=_ANNOTATED,
    settings=_settings((2,) * 100),
    **_STUFF_27,
)
COCO_STUFF_27_CURATED = DatasetSpec(
    name="coco_stuff27_curated",
    expects=_CURATED_EXPECTS,
    list_split=_list_curated,
    num_images={"train": 49_629, "val": 2_175},
    settings=_settings((1,) * 200, silent={"concepts.photographs": "all"}, released={"train.learning_rate": 2.2e-4}),
    list_all=_list_annotated,
    **_STUFF_27,
)
COCO_STUFF_171 = DatasetSpec(
    name="coco_stuff171",
    expects=_EXPECTS,
    list_split=_list_annotated,
    **_SPLITS,
    region_mode="things_and_stuff",
    class_names=tuple(_NAME_OF_ID[i] for i in _USED),
    class_kinds=tuple("thing" if i in _USED_THINGS else "stuff" for i in _USED),
    class_of_id={i: class_id for class_id, i in enumerate(_USED)},
    settings=_settings(_ROUNDS),
    num_images=_ANNOTATED,
)
COCO_80 = DatasetSpec(
    name="coco80",
    expects=_EXPECTS,
    list_split=_list_annotated,
    **_SPLITS,
    region_mode="things_only",
    class_names=("background", *(_NAME_OF_ID[i] for i in _USED_THINGS)),
    class_kinds=("stuff", *["thing"] * len(_USED_THINGS)),
    # Unlabelled pixels are void, all stuff is background (released).
    class_of_id=dict.fromkeys(range(len(_THING_NAMES), len(_NAME_OF_ID)), 0)
    | {i: class_id for class_id, i in enumerate(_USED_THINGS, start=1)},
    settings=_settings(_ROUNDS, released={"train.uncertainty": "foreground"}),
    num_images=_ANNOTATED,
)
