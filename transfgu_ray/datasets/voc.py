"""Pascal VOC 2012 segmentation (Everingham et al., IJCV 2010): 20 objects against the background."""

from transfgu_ray.datasets.dataset import DatasetSpec, recipes, supplement
from transfgu_ray.datasets.listing import Listing, photos_named, read_list
from transfgu_ray.storage import Folder


def _list_split(root: Folder, split: str, granularity: str) -> tuple[Listing, str]:
    stems = read_list(root, f"ImageSets/Segmentation/{split}.txt")
    masks = "SegmentationClass"
    return photos_named(root, "JPEGImages", stems=stems, mask_of=lambda stem: f"{masks}/{stem}.png"), masks


_NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
# teacher_update_interval 5,5,5,5,4,4,4,4,4,3 of the published code, one value per 10 epochs; a round ends where the
# epoch is a multiple of it. The last round would end after epoch 102, the published training ends after 100.
_ROUNDS = (*[5] * 8, *[4] * 12, 2, *[3] * 4)

VOC = DatasetSpec(
    name="voc",
    expects="VOC devkit: JPEGImages/*.jpg, SegmentationClass/*.png, ImageSets/Segmentation/{train,val}.txt",
    list_split=_list_split,
    region_mode="things_only",
    train_split="train",
    evaluate_split="val",
    class_names=_NAMES,
    class_kinds=("stuff", *["thing"] * 20),
    settings=recipes(
        supplement(512, 1e-4, 100),
        silent={"train.round_epochs": _ROUNDS, "train.epoch_repeats": 20},
        released={"extract.window_fracs": (0.6, 0.5, 0.4, 0.3), "train.uncertainty": "foreground"},
    ),
    num_images={"train": 1_464, "val": 1_449},
)
