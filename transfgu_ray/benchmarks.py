"""Known datasets as data: what each expects on disk, its classes and its defaults."""

from dataclasses import dataclass

from transfgu_ray.scenes.classes import CLASSES, SUPER_IDS, SUPER_NAMES


@dataclass(frozen=True)
class Benchmark:
    """One dataset layout.

    Attributes:
        expects: what must lie under the root, for people.
        region_mode: default of `data.region_mode`.
        train_split: split the pipeline learns from; "" where there are no lists.
        evaluate_split: split that is scored; None without labels.
        masks: folder of the label PNGs, named as their photographs; {split} and {granularity} are filled in.
        class_names: label id -> name; id 255 is void and never scored.
        class_kinds: label id -> `thing` (an object) or `stuff` (a surface, or what is no object).
        super_names: id -> name of the coarser classes; empty where the dataset has one granularity.
        super_of: label id -> id of the coarser class it belongs to.
    """

    expects: str
    region_mode: str
    train_split: str = ""
    evaluate_split: str | None = None
    masks: str | None = None
    class_names: tuple[str, ...] = ()
    class_kinds: tuple[str, ...] = ()
    super_names: tuple[str, ...] = ()
    super_of: tuple[int, ...] = ()

    def names(self, granularity: str) -> tuple[str, ...]:
        """Label id -> name, of the classes themselves (`fine`) or of the coarser ones (`super`)."""
        return self.super_names if granularity == "super" else self.class_names

    def kinds(self, granularity: str) -> tuple[str, ...]:
        """Label id -> kind; a coarser class is of its classes' kind."""
        if granularity != "super":
            return self.class_kinds
        return tuple(self.class_kinds[self.super_of.index(super_id)] for super_id in range(len(self.super_names)))


_VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

BENCHMARKS = {
    "folder": Benchmark(
        expects="any tree of JPEG, PNG, WebP, BMP or TIFF files; no labels, nothing is scored",
        # Nothing is known of a stranger's photographs, so every window counts and all concepts are one group.
        region_mode="no_prior",
    ),
    "voc": Benchmark(
        expects="VOC devkit: JPEGImages/*.jpg, SegmentationClass/*.png, ImageSets/Segmentation/{train,val}.txt",
        region_mode="things_only",
        train_split="train",
        evaluate_split="val",
        masks="SegmentationClass",
        class_names=_VOC_CLASSES,
        class_kinds=("stuff", *["thing"] * 20),
    ),
    "scenes": Benchmark(
        expects="images/{train,val}/*.png, masks/fine/{train,val}/*.png, masks/super/{train,val}/*.png",
        region_mode="things_and_stuff",
        train_split="train",
        evaluate_split="val",
        masks="masks/{granularity}/{split}",
        class_names=tuple(each.name for each in CLASSES),
        class_kinds=tuple(each.kind for each in CLASSES),
        super_names=SUPER_NAMES,
        super_of=SUPER_IDS,
    ),
}
