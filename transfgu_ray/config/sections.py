"""The sections of a run's configuration, one per stage: every field with unit, range and source.

"paper" cites TransFGU (Yin et al., ECCV 2022), "suppl." its supplement, "released" the published code (commit ea49bcd),
"ours" a choice of this project. The defaults are the paper's where it speaks and the published code's where it is
silent, since its numbers came from that code.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from transfgu_ray.config.base import Bands, Fraction, Positive, Section, tuple_field
from transfgu_ray.datasets import DATASETS, DatasetSpec, named_dataset
from transfgu_ray.images import Resampling

# "none" is for pos_embed; timm refuses values that do not suit the key.
Override = Positive | Literal["none"]
Baseline = Literal["patch_tokens", "decoder_tokens", "random_vit", "raw_colour", "iic", "picie", "mask_contrast"]
# What encoder.weights can be other than a file.
NAMED_WEIGHTS = ("hub", "bundled", "random")
RegionMode = Literal["things_and_stuff", "things_only", "all_foreground", "no_prior"]


class DataConfig(Section):
    """Which photographs to use, and the size they are processed at."""

    dataset: str = Field("folder", description="dataset, which fixes the layout of `root`; see `transfgu datasets`")
    root: str = Field("", description="folder or URI that holds the photographs")
    names: tuple[str, ...] = Field(
        (),
        strict=False,
        description="lines of the names file of dataset paired, parquet or webdataset; empty = read from names.txt in "
        "`root`",
    )
    image_size: tuple[Positive, Positive] = tuple_field(
        "working (height, width) in px that photographs are squashed to (released: 640 x 640)", (640, 640)
    )
    resample: Resampling = Field(
        "bilinear",
        description="how photographs and windows are resized. bilinear: without antialias (released: ResizeTensor); "
        "bicubic: antialiased (ours); nearest: the nearest pixel",
    )
    region_mode: RegionMode | None = Field(
        None, description="regions that get concepts (4.2); null = the dataset's own mode (folder: no_prior)"
    )
    min_side_px: Positive = Field(32, description="photographs with a shorter side below this are refused (ours)")
    max_pixels: Positive = Field(
        120_000_000, description="photographs with more pixels are refused before decoding (ours)"
    )
    bands: Bands = None

    @field_validator("dataset")
    @classmethod
    def _check_dataset(cls, name: str) -> str:
        if name not in DATASETS:
            raise ValueError(f"unknown dataset; allowed: {', '.join(DATASETS)}")
        return name

    @model_validator(mode="after")
    def _check_names(self) -> DataConfig:
        if self.names and not DATASETS[self.dataset].has_own_names:
            raise ValueError(f"data.names has no use when data.dataset is {self.dataset}, which has its own classes")
        # Refuses lines that cannot be read.
        named_dataset(self.names)
        return self

    @property
    def spec(self) -> DatasetSpec:
        """Everything the package knows about the dataset."""
        spec = DATASETS[self.dataset]
        return named_dataset(self.names, spec) if spec.has_own_names else spec


class EncoderConfig(Section):
    """The frozen self-supervised vision transformer (3.1)."""

    name: str = Field("vit_small_patch8_224.dino", description="timm model with a class token (paper: ViT-S/8, DINO)")
    weights: str = Field(
        "hub",
        description="'hub' = timm's published weights, 'bundled' = this package's own, trained on rendered pictures, "
        "'random' = initialised from the seed, else the path of a file",
    )
    overrides: dict[Literal["embed_dim", "depth", "num_heads", "patch_size", "pos_embed"], Override] = Field(
        default_factory=dict,
        description="changes to the timm architecture, for small encoders; pos_embed: none = no positions (ours)",
    )
    pos_embed_interpolation: Literal["timm", "dino"] = Field(
        "dino",
        description="resampling of positions learned at another size: timm = antialiased bicubic to the size; "
        "dino = bicubic by a scale factor with DINO's offset of 0.1 (released); no effect without learned positions",
    )
    precision: Literal["float32", "bfloat16"] = Field("float32", description="arithmetic of the encoder's forward pass")


class ExtractConfig(Section):
    """Sliding windows and their class tokens (3.2, 4.2)."""

    windows: Literal["sliding", "ground_truth"] = Field(
        "sliding",
        description="sliding: squares of window_fracs (paper); ground_truth: boxes around the labelled regions of the "
        "training photographs, the upper bound in the supplement's Quality of Cropping, not for comparable scores",
    )
    window_fracs: tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...] = tuple_field(
        "beta: window side / min(H, W) (paper: 0.5, 0.4, 0.3, 0.2; released VOC: 0.6, 0.5, 0.4, 0.3)",
        (0.5, 0.4, 0.3, 0.2),
    )
    crop_size: Positive | None = Field(
        None, description="side in px a crop is resized to; null = half the shorter working side (paper)"
    )
    window_layout: Literal["half_steps", "patches"] = Field(
        "half_steps",
        description="half_steps: squares of the exact side, half a side apart (4.2); patches: on the patch grid with "
        "the patches at both ends, so about one patch larger (released: generate_box_anchors)",
    )
    resample: Resampling | None = Field(
        None,
        description="how the photograph that windows are cut from is resized; null = data.resample (released: nearest "
        "for COCO)",
    )
    foreground_prior: Literal["attention", "patch_contrast"] = Field(
        "attention", description="attention: class-token attention above its mean (paper); patch_contrast: ours"
    )
    foreground_min_frac: Fraction = Field(0.5, description="a crop is foreground if more than this part is (paper)")
    background_min_frac: Fraction = Field(0.8, description="a crop is background if more than this part is (paper)")
    batch_size: Positive = Field(
        32, description="crops per encoder forward pass; part of the run's identity, since it changes last bits"
    )
    images_per_part: Positive = Field(
        16, description="photographs of a unit of work and of resuming; a Parquet part holds one or more"
    )


class ConceptsConfig(Section):
    """k-means on class tokens, Euclidean (3.2)."""

    num_concepts: Positive | None = Field(
        27,
        description="K over all groups; null = one per class at `granularity` (per thing class where Eq. 8 applies)",
    )
    num_background: Positive | None = Field(
        None,
        description="K of the background group in things_and_stuff; null = K // 2 (ours), or one per class of "
        "stuff where num_concepts is null",
    )
    granularity: Literal["fine", "super"] = Field(
        "fine", description="classes that are scored: the dataset's own, or the coarser ones that group them (ours)"
    )
    photographs: Literal["split", "all"] = Field(
        "split",
        description="whose crops are clustered. split: of the training photographs; all: of all photographs of which "
        "the training split is a selection (released for coco_stuff27_curated)",
    )
    algorithm: Literal["faiss", "mini_batch"] = Field(
        "faiss",
        description="faiss: Lloyd's iterations over all crops (released for COCO and VOC); mini_batch: scikit-learn's "
        "MiniBatchKMeans, with all crops of a group in the memory of one worker (released for Cityscapes and LIP)",
    )
    method: Literal["flat", "hierarchical"] = Field(
        "flat",
        description="flat: K centroids of the crops (paper); hierarchical: centroids of centroids, with resampling (Vo "
        "et al. 2024), so that rare contents among very many crops get concepts of their own (ours)",
    )
    num_resamples: int = Field(
        10, ge=0, description="resampling steps of each level of a hierarchical method (Vo et al.: 10)"
    )
    seed: int | None = Field(
        1, ge=0, lt=2**31, description="seed of k-means (released: 1, and 0 for mini_batch); null = the run's"
    )
    num_iterations: Positive = Field(100, description="Lloyd iterations, or passes in mini-batches (released: niter)")
    num_redos: Positive = Field(
        1,
        description="runs, the lowest objective wins (released: 1); first centroids of mini_batch (released: 3)",
    )
    min_crops: Positive = Field(1, description="a concept with fewer crops is starved and seeded again (ours)")
    init_points: Positive = Field(
        262_144,
        description="most crops of a group that one worker clusters; a larger group starts from this many drawn at "
        "random, then all workers run Lloyd iterations over all of its crops (ours); no bound for mini_batch",
    )
    max_points: Positive | None = Field(
        None, description="cap on the crops used per group, at most init_points; null = all (paper)"
    )


class CamConfig(Section):
    """Response maps of all K concepts from one forward pass of the encoder (Eq. 4-8)."""

    image_size: tuple[Positive, Positive] | None = Field(
        None,
        strict=False,
        description="(height, width) in px of the labelled photograph; null = half of data.image_size (released)",
    )
    resample: Resampling | None = Field(
        None,
        description="how the labelled photograph is resized; null = data.resample (released: nearest for COCO)",
    )
    response: Literal["gradient", "windows"] = Field(
        "gradient",
        description="gradient: Eq. 5-7 (paper); windows: share of the sliding windows over a patch whose class token "
        "is nearest to the concept, for small priors whose class token cannot be traced to patches (ours)",
    )
    gradient_scale: float = Field(
        1.0,
        gt=0.0,
        description="factor on the gradient (Eq. 5-7: 1; released: its mean over a batch, 1/8, and 1/2 for Cityscapes "
        "and LIP)",
    )
    zeroed: Literal["cam", "map"] = Field(
        "cam",
        description="what is 0 where the gradient is positive. cam: the Grad-CAM (Eq. 7 adds the attention "
        "everywhere); map: the attention too (released: get_grad_mask)",
    )
    keep_mass: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="share of a CAM's mass that is kept, highest first; null = all (Eq. 7; released: 0.8)",
    )
    background_threshold: Fraction = Field(0.1, description="T_bg of Eq. 8 (paper: 0.1)")
    exclusion: bool = Field(
        True, description="foreground patches score 0 on background concepts and vice versa (paper; released: off)"
    )
    batch_size: Positive = Field(4, description="photographs per encoder forward pass; part of the run's identity")


class AugmentConfig(Section):
    """Training augmentation (4.2 Data Augmentation; the values of the released code: data_augment, img_aug).

    The colours of a step are drawn once for all of its photographs, and changed before the crops are cut (released,
    where each GPU draws for its share of a step).
    """

    crop: Literal["side", "area"] = Field(
        "side",
        description="side: of the photograph's shape, sides in tenths of its sides (released); area: a share of its "
        "area, ratio 3/4 to 4/3, as torchvision's RandomResizedCrop (ours)",
    )
    crop_scale: tuple[Fraction, Fraction] = tuple_field(
        "range of the crop's side, its upper end excluded (released: 0.4, 0.5 ... 0.9), or of its area", (0.4, 1.0)
    )
    flip_prob: Fraction = Field(0.5, description="probability of a horizontal flip (released)")
    jitter_prob: Fraction = Field(0.3, description="probability of colour jitter 0.8 / 0.8 / 0.8 / 0.2 (released)")
    grey_prob: Fraction = Field(0.2, description="probability of dropping colour (released)")
    blur_prob: Fraction = Field(0.2, description="probability of a Gaussian blur, 3 x 3 px, sigma 1-2 px (released)")

    @model_validator(mode="after")
    def _check_scale(self) -> AugmentConfig:
        low, high = self.crop_scale
        if not 0 < low <= high:
            raise ValueError("train.augment.crop_scale must be (low, high) with 0 < low <= high")
        if self.crop == "side" and round(10 * low) < 1:
            raise ValueError("train.augment.crop_scale must begin at 0.1 or more when train.augment.crop is side")
        return self


class TrainConfig(Section):
    """Segmenter decoder, bootstrapped in rounds (3.3)."""

    image_size: tuple[Positive, Positive] | None = Field(
        None,
        strict=False,
        description="(height, width) in px of the photograph that crops are cut from; null = half of data.image_size "
        "(released)",
    )
    crop_size: tuple[Positive, Positive] | None = Field(
        None,
        strict=False,
        description="(height, width) in px of a training crop; null = half of train.image_size (4.2)",
    )
    inference_size: tuple[Positive, Positive] | None = Field(
        None,
        strict=False,
        description="(height, width) in px that the finished model squashes photographs to; null = train.image_size "
        "(released)",
    )
    batch_size: Positive = Field(
        256, description="images per step over all workers (suppl.: 256; VOC 512; released LIP-5, LIP-16: 512)"
    )
    learning_rate: float = Field(
        1e-4,
        gt=0.0,
        description="Adam, constant (suppl.: 1e-4; Cityscapes 5e-5, LIP 2e-5; released: LIP-5 1e-4, curated COCO "
        "2.2e-4)",
    )
    weight_decay: float = Field(5e-4, ge=0.0, description="Adam's L2 term, not of biases and norms (released)")
    gradient_clamp: float = Field(1.0, gt=0.0, description="gradient entries are clamped to +- this (released)")
    round_epochs: tuple[Positive, ...] = tuple_field(
        "epochs of each round; round 0 has no teacher (released COCO: 3, then 2)", (3, 2, 2, 2)
    )
    num_epochs: Positive | None = Field(
        None,
        description="epochs in all (suppl.: COCO 200, VOC and LIP 100, Cityscapes 50); a round that would not fit "
        "whole is not begun, so that the model is the end of a round (ours; released: the best epoch on validation "
        "labels). null = all rounds",
    )
    checkpoint_minutes: float = Field(
        10,
        gt=0,
        description="most minutes of training that are done again after a worker is lost; not part of a run's identity "
        "(ours)",
    )
    last_batch: Literal["drop", "fill"] = Field(
        "drop",
        description="photographs of an epoch that do not fill a step. drop: they are left out (released: drop_last); "
        "fill: one more step, filled from the epoch's start (ours)",
    )
    round_0: Literal["cross_entropy", "total"] = Field(
        "cross_entropy",
        description="loss of round 0. cross_entropy: Eq. 9; total: also diversity and uncertainty (released)",
    )
    epoch_repeats: Positive = Field(1, description="passes over the photographs per epoch (released VOC: 20)")
    token_window: Positive | None = Field(
        None,
        description="for each patch the decoder reads the mean patch and class token of the windows of this side in "
        "px that contain it, for small priors whose patch tokens say too little (ours); null = patch tokens (paper)",
    )
    features: Literal["live", "cached"] = Field(
        "live",
        description="live: the encoder reads every augmented crop (paper); cached: it reads each whole photograph "
        "once, and the decoder learns from crops of the tokens by RoIAlign, without colour augmentation (ours)",
    )
    backbone: Literal["prior", "resnet50_fpn"] = Field(
        "prior",
        description="what the student reads. prior: the encoder's tokens (paper); resnet50_fpn: a frozen ResNet-50, "
        "through a feature pyramid trained with the decoder (Table 4). The labels always come from the encoder",
    )
    backbone_weights: str | None = Field(
        None,
        description="weights of resnet50_fpn: 'random' = initialised from the seed, else a file in torchvision's "
        "layout, such as DINO's dino_resnet50_pretrain.pth (Table 4)",
    )
    decoder: Literal["segmenter", "classifier"] = Field(
        "segmenter", description="segmenter: mask transformer (paper); classifier: one 1x1 convolution (Table 4)"
    )
    decoder_weights: str | None = Field(
        None,
        description="a decoder published with the paper (*_decoder.pt) instead of training: `trained` and "
        "`bootstrapped` both score it, and training settings have no effect; null = train",
    )
    decoder_layers: Positive = Field(2, description="transformer layers of the segmenter")
    decoder_heads: Positive = Field(6, description="attention heads of the segmenter")
    dropout: float = Field(
        0.1, ge=0.0, lt=1.0, description="dropout of the segmenter's attention, projections and MLP (released: 0.1)"
    )
    class_init: Literal["shared_length", "orthogonal"] = Field(
        "shared_length",
        description="class embeddings at first. shared_length: random, together of length 1 (released: orthogonal_ on "
        "a (1, K, d) tensor); orthogonal: orthogonal to each other, each of length 1 (ours)",
    )
    alpha: tuple[Fraction, Fraction] = tuple_field(
        "weight of the peer loss, from first to last epoch (suppl.: 0.03 to 0.1); [0, 0] leaves it out (Table 5)",
        (0.03, 0.1),
    )
    alpha_schedule: Literal["linear", "restart"] = Field(
        "linear",
        description="linear: over all epochs (suppl.); restart: each round begins at alpha[0] and rises by 0.01 per "
        "epoch, up to alpha[1] (released)",
    )
    omega_1: float = Field(
        1.0, ge=0.0, description="weight of the diversity loss (paper: 1); 0 leaves it out (Table 5)"
    )
    omega_2: float = Field(
        0.3, ge=0.0, description="weight of the uncertainty loss (paper: 0.3); 0 leaves it out (Table 5)"
    )
    diversity: Literal["all_pairs", "upper_triangle"] = Field(
        "all_pairs",
        description="pairs of class embeddings whose cosines the diversity loss averages. all_pairs: K x K (Eq. 15); "
        "upper_triangle: each pair once, without self-pairs (released)",
    )
    uncertainty: Literal["all", "foreground"] = Field(
        "all",
        description="what the uncertainty loss covers. all: every patch and class (Eq. 14; released for COCO-Stuff "
        "and Cityscapes); foreground: patches where a concept scores above cam.background_threshold, without the "
        "background class of Eq. 8 (released for VOC, COCO-80 and LIP)",
    )
    augment: AugmentConfig = Field(default_factory=AugmentConfig)


class EvaluateConfig(Section):
    """Scores on labelled photographs (4.1)."""

    split: str | None = Field(None, description="split to score; null = the dataset's own (voc: val)")
    protocol: Literal["transfgu", "picie", "stego"] = Field(
        "transfgu",
        description="transfgu: the squashed photograph, as in its code; picie, stego: shorter side resized to "
        "image_size, centre crop, as in theirs. All average over the classes present or predicted; under stego with "
        "unmatched=count, the concepts left over are one more class of IoU 0",
    )
    unmatched: Literal["discard", "count", "many_to_one"] = Field(
        "discard",
        description="pixels of concepts left over where K exceeds the number of classes: discard = not scored "
        "(suppl.), count = errors (STEGO's code), many_to_one = every concept goes to the class it overlaps most",
    )
    refinement: Literal["none", "pamr"] = Field(
        "none",
        description="pamr: the last stage is also scored with its masks refined by the photograph's colours (Araslanov "
        "& Roth, CVPR 2020), beside the plain scores (ours)",
    )
    image_size: tuple[Positive, Positive] | None = Field(
        None,
        strict=False,
        description="(height, width) in px that masks are scored at; null = train.inference_size, or [320, 320] under "
        "picie and stego",
    )
    batch_size: Positive = Field(8, description="photographs per forward pass")
    baselines: tuple[Baseline, ...] = Field(
        (),
        strict=False,
        description="scored beside the stages; k-means of patch features (ours): patch_tokens = the encoder's, "
        "decoder_tokens = what the decoder reads under train.token_window, random_vit = those of an untrained encoder, "
        "raw_colour = mean RGB; heads on the encoder's patch tokens: iic (Ji et al., ICCV 2019), picie (Cho et al., "
        "CVPR 2021); mask_contrast = k-means of whole foreground masks (Van Gansbeke et al., ICCV 2021)",
    )
    num_samples: int = Field(
        6, ge=0, description="photographs in the report, chosen by the seed; 0 = no pictures and no atlas"
    )


class TrackingConfig(Section):
    """MLflow. Not part of a run's identity."""

    uri: str | None = Field(None, description="tracking URI; null = $MLFLOW_TRACKING_URI, else sqlite beside the run")
    experiment: str = Field("transfgu", description="MLflow experiment")
    model_name: str = Field("transfgu", description="registered model; each run adds a version")


