"""The paper's ablations (Tables 3, 4 and 5) as data, and tables of our results beside them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from transfgu_ray.algorithms.scores.intervals import class_counts, mean_interval
from transfgu_ray.config.run import RunConfig
from transfgu_ray.errors import ConfigError
from transfgu_ray.models.names import Names
from transfgu_ray.reports.scores import STAGE_NAMES, by_group, resampled_methods, scores_by_method

# What runs have in common that differ only in their seed.
_IDENTITY = (
    "dataset", "split", "granularity", "protocol", "unmatched", "num_images", "num_classes", "num_concepts", "recipe",
    "backbone", "concept_names",
)  # fmt: skip
# Of the resamples, which are the same for all seeds and variants.
_SEED = 0


@dataclass(frozen=True)
class ScoredRun:
    """A scored run, one of several that differ only in their seed.

    Attributes:
        metrics: content of its metrics.json.
        config: its configuration.
        counts: confusion matrices of each photograph, by method; see `metrics_json`.
        names: names of its concepts.
    """

    metrics: dict[str, Any]
    config: RunConfig
    counts: dict[str, csr_array]
    names: Names


def aggregate(runs: Sequence[ScoredRun]) -> dict[str, Any]:
    """Return mean, sample deviation and interval of runs that differ only in their seed.

    Returns:
        What the runs have in common, `seeds`, and under `stages`, `refined` and `baselines` for each method, for each
        of miou, pixel_accuracy and coverage, {"mean": ..., "deviation": ...}; the deviation (n - 1) of a single run is
        null. miou and pixel_accuracy also have `interval`, the mean's 95 % interval [low, high] over seeds and
        photographs; see `mean_interval`.

    Raises:
        ConfigError: there is no run, a run is not scored, two have the same seed, they differ in more than the seed, or
            were scored on other photographs.
    """
    metrics = [run.metrics for run in runs]
    _check_same(metrics)
    _check_photographs(runs)
    scores = [scores_by_method(each) for each in metrics]
    resampled = [resampled_methods(run.config, run.counts, run.names, _SEED) for run in runs]
    found = {
        method: _spread([each[method] for each in scores], [each[method] for each in resampled]) for method in scores[0]
    }
    return {name: metrics[0][name] for name in _IDENTITY} | {
        "seeds": [each["seed"] for each in metrics],
        **by_group(found),
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


def _check_photographs(runs: Sequence[ScoredRun]) -> None:
    truths = [class_counts(run.counts[STAGE_NAMES[0]], len(run.config.class_names)) for run in runs]
    if any(truth.shape != truths[0].shape or (truth != truths[0]).nnz for truth in truths):
        raise ConfigError("the runs were scored on different photographs; give runs on the same data")


def _spread(scores: Sequence[dict[str, Any]], resampled: Sequence[np.ndarray]) -> dict[str, Any]:
    """Return mean, deviation and interval of one method's scores, from those of each run on the same resamples."""
    found: dict[str, Any] = {}
    for name in ("miou", "pixel_accuracy", "coverage"):
        values = [each[name] for each in scores]
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        found[name] = {"mean": float(np.mean(values)), "deviation": deviation}
    for name, of_runs in zip(("miou", "pixel_accuracy"), np.stack(resampled, axis=-1).swapaxes(0, 1), strict=True):
        found[name]["interval"] = mean_interval(of_runs, _SEED)
    return found


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


def ablation_tables(runs: Mapping[str, Sequence[ScoredRun]], notes: Sequence[str] = ()) -> str:
    """Return the paper's tables with our figures, as Markdown.

    Args:
        runs: variant -> run of each seed; variants left out were not run.
        notes: lines to put above the tables.
    """
    found = {name: aggregate(of_seeds) for name, of_seeds in runs.items()}
    one = next(iter(runs.values()))[0].metrics
    seeds = ", ".join(map(str, next(iter(found.values()))["seeds"]))
    lines = [
        f"Dataset {one['dataset']}, split {one['split']}, recipe {one['recipe']}, K = {one['num_concepts']}, "
        f"seeds {seeds}: mean ± sample deviation [95 % interval of the mean over seeds and photographs], %. The "
        "paper's figures were measured on another dataset with another encoder; only their order can be compared.",
        *notes,
    ]
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
    low, high = score["interval"]
    return f"{100 * score['mean']:.1f}{deviation} [{100 * low:.1f}, {100 * high:.1f}]"
