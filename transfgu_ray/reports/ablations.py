"""The paper's ablations (Tables 3, 4 and 5) as data, and tables of our results beside them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from transfgu_ray.errors import ConfigError
from transfgu_ray.reports.scores import REFINED, STAGE_NAMES, scores_by_method

# What runs have in common that differ only in their seed.
_IDENTITY = (
    "dataset", "split", "granularity", "protocol", "unmatched", "num_images", "num_classes", "num_concepts", "recipe",
    "backbone", "concept_names",
)  # fmt: skip


def aggregate(metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and sample deviation of runs that differ only in their seed.

    Args:
        metrics: contents of their metrics.json, all scored.

    Returns:
        What the runs have in common, `seeds`, and under `stages`, `refined` and `baselines` for each method, for each
        of miou, pixel_accuracy and coverage, {"mean": ..., "deviation": ...}; the deviation (n - 1) of a single run is
        null.

    Raises:
        ConfigError: there is no run, a run is not scored, two have the same seed, or they differ in more than the seed.
    """
    _check_same(metrics)
    first = metrics[0]
    return {name: first[name] for name in _IDENTITY} | {
        "seeds": [each["seed"] for each in metrics],
        "stages": _spread([each["stages"] for each in metrics]),
        "refined": None
        if first["refined"] is None
        else _spread([{REFINED: each["refined"]} for each in metrics])[REFINED],
        "baselines": _spread([each["baselines"] for each in metrics]),
    }


def _check_same(metrics: Sequence[dict[str, Any]]) -> None:
    if not metrics or not all(each["scored"] for each in metrics):
        raise ConfigError("only runs that are scored can be aggregated over seeds; give runs on a dataset with labels")
    first = metrics[0]
    for each in metrics[1:]:
        different = [f"{name}: {first[name]} and {each[name]}" for name in _IDENTITY if each[name] != first[name]]
        if set(scores_by_method(each)) != set(scores_by_method(first)):
            different.append(f"methods: {', '.join(scores_by_method(first))} and {', '.join(scores_by_method(each))}")
        if different:
            raise ConfigError(
                f"the runs differ in more than their seed ({'; '.join(different)}); give runs of the same recipe"
            )
    seeds = [each["seed"] for each in metrics]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"two of the runs have the same seed ({', '.join(map(str, seeds))}); give each run a seed of its own"
        )


def _spread(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        method: {
            name: {
                "mean": float(np.mean(values)),
                "deviation": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            }
            for name in ("miou", "pixel_accuracy", "coverage")
            for values in [[each[method][name] for each in scores]]
        }
        for method in scores[0]
    }


FULL = "full"


@dataclass(frozen=True)
class Variant:
    """A configuration of the grid.

    Attributes:
        title: name to show.
        settings: what it changes.
        reads_resnet: whether it needs `train.backbone_weights` too.
    """

    title: str
    settings: tuple[str, ...] = ()
    reads_resnet: bool = False


_RESNET = ("train.backbone=resnet50_fpn", "train.token_window=null")
_NO_PEER, _NO_DIVERSITY, _NO_UNCERTAINTY = "train.alpha=[0, 0]", "train.omega_1=0", "train.omega_2=0"

VARIANTS: Mapping[str, Variant] = {
    FULL: Variant("ViT, segmenter, all losses"),
    "resnet_segmenter": Variant("ResNet-50 + FPN, segmenter", _RESNET, reads_resnet=True),
    "vit_classifier": Variant("ViT, classifier", ("train.decoder=classifier",)),
    "resnet_classifier": Variant(
        "ResNet-50 + FPN, classifier", (*_RESNET, "train.decoder=classifier"), reads_resnet=True
    ),
    "ce": Variant("CE", (_NO_PEER, _NO_DIVERSITY, _NO_UNCERTAINTY)),
    "peer": Variant("CE, peer", (_NO_DIVERSITY, _NO_UNCERTAINTY)),
    "peer_uncertainty": Variant("CE, peer, uncertainty", (_NO_DIVERSITY,)),
    "peer_diversity": Variant("CE, peer, diversity", (_NO_UNCERTAINTY,)),
}


