"""The configuration of a run: its sections, what they must have in common, and the values that follow from several."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int16
from pydantic import Field, model_validator

from transfgu_ray.config.base import C, Section, merge_settings, parse_config
from transfgu_ray.config.sections import (
    CamConfig,
    ConceptsConfig,
    DataConfig,
    EncoderConfig,
    EvaluateConfig,
    ExtractConfig,
    RuntimeConfig,
    TrackingConfig,
    TrainConfig,
)
from transfgu_ray.datasets import DATASETS
from transfgu_ray.datasets.paired import read_names
from transfgu_ray.images import Resampling

# Size that PiCIE and STEGO are scored at, px.
_CENTRE_CROP = (320, 320)


class RunConfig(Section):
    """Everything that determines a run."""

    preset: str = Field("paper", description="recipe that the other values start from")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of clustering, initial weights, order and augmentation")
    data: DataConfig = Field(default_factory=DataConfig)
    encoder: EncoderConfig = Field(default_factory=EncoderConfig)
    extract: ExtractConfig = Field(default_factory=ExtractConfig)
    concepts: ConceptsConfig = Field(default_factory=ConceptsConfig)
    cam: CamConfig = Field(default_factory=CamConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)

    @model_validator(mode="after")
    def _check_together(self) -> RunConfig:
        dataset, background = self.data.dataset, self.concepts.num_background
        if not self.class_names and self.concepts.granularity == "super":
            raise ValueError(f"concepts.granularity=super, but dataset {dataset} has no super-categories; use fine")
        if not self.class_names and self.extract.windows == "ground_truth":
            raise ValueError(f"extract.windows=ground_truth needs labels, but dataset {dataset} has none; use sliding")
        if not self.class_names and self.concepts.num_concepts is None:
            raise ValueError(
                f"concepts.num_concepts=null takes K from the dataset's classes, but dataset {dataset} has none; "
                "give a number"
            )
        if self.region_mode == "things_and_stuff":
            if self.num_concepts < 2:
                raise ValueError("concepts.num_concepts must be at least 2 when data.region_mode is things_and_stuff")
            if background is not None and background >= self.num_concepts:
                raise ValueError("concepts.num_background must be below concepts.num_concepts")
        elif self.region_mode == "no_prior" and self.num_concepts < 2:
            raise ValueError("concepts.num_concepts must be at least 2 when data.region_mode is no_prior")
        if self.region_mode != "things_and_stuff" and background is not None:
            raise ValueError(f"concepts.num_background has no use when data.region_mode is {self.region_mode}")
        of_gradient = {"gradient_scale": 1, "keep_mass": None, "zeroed": "cam"}
        if self.cam.response == "windows" and any(
            getattr(self.cam, name) != plain for name, plain in of_gradient.items()
        ):
            raise ValueError(f"cam.{', cam.'.join(of_gradient)} have no use when cam.response is windows")
        if "mask_contrast" in self.evaluate.baselines and self.region_mode in ("all_foreground", "no_prior"):
            raise ValueError(
                "evaluate.baselines: mask_contrast clusters foreground masks, but there are none when "
                f"data.region_mode is {self.region_mode}; leave it out, or use things_only or things_and_stuff"
            )
        if self.evaluate.protocol != "transfgu" and self.evaluate_image_size[0] != self.evaluate_image_size[1]:
            raise ValueError(
                f"evaluate.image_size={list(self.evaluate_image_size)} must be square when evaluate.protocol is "
                f"{self.evaluate.protocol}, which scores the centre square; the published size is [320, 320]"
            )
        self._check_clustering()
        self._check_training()
        self._check_ablations(self.train)
        return self

    def _check_clustering(self) -> None:
        most, held = self.concepts.max_points, self.concepts.init_points
        if most is not None and most > held:
            raise ValueError(
                f"concepts.max_points={most} must be at most concepts.init_points={held}, the crops that one worker "
                "clusters; raise concepts.init_points, or set concepts.max_points to null to use all crops"
            )
        if self.concepts.photographs == "all" and self.data.spec.list_all is None:
            raise ValueError(
                "concepts.photographs=all needs a dataset whose training photographs are a selection, and "
                f"{self.data.dataset} is none; use split"
            )
        if self.concepts.method == "hierarchical" and self.concepts.algorithm == "mini_batch":
            raise ValueError(
                "concepts.method=hierarchical needs concepts.algorithm=faiss, not mini_batch, which has no levels"
            )
        if self.concepts.method == "hierarchical" and most is not None:
            raise ValueError(
                "concepts.max_points must be null when concepts.method is hierarchical, which uses all crops, the rare "
                "ones too"
            )
        if self.concepts.method == "flat" and self.concepts.num_resamples != 10:
            raise ValueError("concepts.num_resamples has no use when concepts.method is flat; set it to 10")
        if self.concepts.algorithm == "mini_batch" and most is not None:
            raise ValueError(
                "concepts.max_points must be null when concepts.algorithm is mini_batch, which uses all crops"
            )

    def _check_training(self) -> None:
        if self.train.decoder_weights is not None and self.train.token_window is not None:
            raise ValueError(
                "train.token_window must be null when train.decoder_weights is set, which reads patch tokens"
            )
        if self.train.num_epochs is not None and self.train.num_epochs < self.train.round_epochs[0]:
            raise ValueError(
                f"train.num_epochs={self.train.num_epochs} must be at least the {self.train.round_epochs[0]} epochs of "
                "round 0 in train.round_epochs"
            )
        colours = ("jitter_prob", "grey_prob", "blur_prob")
        if self.train.features == "cached" and any(getattr(self.train.augment, name) for name in colours):
            raise ValueError(
                f"train.augment.{', '.join(colours[:-1])} and {colours[-1]} must be 0 when train.features is cached, "
                "since the encoder never sees the crops"
            )

    def _check_ablations(self, train: TrainConfig) -> None:
        if train.uncertainty == "foreground" and (not self.has_background or self.num_concepts < 2):
            raise ValueError(
                "train.uncertainty=foreground needs the background class of Eq. 8 (data.region_mode things_only or "
                "all_foreground) and at least 2 concepts; use all"
            )
        if (train.backbone == "prior") != (train.backbone_weights is None):
            raise ValueError(
                f"train.backbone_weights={train.backbone_weights or 'null'} does not go with train.backbone="
                f"{train.backbone}: resnet50_fpn needs 'random' or the path of a checkpoint, prior must have null"
            )
        if train.decoder_weights is not None and (train.backbone, train.decoder) != ("prior", "segmenter"):
            raise ValueError(
                "train.decoder_weights holds a segmenter that reads the prior; set train.backbone to prior and "
                "train.decoder to segmenter"
            )
        if train.backbone != "prior" and train.token_window is not None:
            raise ValueError("train.token_window has no use when train.backbone is resnet50_fpn; set it to null")

    @property
    def region_mode(self) -> str:
        """The region mode in force: the configured one, else the dataset's own."""
        return self.data.region_mode or self.data.spec.region_mode

    @property
    def class_names(self) -> tuple[str, ...]:
        """Label id -> name at the granularity in force; empty where the dataset has no such labels."""
        return self.data.spec.names(self.concepts.granularity)

    @property
    def class_kinds(self) -> tuple[str, ...]:
        """Label id -> `thing` or `stuff` at the granularity in force."""
        return self.data.spec.kinds(self.concepts.granularity)

    @property
    def label_table(self) -> Int16[np.ndarray, " 256"]:
        """Class of every id in a label file; see `DatasetSpec.label_table`."""
        return self.data.spec.label_table(self.concepts.granularity)

    @property
    def has_background(self) -> bool:
        """Whether Eq. 8 adds a background class to the K concepts."""
        return self.region_mode in ("things_only", "all_foreground")

    @property
    def num_concepts(self) -> int:
        """K, without the background class of Eq. 8."""
        if self.concepts.num_concepts is not None:
            return self.concepts.num_concepts
        # The background of Eq. 8 stands for all stuff (suppl.: K = 20 for the 20 things of VOC).
        return self.class_kinds.count("thing") if self.has_background else len(self.class_names)

    @property
    def num_background(self) -> int:
        """Concepts of the background group; 0 unless things and stuff are clustered apart."""
        if self.region_mode != "things_and_stuff":
            return 0
        if self.concepts.num_background is not None:
            return self.concepts.num_background
        if self.concepts.num_concepts is None:
            return self.class_kinds.count("stuff")
        return self.concepts.num_concepts // 2

    @property
    def extract_crop_size(self) -> int:
        """Side in px a window is resized to before the encoder (paper: half the working side)."""
        return self.extract.crop_size or min(self.data.image_size) // 2

    @property
    def _half_size(self) -> tuple[int, int]:
        height, width = self.data.image_size
        return height // 2, width // 2

    @property
    def cam_image_size(self) -> tuple[int, int]:
        """(height, width) in px at which response maps are computed."""
        return self.cam.image_size or self._half_size

    @property
    def extract_resample(self) -> Resampling:
        """How the photograph that windows are cut from is resized."""
        return self.extract.resample or self.data.resample

    @property
    def cam_resample(self) -> Resampling:
        """How the labelled photograph is resized."""
        return self.cam.resample or self.data.resample

    @property
    def kmeans_seed(self) -> int:
        """Seed of k-means: its own, else the run's."""
        return self.seed if self.concepts.seed is None else self.concepts.seed

    @property
    def whole_rounds(self) -> tuple[int, ...]:
        """Epochs of each round that is trained: those that end by train.num_epochs.

        The published VOC training ends one epoch after a restart. Since no label may choose an epoch here, the result
        has to be the end of a whole round, and nothing after it is trained.
        """
        rounds, most = self.train.round_epochs, self.train.num_epochs
        ends = itertools.accumulate(rounds)
        return rounds if most is None else tuple(n for n, end in zip(rounds, ends, strict=True) if end <= most)

    @property
    def train_image_size(self) -> tuple[int, int]:
        """(height, width) in px of the photograph that training crops are cut from."""
        return self.train.image_size or self._half_size

    @property
    def train_crop_size(self) -> tuple[int, int]:
        """(height, width) in px of a training crop."""
        height, width = self.train_image_size
        return self.train.crop_size or (height // 2, width // 2)

    @property
    def inference_size(self) -> tuple[int, int]:
        """(height, width) in px that the finished model squashes photographs to."""
        return self.train.inference_size or self.train_image_size

    @property
    def evaluate_image_size(self) -> tuple[int, int]:
        """(height, width) in px at which masks are scored."""
        own = self.inference_size if self.evaluate.protocol == "transfgu" else _CENTRE_CROP
        return self.evaluate.image_size or own


# Settings that say where and how a run happens, not what it computes; for pydantic's `exclude`.
NOT_RESULT: dict[str, Any] = {"tracking": True, "runtime": True, "train": {"checkpoint_minutes": True}}
NOT_IDENTITY: dict[str, Any] = {"preset": True, **NOT_RESULT}


def build_config(base: C, file: str | None = None, assignments: Sequence[str] = ()) -> C:
    """Return the preset `base`, changed by a YAML file, then by `--set section.field=value` in order.

    Raises:
        ConfigError: a missing or malformed file, an unknown key, or a value out of its range.
    """
    values = merge_settings(base, file, assignments)
    if isinstance(base, RunConfig) and not values["data"]["names"]:
        # The configuration must say what its classes are.
        named = [each for each in DATASETS.values() if each.has_own_names and each.name == values["data"]["dataset"]]
        for spec in named:
            values["data"]["names"] = read_names(values["data"]["root"], spec)
    return parse_config(values, type(base))


def describe(name: str) -> str:
    """Return the description of a setting `section.field`, with unit, range and source.

    Raises:
        KeyError: no such setting.
    """
    kind: Any = RunConfig
    description: str | None = ""
    for part in name.split("."):
        # Entries of a mapping are described with the mapping.
        if isinstance(kind, type) and issubclass(kind, Section):
            description, kind = kind.model_fields[part].description, kind.model_fields[part].annotation
    return description or ""
