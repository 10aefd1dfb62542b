"""Everything the package knows about a dataset, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int16

if TYPE_CHECKING:
    from transfgu_ray.datasets.listing import Listing
    from transfgu_ray.storage import Folder

    ListSplit = Callable[[Folder, str, str], tuple[Listing, str]]

VOID = 255
# A label file holds one byte per pixel.
_NUM_IDS = 256
UNKNOWN = -1


@dataclass(frozen=True)
class DatasetSpec:
    """A dataset: where its files are, what its labels mean, and how the paper trains on it.

    Attributes:
        name: value of `data.dataset`.
        expects: description of the files that must be under the root.
        list_split: takes root, split and granularity; returns the photographs with the paths of their labels, and the
            folder of the labels. Raises `listing.ListMissing` where a file that lists the split cannot be read.
        region_mode: default of `data.region_mode` (4.2).
        train_split: split the pipeline learns from; "" where there are no splits.
        evaluate_split: split that is scored; None without labels.
        class_names: class id -> name.
        class_kinds: class id -> `thing` (an object) or `stuff` (anything else).
        super_names: id -> name of the coarser classes; empty where the dataset has one granularity.
        super_of: class id -> id of the coarser class it belongs to.
        class_of_id: id in a label file -> class id, or 255 for void, which is never scored; ids left out, other than
            255, are errors. Empty where the ids are the classes.
        settings: preset -> its settings for this dataset, such as `train.batch_size`: 256.
        num_images: split -> published number of photographs.
        has_own_names: whether the classes are those of a names file beside the photographs, which may be missing where
            `evaluate_split` is None: then there are no labels.
        list_all: as `list_split`, for all photographs of which `list_split` gives a selection; None where it gives all.
    """

    name: str
    expects: str
    list_split: ListSplit
    region_mode: str
    train_split: str = ""
    evaluate_split: str | None = None
    class_names: tuple[str, ...] = ()
    class_kinds: tuple[str, ...] = ()
    super_names: tuple[str, ...] = ()
    super_of: tuple[int, ...] = ()
    class_of_id: Mapping[int, int] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    num_images: Mapping[str, int] = field(default_factory=dict)
    has_own_names: bool = False
    list_all: ListSplit | None = None

    def names(self, granularity: str) -> tuple[str, ...]:
        """Return class id -> name, of the classes themselves (`fine`) or of the coarser ones (`super`)."""
        return self.super_names if granularity == "super" else self.class_names

    def kinds(self, granularity: str) -> tuple[str, ...]:
        """Return class id -> kind; a coarser class has the kind of its classes."""
        if granularity != "super":
            return self.class_kinds
        return tuple(self.class_kinds[self.super_of.index(super_id)] for super_id in range(len(self.super_names)))

    def label_table(self, granularity: str) -> Int16[np.ndarray, " 256"]:
        """Return the class of every id in a label file: a class id, 255 for void, -1 for an id that must not occur."""
        table = np.full(_NUM_IDS, UNKNOWN, dtype=np.int16)
        table[VOID] = VOID
        known = self.class_of_id or {i: i for i in range(len(self.names(granularity)))}
        table[list(known)] = list(known.values())
        return table


# Clustering of the published code for Cityscapes and LIP: scikit-learn 1.0 chose the best of 3 first centroids.
MINI_BATCH: dict[str, Any] = {"concepts.algorithm": "mini_batch", "concepts.seed": 0, "concepts.num_redos": 3}


def supplement(batch_size: int, learning_rate: float, num_epochs: int) -> dict[str, Any]:
    """Return the settings in a dataset's row of the supplement's Training Details."""
    return {
        "train.batch_size": batch_size,
        "train.learning_rate": learning_rate,
        "train.num_epochs": num_epochs,
    }


def recipes(
    row: Mapping[str, Any],
    *,
    silent: Mapping[str, Any],
    paper: Mapping[str, Any] | None = None,
    released: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the settings of the presets `paper` and `released`.

    Args:
        row: of the supplement.
        silent: settings of the published code that the text does not speak of.
        paper: where the text has other settings than these.
        released: where the published code has.
    """
    both = {**row, **silent}
    return {"paper": both | dict(paper or {}), "released": both | dict(released or {})}