class RuntimeConfig(Section):
    """Where to run and on how many workers. Not part of a run's identity: tables do not depend on it."""

    num_workers: Positive | None = Field(None, description="actors per stage; null = one per GPU, else one per core")
    train_workers: Positive | None = Field(None, description="Ray Train workers; null = one per GPU, else 1")
    num_blocks: Positive | None = Field(None, description="Ray Data blocks; null = one per part, at most 1000")
    threads: Positive = Field(1, description="torch and FAISS threads per worker (two on a busy core are slower)")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto = cuda where Ray grants a GPU")
    object_store_mb: int = Field(500, ge=75, description="object store of a local Ray, MB; Ray takes no less than 75")
    max_refused_share: Fraction = Field(
        0.5, description="extract stops when more than this share of the photographs is refused (ours)"
    )
    stall_minutes: float = Field(
        60, gt=0, description="a stage that comes no further for this long ends with an error (ours)"
    )
    max_restarts: int | None = Field(
        None,
        ge=0,
        description="how often a training goes on from its last checkpoint after a worker or node was lost; null = "
        "without end, as long as it comes further within stall_minutes (ours)",
    )
    start_minutes: float = Field(
        30,
        gt=0,
        description="how long a training waits for room for all of its workers, such as a node that replaces a lost "
        "one, before it asks for them anew (ours; Ray: 1)",
    )
    min_train_workers: Positive | None = Field(
        None,
        description="go on with as few workers as this while nodes are missing; which photographs share a step then "
        "depends on how many there were, so a rerun need not give the same model. null = always all of them (ours)",
    )

    @model_validator(mode="after")
    def _check_train_workers(self) -> RuntimeConfig:
        if self.train_workers and self.min_train_workers and self.min_train_workers > self.train_workers:
            raise ValueError(
                f"min_train_workers={self.min_train_workers} must be at most train_workers={self.train_workers}"
            )
        return self

    @property
    def fewest_train_workers(self) -> int | None:
        """With how many Ray Train workers a training begins; None = as many as there is room for."""
        return self.min_train_workers or self.train_workers

    @property
    def max_failures(self) -> int:
        """`max_restarts` as Ray counts, to which -1 means without end."""
        return -1 if self.max_restarts is None else self.max_restarts
