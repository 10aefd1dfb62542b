"""How good a segmentation is, without a single label: what a sweep chooses by.

Every measure is taken on the patch grid, from tokens of the frozen prior: trials of one prior can be compared.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional

from transfgu_ray.algorithms.scores.metrics import match_concepts

# Photographs that a student is measured on.
NUM_MEASURED = 32
COMPONENTS = ("agreement", "consistency", "silhouette", "usage")
# Side of the second look at a photograph, as a share of its own.
_CROP = 0.75
# Photographs of one forward; bounds memory.
_BATCH = 16

Decode = Callable[[Tensor, tuple[int, int]], Tensor]


def kappa(one: Int64[np.ndarray, "*n"], other: Int64[np.ndarray, "*n"], num_classes: int) -> float:
    """Agreement of two labellings corrected for chance, at most 1; 0 = as labels drawn from their frequencies.

    Reference: Cohen (1960). Departures: two constant labellings that are the same have 0, not 0 / 0.
    """
    return _kappa(_contingency(one, other, num_classes))


def agreement(one: Int64[np.ndarray, "*n"], other: Int64[np.ndarray, "*n"], num_classes: int) -> float:
    """`kappa` of two labellings whose classes are numbered apart: of their Hungarian match."""
    counts = _contingency(one, other, num_classes)
    return _kappa(counts[:, np.argsort(match_concepts(counts))])


def silhouette(tokens: Float[Tensor, "n d"], labels: Int64[Tensor, " n"]) -> float:
    """Simplified silhouette of unit tokens under their labels, -1 to 1; 0 where there are fewer than two labels.

    Reference: Hruschka et al. (2006): distances to the means of classes instead of to all their members. Departures:
    the mean over the labels of each one's mean, so that a large background does not decide.
    """
    names, members = torch.unique(labels, return_inverse=True)
    if len(names) < 2:
        return 0.0
    tokens = functional.normalize(tokens.double(), dim=-1)
    counts = torch.bincount(members).unsqueeze(1)
    means = torch.zeros(len(names), tokens.shape[1], dtype=tokens.dtype, device=tokens.device)
    means = means.index_add(0, members, tokens) / counts
    distances = torch.cdist(tokens, means)
    own = distances.gather(1, members.unsqueeze(1)).squeeze(1)
    nearest = distances.scatter(1, members.unsqueeze(1), torch.inf).amin(1)
    values = (nearest - own) / torch.maximum(nearest, own).clamp_min(1e-12)
    of_labels = torch.zeros(len(names), dtype=values.dtype, device=values.device).index_add(0, members, values)
    return float((of_labels / counts.squeeze(1)).mean())


def usage(labels: Int64[np.ndarray, "*n"], num_classes: int) -> float:
    """Classes in use, 1 to `num_classes`: the perplexity of their frequencies, that is exp of their entropy in nats."""
    share = np.bincount(labels.ravel(), minlength=num_classes) / labels.size
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def score(components: Mapping[str, float]) -> float:
    """The objective of a sweep: `usage` x agreement x consistency, at most the number of classes.

    How many classes are in use, and what share of their patches both another student and another look find again.
    Students of few concepts agree more, and noise uses many classes, so no factor says anything alone. Silhouette is
    measured beside it and left out: it did not rank trials.

    Args:
        components: by name; of agreement and consistency, one that was not measured is left out.
    """
    again = [max(components[name], 0) for name in ("agreement", "consistency") if name in components]
    return float(components["usage"] * np.prod(again))


class _View(NamedTuple):
    """Another look at photographs.

    Attributes:
        of_images: (b, 3, y, x) -> the photographs as they look then, of the same size.
        of_labels: (b, h, w) -> what the labels of the first look are at each place of this one.
    """

    of_images: Callable[[Tensor], Tensor]
    of_labels: Callable[[np.ndarray], np.ndarray]


def _cropped_images(images: UInt8[Tensor, "b 3 y x"]) -> UInt8[Tensor, "b 3 y x"]:
    height, width = images.shape[2:]
    top, left = (round(side * (1 - _CROP) / 2) for side in (height, width))
    crop = images[:, :, top : top + round(height * _CROP), left : left + round(width * _CROP)].float()
    crop = functional.interpolate(crop, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return crop.round().clamp(0, 255).to(torch.uint8)


def _cropped_labels(labels: Int64[np.ndarray, "b h w"]) -> Int64[np.ndarray, "b h w"]:
    rows, columns = (
        (side * (1 - _CROP) / 2 + (np.arange(side) + 0.5) * _CROP).astype(int) for side in labels.shape[1:]
    )
    return labels[:, rows][:, :, columns]


_VIEWS = (
    _View(lambda images: images.flip(3), lambda labels: labels[:, :, ::-1]),
    _View(_cropped_images, _cropped_labels),
)


class LabelFreeMeasure:
    """Tokens of some photographs and of other looks at them, read once and decoded by every student that is measured.

    Args:
        images: RGB in 0-255, at the size that a model reads.
        read: tokens of such images, see `read_tokens`.
        grid_hw: their patch grid.
    """

    def __init__(
        self, images: UInt8[Tensor, "b 3 y x"], read: Callable[[Tensor], Tensor], grid_hw: tuple[int, int]
    ) -> None:
        self._grid_hw = grid_hw
        looks = [images, *(view.of_images(images) for view in _VIEWS)]
        self._tokens = [torch.cat([read(batch) for batch in torch.split(look, _BATCH)]) for look in looks]

    @torch.no_grad()
    def labels(self, decode: Decode, look: int = 0) -> Int64[np.ndarray, "b h w"]:
        """Class of each patch.

        Args:
            decode: class logits (b, k, h, w) of tokens (b, hw, c) and their grid.
            look: 0 = the photographs as they are.
        """
        batches = torch.split(self._tokens[look], _BATCH)
        return torch.cat([decode(batch, self._grid_hw).argmax(1) for batch in batches]).cpu().numpy()

    def components(self, decode: Decode, num_classes: int) -> dict[str, float]:
        """What one student alone can tell: consistency over the looks (mean `kappa`), silhouette and usage.

        Args:
            decode: see `labels`.
            num_classes: K, with the background class of Eq. 8 where there is one.
        """
        labels, tokens = self.labels(decode), self._tokens[0]
        again = [
            kappa(np.ascontiguousarray(view.of_labels(labels)), self.labels(decode, look), num_classes)
            for look, view in enumerate(_VIEWS, start=1)
        ]
        return {
            "consistency": float(np.mean(again)),
            "silhouette": silhouette(tokens.flatten(0, 1), torch.from_numpy(labels).to(tokens.device).flatten()),
            "usage": usage(labels, num_classes),
        }


def _contingency(
    one: Int64[np.ndarray, "*n"], other: Int64[np.ndarray, "*n"], num_classes: int
) -> Int64[np.ndarray, "k k"]:
    cells = one.ravel() * num_classes + other.ravel()
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def _kappa(counts: Int64[np.ndarray, "k k"]) -> float:
    total = counts.sum()
    seen = np.trace(counts) / total
    chance = float((counts.sum(0) / total) @ (counts.sum(1) / total))
    return float((seen - chance) / (1 - chance)) if chance < 1 else 0.0