@dataclass(frozen=True)
class Row:
    """A row of one of the paper's tables.

    Attributes:
        title: name to show.
        variant: variant whose run gives our figures.
        stages: stages of that run; each fills a pair of columns, mIoU and accuracy.
        published: the paper's mIoU (and accuracy, where given) of each stage on its own dataset, in percent.
    """

    title: str
    variant: str
    stages: tuple[str, ...]
    published: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """One of the paper's tables.

    Attributes:
        title: what it shows.
        dataset: dataset that the published figures were measured on.
        rows: rows in the paper's order.
    """

    title: str
    dataset: str
    rows: tuple[Row, ...]


_LAST = (STAGE_NAMES[-1],)
TABLES = (
    Table(
        "Table 3. Bootstrapping: initial / trained / bootstrapped",
        "COCO-Stuff-27",
        (Row(VARIANTS[FULL].title, FULL, STAGE_NAMES, ("8.95", "13.19", "16.19")),),
    ),
    Table(
        "Table 4. Encoder and decoder",
        "COCO-Stuff-171",
        (
            Row("none (initial labels)", FULL, STAGE_NAMES[:1], ("5.05 / 17.33",)),
            Row("ResNet-50 + FPN, segmenter", "resnet_segmenter", _LAST, ("9.21 / 26.17",)),
            Row("ViT, classifier", "vit_classifier", _LAST, ("7.96 / 24.17",)),
            Row("ResNet-50 + FPN, classifier", "resnet_classifier", _LAST, ("8.33 / 25.35",)),
            Row("ViT, segmenter", FULL, _LAST, ("11.93 / 34.32",)),
        ),
    ),
    Table(
        "Table 5. Losses",
        "Pascal VOC",
        (
            Row("CE", "ce", _LAST, ("34.24",)),
            Row("CE, peer", "peer", _LAST, ("35.08",)),
            Row("CE, peer, uncertainty", "peer_uncertainty", _LAST, ("36.46",)),
            Row("CE, peer, diversity", "peer_diversity", _LAST, ("35.97",)),
            Row("CE, peer, uncertainty, diversity", FULL, _LAST, ("37.15 / 83.59",)),
        ),
    ),
)


def ablation_tables(metrics: Mapping[str, Sequence[dict[str, Any]]], notes: Sequence[str] = ()) -> str:
    """Return the paper's tables with our figures, as Markdown.

    Args:
        metrics: variant -> content of metrics.json of each seed's run; variants left out were not run.
        notes: lines to put above the tables.
    """
    first = next(iter(metrics.values()))
    one = first[0]
    seeds = ", ".join(str(each["seed"]) for each in first)
    lines = [
        f"Dataset {one['dataset']}, split {one['split']}, recipe {one['recipe']}, K = {one['num_concepts']}, "
        f"seeds {seeds}: mean ± sample deviation, %. The paper's figures were measured on another dataset with another "
        "encoder; only the order of the rows can be compared.",
        *notes,
    ]
    found = {name: aggregate(of_seeds) for name, of_seeds in metrics.items()}
    for table in TABLES:
        lines += ["", f"**{table.title}**", "", f"| | mIoU | accuracy | paper, {table.dataset}: mIoU / accuracy |"]
        lines.append("|---|---|---|---|")
        for row in table.rows:
            for stage, published in zip(row.stages, row.published, strict=True):
                title = row.title if len(row.stages) == 1 else stage
                cells = ["not run"] * 2
                if row.variant in found:
                    scores = found[row.variant]["stages"][stage]
                    cells = [_cell(scores[name]) for name in ("miou", "pixel_accuracy")]
                lines.append(f"| {title} | {' | '.join(cells)} | {published} |")
    return "\n".join(lines) + "\n"


def _cell(score: Mapping[str, Any]) -> str:
    deviation = "" if score["deviation"] is None else f" ± {100 * score['deviation']:.1f}"
    return f"{100 * score['mean']:.1f}{deviation}"
