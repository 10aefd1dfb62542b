"""Check that a copy of a dataset is complete, before a cluster is paid for."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from transfgu_ray.datasets import DATASETS, VOID, named_dataset
from transfgu_ray.datasets.listing import list_images, open_root, passed_over_words, read_pairs
from transfgu_ray.datasets.paired import read_names
from transfgu_ray.errors import ConfigError
from transfgu_ray.images import ImageRefused, Limits, decode_pair

_READ_TOGETHER = 16


@dataclass(frozen=True)
class Fact:
    """A line of what a check found.

    Attributes:
        split: split of the dataset.
        what: what was counted.
        found: the result, as text.
    """

    split: str
    what: str
    found: str


@dataclass
class CheckResult:
    """The result of a check.

    Attributes:
        facts: counts, sizes and classes.
        refused: files that are not as they should be, each with `image_id` and `reason`.
    """

    facts: list[Fact] = field(default_factory=list)
    refused: list[dict[str, str]] = field(default_factory=list)


class Check:
    """A copy of a dataset, listed and ready to be read.

    Args:
        name: name of the dataset.
        folder: root of the copy.
        limits: what a run refuses.

    Raises:
        ConfigError: no such dataset, or its names file is wrong.
        DataError: the root, a list or the folder of labels is missing, or there is no photograph.
    """

    def __init__(self, name: str, folder: str | None, limits: Limits) -> None:
        if name not in DATASETS:
            raise ConfigError(f"unknown dataset {name!r}; allowed: {', '.join(DATASETS)}")
        uri, spec = folder or "", DATASETS[name]
        if spec.has_own_names:
            try:
                spec = named_dataset(read_names(uri, spec), spec)
            except ValueError as error:
                raise ConfigError(f"data.names: {error}") from None
        self._spec, self._root, self._limits = spec, open_root(uri), limits
        splits = dict.fromkeys((spec.train_split, spec.evaluate_split or spec.train_split))
        scored = spec.evaluate_split
        listings = {
            split: list_images(uri, spec, split=split, granularity="fine" if split == scored else None)
            for split in splits
        }
        self._listed = {split: listing.images for split, listing in listings.items()}
        self._not_listed = {split: listing.refused for split, listing in listings.items()}
        self._passed_over = {split: listing.passed_over for split, listing in listings.items()}
        self.num_images = sum(map(len, self._listed.values()))

    def run(self, progress: Callable[[int], None]) -> CheckResult:
        """Decode every photograph, and every label of the scored split, as a run does."""
        found, names = CheckResult(), self._spec.class_names
        for split, images in self._listed.items():
            sizes, pixels = [], np.zeros(VOID + 1, dtype=np.int64)
            found.refused += self._not_listed[split]
            labelled = bool(names) and split == self._spec.evaluate_split
            for start in range(0, len(images), _READ_TOGETHER):
                some = images[start : start + _READ_TOGETHER]
                places, label_places = [image.place for image in some], [image.label_id for image in some]
                for image, pair in zip(some, read_pairs(self._root, places, label_places), strict=True):
                    try:
                        size, counts = self._decode(*pair, labelled=labelled)
                        sizes.append(size)
                        pixels += counts
                    except ImageRefused as refusal:
                        found.refused.append({"image_id": image.image_id, "reason": str(refusal)})
                    progress(1)
            title = split or "all"
            found.facts.append(Fact(title, "photographs", self._count(split, len(images))))
            if others := passed_over_words(self._passed_over[split]):
                found.facts.append(Fact(title, "passed over", ", ".join(others)))
            if sizes:
                low, high = np.min(sizes, axis=0), np.max(sizes, axis=0)
                found.facts.append(Fact(title, "width x height", f"{low[0]} x {low[1]} to {high[0]} x {high[1]} px"))
            if pixels.any():
                seen = np.flatnonzero(pixels[:VOID])
                absent = [names[i] for i in range(len(names)) if i not in seen]
                text = f"{len(seen)} of {len(names)}" + (f"; not seen: {', '.join(absent)}" if absent else "")
                found.facts.append(Fact(title, "classes", text))
                found.facts.append(Fact(title, "void", f"{100 * pixels[VOID] / pixels.sum():.1f} % of the pixels"))
        return found

    def _count(self, split: str, count: int) -> str:
        published = self._spec.num_images.get(split)
        if published in (None, count):
            return str(count)
        return f"{count}, not the published {published}: scores cannot be compared"

    def _decode(
        self, data: bytes | None, label: bytes | None, problem: str | None, *, labelled: bool
    ) -> tuple[tuple[int, int], np.ndarray]:
        """Return (width, height), and the number of pixels of each class in the label."""
        if data is None or problem is not None:
            raise ImageRefused(problem)
        if labelled and label is None:
            raise ImageRefused("it has no label")
        table = None if label is None else self._spec.label_table("fine")
        photo, classes = decode_pair(data, label, limits=self._limits, table=table)
        counts = np.zeros(VOID + 1, dtype=np.int64)
        if classes is not None:
            counts = np.bincount(classes.ravel(), minlength=VOID + 1)
        return photo.size, counts
