"""`transfgu probe`: the quality of an encoder on images with classes or object masks, without any training."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from transfgu_ray.algorithms.dino.probe import knn_accuracy, mask_iou, rank_me
from transfgu_ray.algorithms.encoder.checkpoints import load_encoder
from transfgu_ray.algorithms.encoder.vit import above_mean
from transfgu_ray.config.sections import EncoderConfig
from transfgu_ray.errors import ConfigError, DataError
from transfgu_ray.images import ImageRefused, decode_label, decode_photo, to_square
from transfgu_ray.models.weights import read_encoder
from transfgu_ray.pretraining.config import PretrainDataConfig
from transfgu_ray.pretraining.sources import EncodedImage, Source, open_source, read_unit

PRIORS = ("attention", "patch_contrast")
_MAX_BANK, _MAX_QUERIES, _BATCH = 5000, 5000, 32
_SEED = 0


@dataclass
class ProbeResult:
    """The measured quality of an encoder.

    Attributes:
        image_size: side in px at which the images were encoded.
        num_bank: labelled images that vote.
        num_queries: images that are classified; RankMe and IoU are measured on them.
        rank_me: effective rank of their class tokens.
        knn_top1: share of them that the vote classifies correctly; None without labels.
        knn_chance: share of the largest class; None without labels.
        object_iou: mean IoU with the object by foreground prior; empty without masks.
        refused: unusable images, each with its reason.
    """

    image_size: int
    num_bank: int
    num_queries: int
    rank_me: float
    knn_top1: float | None = None
    knn_chance: float | None = None
    object_iou: dict[str, float] = field(default_factory=dict)
    refused: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class _Picture:
    """A decoded image: RGB (3, s, s), and the mask of its object, (s, s)."""

    label: str | None
    pixels: np.ndarray
    is_object: np.ndarray | None


@dataclass
class _Seen:
    """What is kept of the images of one role, bank or queries."""

    labels: list[str | None] = field(default_factory=list)
    tokens: list[torch.Tensor] = field(default_factory=list)
    ious: list[torch.Tensor] = field(default_factory=list)


class Probe:
    """An encoder, a bank of labelled images and queries: the splits train and val, or a tenth held out as queries.

    Args:
        weights: checkpoint file, or another value of `encoder.weights`.
        data: folder of images or Parquet tables, or one table.
        image_size: side in px of the images; None for the size that the encoder was trained at.
        bands: which are red, green and blue, see `images.decode_rgb`.

    Raises:
        TransfguError: weights or images cannot be used, or the size is not a multiple of the patch.
    """

    def __init__(
        self, weights: str, data: str, image_size: int | None = None, bands: tuple[int, int, int] | None = None
    ) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._encoder = load_encoder(read_encoder(EncoderConfig(weights=weights), _SEED), weights, device=device)
        self._size = image_size or self._encoder.vit.patch_embed.img_size[0]
        patch = self._encoder.patch_size
        if self._size % patch:
            raise ConfigError(f"--image-size {self._size} must be a multiple of the encoder's patch of {patch} px")
        self._data, self._source = data, open_source(data, "data", "--data")
        self._limits = PretrainDataConfig(bands=bands)
        self._roles = _choose(self._source)

    @property
    def num_images(self) -> int:
        """Number of images to encode, refused ones included."""
        return len(self._roles)

    def run(self, progress: Callable[[int], None] = lambda done: None) -> ProbeResult:
        """Measure and return the quality; `progress` takes the number of images done.

        Raises:
            DataError: no image can be used.
        """
        seen = {"bank": _Seen(), "queries": _Seen()}
        refused: list[dict[str, str]] = []
        for role, pictures in self._batches(refused, progress):
            self._measure(pictures, seen[role])
        queries, bank = seen["queries"], seen["bank"]
        if not queries.labels:
            first = f"; the first, {refused[0]['image_id']}: {refused[0]['reason']}" if refused else ""
            raise DataError(f"{self._data} gives no image to measure on{first}")
        tokens = torch.cat(queries.tokens)
        result = ProbeResult(self._size, 0, len(tokens), rank_me(tokens), refused=refused)
        names = sorted({label for label in bank.labels + queries.labels if label is not None})
        numbers: dict[str | None, int] = {name: number for number, name in enumerate(names)}
        labelled = [i for i, label in enumerate(queries.labels) if label is not None]
        voters = [i for i, label in enumerate(bank.labels) if label is not None]
        if labelled and voters:
            truth = torch.tensor([numbers[queries.labels[i]] for i in labelled])
            votes = torch.tensor([numbers[bank.labels[i]] for i in voters])
            result.num_bank = len(voters)
            result.knn_top1 = knn_accuracy(
                torch.cat(bank.tokens)[voters], votes, queries=tokens[labelled], query_labels=truth
            )
            result.knn_chance = int(truth.bincount().max()) / len(truth)
        if queries.ious:
            result.object_iou = dict(zip(PRIORS, torch.cat(queries.ious).mean(0).tolist(), strict=True))
        return result

    def _batches(
        self, refused: list[dict[str, str]], progress: Callable[[int], None]
    ) -> Iterator[tuple[str, list[_Picture]]]:
        """Yield decoded images in batches, each of one role."""
        waiting: dict[str, list[_Picture]] = {"bank": [], "queries": []}
        position = -1
        for unit in self._source.units:
            for image in read_unit(self._source.root, unit):
                position += 1
                role = self._roles.get(position)
                if role is None:
                    continue
                progress(1)
                try:
                    waiting[role].append(_decode(image, self._size, self._limits))
                except ImageRefused as refusal:
                    refused.append({"image_id": image.image_id, "reason": str(refusal)})
                if len(waiting[role]) == _BATCH:
                    yield role, waiting[role]
                    waiting[role] = []
        yield from ((role, images) for role, images in waiting.items() if images)

    def _measure(self, pictures: list[_Picture], seen: _Seen) -> None:
        """Add the class tokens of a batch, and the IoU of each prior with the objects, to `seen`."""
        encoder = self._encoder
        tokens = encoder.prefix(torch.from_numpy(np.stack([picture.pixels for picture in pictures])).to(encoder.device))
        grid_hw = encoder.grid_hw((self._size, self._size))
        row = encoder.class_row(tokens, grid_hw)
        seen.labels += [picture.label for picture in pictures]
        seen.tokens.append(row.tail(row.context).cpu())
        objects = [picture.is_object for picture in pictures]
        masked = [i for i, is_object in enumerate(objects) if is_object is not None]
        if not masked:
            return
        truth = torch.from_numpy(np.stack([is_object for is_object in objects if is_object is not None]))
        ious = []
        for prior in PRIORS:
            found = above_mean(encoder.saliency(tokens, row, grid_hw=grid_hw, prior=prior)).cpu()[masked]
            found = found.repeat_interleave(encoder.patch_size, 1).repeat_interleave(encoder.patch_size, 2)
            ious.append(mask_iou(found, truth))
        seen.ious.append(torch.stack(ious, 1))


def _choose(source: Source) -> dict[int, str]:
    """Return the role, bank or queries, by position of an image in the order of the units."""
    is_val = np.concatenate([np.full(unit.num_images, unit.split == "val") for unit in source.units])
    rng = np.random.default_rng(_SEED)
    if not is_val.any():
        is_val[rng.permutation(len(is_val))[: max(1, min(1000, len(is_val) // 10))]] = True
    bank = rng.permutation(np.flatnonzero(~is_val))[:_MAX_BANK]
    queries = rng.permutation(np.flatnonzero(is_val))[:_MAX_QUERIES]
    return dict.fromkeys(bank.tolist(), "bank") | dict.fromkeys(queries.tolist(), "queries")


def _decode(image: EncodedImage, size: int, limits: PretrainDataConfig) -> _Picture:
    if image.data is None:
        raise ImageRefused(image.error)
    photo = decode_photo(image.data, limits)
    square = to_square(photo, size)
    is_object = None
    if image.mask is not None:
        mask = Image.fromarray(decode_label(image.mask, photo.size))
        is_object = np.asarray(to_square(mask, size, Image.Resampling.NEAREST)) > 127
    return _Picture(image.label, np.asarray(square).transpose(2, 0, 1), is_object)
