"""Measures of a segmentation without any labels, by which a sweep chooses.

All are taken on the patch grid from tokens of the frozen prior, so trials with the same prior can be compared.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional

from transfgu_ray.algorithms.scores.metrics import match_concepts

# Photographs on which a student is measured.
NUM_MEASURED = 32
COMPONENTS = ("agreement", "consistency", "silhouette", "usage")
# Side of the cropped view of a photograph, as a share of the photograph's.
_CROP = 0.75
# Photographs per forward pass; bounds memory.
_BATCH = 16

Decode = Callable[[Tensor, tuple[int, int]], Tensor]


def kappa(one: Int64[np.ndarray, "*n"], other: Int64[np.ndarray, "*n"], num_classes: int) -> float:
    """Return the chance-corrected agreement of two labellings, at most 1; 0 = as for labels drawn by frequency.

    Reference: Cohen (1960). Departures: two identical constant labellings have 0, not 0 / 0.
    """
    return _kappa(_contingency(one, other, num_classes))


def agreement(one: Int64[np.ndarray, "*n"], other: Int64[np.ndarray, "*n"], num_classes: int) -> float:
    """Return the `kappa` of two labellings with unrelated class numbers, after a Hungarian match."""
    counts = _contingency(one, other, num_classes)
    return _kappa(counts[:, np.argsort(match_concepts(counts))])


def silhouette(tokens: Float[Tensor, "n d"], labels: Int64[Tensor, " n"]) -> float:
    """Return the simplified silhouette of unit tokens under their labels, -1 to 1; 0 for fewer than two labels.

    Reference: Hruschka et al. (2006): distances to the means of classes instead of to all their members. Departures:
    averaged first within and then over the labels, so that a large background does not dominate.
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
    """Return the number of classes in use, 1 to `num_classes`: exp of the entropy in nats of their frequencies."""
    share = np.bincount(labels.ravel(), minlength=num_classes) / labels.size
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def score(components: Mapping[str, float]) -> float:
    """Return the objective of a sweep: `usage` x agreement x consistency, at most the number of classes.

    It combines how many classes are in use with how well another student and another view of the photographs reproduce
    them. Students with few concepts agree more, and noise uses many classes, so no factor is enough alone. Silhouette
    is measured too but left out: it did not rank trials.

    Args:
        components: by name; agreement or consistency is left out of the product if it was not measured.
    """
    again = [max(components[name], 0) for name in ("agreement", "consistency") if name in components]
    return float(components["usage"] * np.prod(again))


class _View(NamedTuple):
    """A transformed view of photographs.

    Attributes:
        of_images: (b, 3, y, x) -> the transformed photographs, of the same size.
        of_labels: (b, h, w) -> labels of the untransformed photographs, moved to their places in this view.
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
    """Tokens of some photographs and of transformed views of them, read once and decoded by every measured student.

    Args:
        images: RGB in 0-255, at the size that a model reads.
        read: returns the tokens of such images, see `read_tokens`.
        grid_hw: their patch grid.
    """

    def __init__(
        self, images: UInt8[Tensor, "b 3 y x"], read: Callable[[Tensor], Tensor], grid_hw: tuple[int, int]
    ) -> None:
        self._grid_hw = grid_hw
        views = [images, *(view.of_images(images) for view in _VIEWS)]
        self._tokens = [torch.cat([read(batch) for batch in torch.split(view, _BATCH)]) for view in views]

    @torch.no_grad()
    def labels(self, decode: Decode, view: int = 0) -> Int64[np.ndarray, "b h w"]:
        """Return the class of each patch.

        Args:
            decode: returns class logits (b, k, h, w) of tokens (b, hw, c) and their grid.
            view: 0 = the photographs as they are.
        """
        batches = torch.split(self._tokens[view], _BATCH)
        return torch.cat([decode(batch, self._grid_hw).argmax(1) for batch in batches]).cpu().numpy()

    def components(self, decode: Decode, num_classes: int) -> dict[str, float]:
        """Measure one student by itself: consistency over the views (mean `kappa`), silhouette and usage.

        Args:
            decode: see `labels`.
            num_classes: K, including the background class of Eq. 8 if there is one.
        """
        labels, tokens = self.labels(decode), self._tokens[0]
        again = [
            kappa(np.ascontiguousarray(view.of_labels(labels)), self.labels(decode, number), num_classes)
            for number, view in enumerate(_VIEWS, start=1)
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
