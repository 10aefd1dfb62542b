"""Known datasets as data: what each expects on disk, its classes and its defaults."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """One dataset layout.

    Attributes:
        expects: what must lie under the root, for people.
        region_mode: default of `data.region_mode`.
        train_split: split the pipeline learns from; "" where there are no lists.
        evaluate_split: split that is scored; None without labels.
        class_names: label id -> name; id 255 is void and never scored.
    """

    expects: str
    region_mode: str
    train_split: str = ""
    evaluate_split: str | None = None
    class_names: tuple[str, ...] = ()


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
        class_names=_VOC_CLASSES,
    ),
}
