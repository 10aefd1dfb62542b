"""Known datasets as data: what each expects on disk, its classes, its defaults and its training recipe."""

from transfgu_ray.benchmarks.benchmark import UNKNOWN, VOID, Benchmark
from transfgu_ray.benchmarks.cityscapes import CITYSCAPES_27
from transfgu_ray.benchmarks.coco import COCO_80, COCO_STUFF_27, COCO_STUFF_27_CURATED, COCO_STUFF_171
from transfgu_ray.benchmarks.lip import LIP_5, LIP_16, LIP_19
from transfgu_ray.benchmarks.paired import PAIRED, named_benchmark
from transfgu_ray.benchmarks.voc import VOC
from transfgu_ray.scenes.classes import CLASSES, SUPER_IDS, SUPER_NAMES

__all__ = ["BENCHMARKS", "UNKNOWN", "VOID", "Benchmark", "named_benchmark"]

BENCHMARKS = {
    "folder": Benchmark(
        expects="any tree of JPEG, PNG, WebP, BMP or TIFF files; no labels, nothing is scored",
        layout="folder",
        # Nothing is known of a stranger's photographs, so every window counts and all concepts are one group.
        region_mode="no_prior",
    ),
    "paired": PAIRED,
    "coco_stuff27": COCO_STUFF_27,
    "coco_stuff27_curated": COCO_STUFF_27_CURATED,
    "coco_stuff171": COCO_STUFF_171,
    "coco80": COCO_80,
    "cityscapes27": CITYSCAPES_27,
    "voc": VOC,
    "lip5": LIP_5,
    "lip16": LIP_16,
    "lip19": LIP_19,
    "scenes": Benchmark(
        expects="images/{train,val}/*.png, masks/fine/{train,val}/*.png, masks/super/{train,val}/*.png",
        layout="scenes",
        region_mode="things_and_stuff",
        train_split="train",
        evaluate_split="val",
        class_names=tuple(each.name for each in CLASSES),
        class_kinds=tuple(each.kind for each in CLASSES),
        super_names=SUPER_NAMES,
        super_of=SUPER_IDS,
    ),
}
