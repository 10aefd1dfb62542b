"""Crops and photographs that best show a concept, and concepts that could stand in for it; computed part by part.

Departures: ours.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64, Integer, UInt8


@dataclass(frozen=True)
class Best:
    """The lowest values of each concept so far, and where they are.

    Attributes:
        values: ascending; infinite if there are fewer.
        parts: number of the part.
        rows: row in the part.
    """

    values: Float32[np.ndarray, "m k"]
    parts: Int64[np.ndarray, "m k"]
    rows: Int64[np.ndarray, "m k"]

    @classmethod
    def none(cls, num_kept: int, num_concepts: int) -> "Best":
        """Return the state before anything is seen."""
        shape = num_kept, num_concepts
        return cls(np.full(shape, np.inf, np.float32), np.zeros(shape, np.int64), np.zeros(shape, np.int64))

    def merge(self, later: "Best") -> "Best":
        """Return the lowest of both; ties go to those seen first."""
        columns = [
            np.concatenate(pair)
            for pair in ((self.values, later.values), (self.parts, later.parts), (self.rows, later.rows))
        ]
        order = np.argsort(columns[0], axis=0, kind="stable")[: len(self.values)]
        return Best(*(np.take_along_axis(column, order, axis=0) for column in columns))


def nearest_crops(
    tokens: Float32[np.ndarray, "n d"],
    of_image: Integer[np.ndarray, " n"],
    *,
    may_be: Bool[np.ndarray, "n k"],
    centroids: Float32[np.ndarray, "k d"],
    part: int,
    num_kept: int,
) -> Best:
    """Return the crops of a part nearest to the centroid of their concept, at most one per photograph.

    Args:
        tokens: class token of each crop.
        of_image: number of its photograph, ascending.
        may_be: whether it is of the concept's kind; it belongs to the nearest of those.
        centroids: of the concepts.
        part: its number.
        num_kept: crops per concept.
    """
    best = Best.none(num_kept, len(centroids))
    squares = (centroids**2).sum(1)[None] - 2 * tokens @ centroids.T + (tokens**2).sum(1)[:, None]
    distances = np.where(may_be, np.sqrt(squares.clip(min=0)), np.inf).astype(np.float32)
    own = np.full_like(distances, np.inf)
    concepts, crops = distances.argmin(1), np.arange(len(tokens))
    own[crops, concepts] = distances[crops, concepts]
    starts = np.flatnonzero(np.diff(of_image, prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
        rows = start + own[start:stop].argmin(0)
        values = own[rows, np.arange(len(centroids))]
        found = Best(values[None], np.full((1, len(rows)), part), rows[None].astype(np.int64))
        best = best.merge(found)
    return best


def strongest_responses(means: Float32[np.ndarray, "n k"], part: int, num_kept: int) -> Best:
    """Return the photographs of a part with the highest mean response of each concept; values are negative means.

    Args:
        means: of each photograph and concept; a photograph with mean 0 is no example.
        part: its number.
        num_kept: photographs per concept.
    """
    rows = np.repeat(np.arange(len(means))[:, None], means.shape[1], axis=1)
    found = Best(np.where(means > 0, -means, np.inf).astype(np.float32), np.full_like(rows, part), rows)
    return Best.none(num_kept, means.shape[1]).merge(found)


def stand_ins(codes: UInt8[np.ndarray, "k h w"]) -> tuple[Int64[np.ndarray, " k"], Int64[np.ndarray, "k k"]]:
    """Count the patches that each concept wins in a row of the bank, and the runners-up on them.

    Args:
        codes: of the bank; see `encode_scores`. A concept with code 0 does not respond.

    Returns:
        Patches per winner; patches per winner (row) and runner-up (column).
    """
    num_concepts = len(codes)
    flat = codes.reshape(num_concepts, -1)
    winner = flat.argmax(0)
    others = flat.copy()
    np.put_along_axis(others, winner[None], 0, axis=0)
    second = others.argmax(0)
    followed = np.take_along_axis(others, second[None], axis=0)[0] > 0
    pairs = np.bincount(winner[followed] * num_concepts + second[followed], minlength=num_concepts**2)
    return np.bincount(winner, minlength=num_concepts), pairs.reshape(num_concepts, num_concepts)


def plane(points: Float[np.ndarray, "n d"]) -> tuple[Float[np.ndarray, "n 2"], float]:
    """Project points on their two principal components; return them and the share of the variance kept.

    Each axis points so that its largest coordinate is positive.
    """
    centred = points - points.mean(0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    placed = np.zeros((len(points), 2))
    placed[:, : len(sizes[:2])] = left[:, :2] * sizes[:2]
    largest = np.abs(placed).argmax(0)
    signs = np.where(placed[largest, [0, 1]] < 0, -1, 1)
    total = float((sizes**2).sum())
    return placed * signs, float((sizes[:2] ** 2).sum()) / total if total else 1.0
