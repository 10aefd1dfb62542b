"""What each stage reads, calls and says of itself in its manifest."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transfgu_ray.artifacts import Run
from transfgu_ray.backbone import BACKBONE, backbone_file_sha256
from transfgu_ray.config import RunConfig
from transfgu_ray.datasets import Listing, list_images
from transfgu_ray.errors import DataError
from transfgu_ray.pipeline.session import Resources
from transfgu_ray.pipeline.stream import Progress
from transfgu_ray.pipeline.tracking import Tracked
from transfgu_ray.prior import ENCODER, weights_file_sha256
from transfgu_ray.storage import Folder


@dataclass(frozen=True)
class Trial:
    """What a sweep wants of a run beside its model.

    Attributes:
        parent: MLflow run of the sweep.
        tags: of the registered model.
        sibling: run of another seed whose bank a second student learns from, so that every epoch can be measured
            without labels; None = nothing is measured.
        on_epoch: takes the history so far whenever there is more of it.
    """

    parent: Tracked
    tags: Mapping[str, str]
    sibling: Run | None
    on_epoch: Callable[[list[dict[str, float]]], None]


@dataclass(frozen=True)
class Context:
    """What every stage gets.

    Attributes:
        run: run folder and configuration.
        root: the dataset.
        listing: photographs of the training split.
        resources: workers and devices.
        fingerprint: of the stage.
        inputs: what the stage is made of beside its settings; part of the fingerprint.
        encoder: safetensors bytes of the encoder; None where extract is not pending.
        backbone: safetensors bytes of the student's own backbone; None where it has none, or train is not pending.
        tracked: the MLflow run; None outside `transfgu run`.
        trial: what a sweep wants of the run; None outside one.
        progress: takes items done.
    """

    run: Run
    root: Folder
    listing: Listing
    resources: Resources
    fingerprint: str
    inputs: str
    encoder: bytes | None
    backbone: bytes | None
    tracked: Any
    trial: Trial | None
    progress: Progress


def progress_total(run: Run, stage: str, listing: Listing) -> tuple[int, str]:
    """How many items a stage works through, and what they are."""
    if stage in ("extract", "labels"):
        return len(listing.images), "photographs"
    if stage == "train" and run.config.train.decoder_weights is not None:
        return 1, "decoder"
    if stage == "train":
        epochs = sum(run.config.train.round_epochs)
        if run.config.train.features == "live":
            return epochs, "epochs"
        # Their tokens first, then every epoch.
        return (1 + epochs) * len(listing.images), "photographs"
    if stage == "evaluate":
        scored = list_scored(run.config)
        shown = min(run.config.evaluate.num_samples, len(listing.images))
        if scored is None:
            return shown, "photographs"
        from transfgu_ray.pipeline.baselines import chosen_photos

        return len(scored.images) + len(chosen_photos(run.config, listing.images)), "photographs"
    return 1, "step"


def _extract(context: Context) -> dict[str, Any]:
    from transfgu_ray.algorithms.weights import read_safetensors
    from transfgu_ray.pipeline.extract_features import FeatureExtractor

    run, config = context.run, context.run.config
    # Resolved here once: workers and the finished model all use this very file.
    assert context.encoder is not None
    run.folder.write_bytes(ENCODER, context.encoder)
    result = _table_of_photographs(context, "features", FeatureExtractor, list_labelled(config))
    require_some(result.stats, len(context.listing.images))
    content = _table_content(context, result)
    _require_most(content, config.runtime.max_refused_share)
    return content | {
        "weights_sha256": read_safetensors(context.encoder, ENCODER)[1]["weights_sha256"],
        "weights_file_sha256": weights_file_sha256(config.encoder),
        "other_files_passed_over": context.listing.num_other_files,
    }


def _concepts(context: Context) -> dict[str, Any]:
    from transfgu_ray.pipeline.fit_concepts import cluster
    from transfgu_ray.pipeline.stream import unwrapped_errors

    run = context.run
    extracted = run.require("extract")
    with unwrapped_errors():
        groups, peak_mb = cluster(run.folder, run.config, extracted["rows_out"], context.resources)
    context.progress(1)
    return {
        "rows_in": sum(group["points_total"] for group in groups.values()),
        "rows_out": sum(group["concepts"] for group in groups.values()),
        "refused": [],
        "groups": groups,
        "peak_memory_mb": peak_mb,
        "weights_sha256": extracted["weights_sha256"],
    }


def _labels(context: Context) -> dict[str, Any]:
    from transfgu_ray.pipeline.build_labels import BankBuilder

    result = _table_of_photographs(context, "labels", BankBuilder, root_uri=context.root.uri)
    require_some(result.stats, len(context.listing.images))
    return _table_content(context, result) | {"weights_sha256": context.run.require("extract")["weights_sha256"]}


def _train(context: Context) -> dict[str, Any]:
    from transfgu_ray.algorithms.rounds import steps_per_epoch
    from transfgu_ray.pipeline import tracking
    from transfgu_ray.pipeline.fit_concepts import read_concepts
    from transfgu_ray.pipeline.train_rounds import model_config, train
    from transfgu_ray.pipeline.trainer import MAX_RESTARTS

    run, config, resources = context.run, context.run.config, context.resources
    weights_sha256 = run.require("extract")["weights_sha256"]
    if config.train.decoder_weights is not None:
        from transfgu_ray.pipeline.import_decoder import import_decoder

        context.progress(1)
        return import_decoder(run.folder, config, weights_sha256)
    kinds, _ = read_concepts(run.folder)
    if context.backbone is not None:
        run.folder.write_bytes(BACKBONE, context.backbone)
    cached, items_an_epoch, peak_mb = {}, 1, 0
    if config.train.features == "cached":
        cached["cached_tokens"], peak_mb = build_tokens(context)
        items_an_epoch = len(context.listing.images)
    reported = 0

    def on_epoch(history: list[dict[str, float]]) -> None:
        nonlocal reported
        context.progress((len(history) - reported) * items_an_epoch)
        reported = len(history)
        if context.tracked is not None:
            tracking.log_epochs(context.tracked, history)
        if context.trial is not None:
            context.trial.on_epoch(history)

    result = train(
        run.folder,
        config,
        model_config(config, kinds, weights_sha256),
        context.fingerprint,
        resources,
        on_epoch,
        lambda pulse: context.progress(0),
        # A trial that is stopped in the middle must not take new workers for those that it loses: whoever should free
        # them has not yet heard of them. Tune starts it again instead.
        MAX_RESTARTS if context.trial is None else 0,
        context.trial and context.trial.sibling,
    )
    images = run.require("labels")["images"]
    visits = images * config.train.epoch_repeats
    steps, per_worker = steps_per_epoch(visits, config.train.batch_size, resources.train_workers)
    return {
        "rows_in": images,
        "rows_out": images,
        "refused": [],
        **cached,
        "peak_memory_mb": max(result.peak_memory_mb, peak_mb),
        "epochs": len(result.history),
        "resumed_at_epoch": result.resumed_at_epoch,
        "steps_per_epoch": steps,
        "images_per_step": per_worker * resources.train_workers,
        "images_repeated_to_fill_an_epoch": steps * per_worker * resources.train_workers - visits,
        "train_workers": resources.train_workers,
        "last_losses": result.history[-1],
        "weights_sha256": weights_sha256,
        "backbone_file_sha256": backbone_file_sha256(config.train),
    }


def build_tokens(context: Context) -> tuple[dict[str, int], int]:
    """Brings the table of cached tokens up to date; what the manifest says of it, and a worker's peak memory, MB."""
    from transfgu_ray.pipeline.cache_tokens import TokenCacher
    from transfgu_ray.pipeline.samples import TOKENS

    tokens = replace(context, fingerprint=context.run.tokens_fingerprint(context.inputs))
    table = _table_of_photographs(tokens, TOKENS, TokenCacher)
    num_bytes = sum(size for _, size in context.run.folder.files(TOKENS))
    return {"bytes": num_bytes, "parts": table.num_parts, "parts_resumed": table.num_resumed}, table.peak_mb


def list_labelled(config: RunConfig) -> Listing | None:
    """The photographs that are learned from with their labels; None where those do not cut the windows.

    Raises:
        DataError: there are none, or their labels are missing.
    """
    if config.extract.windows != "ground_truth":
        return None
    return list_images(config.data, config.data.benchmark.train_split, config.concepts.granularity)


def _table_of_photographs(
    context: Context, table: str, worker: Any, listing: Listing | None = None, **arguments: Any
) -> Any:
    """A table of the training photographs, brought up to date; see `parts.build_table_of_parts`."""
    from transfgu_ray.pipeline.parts import build_table_of_parts

    config = context.run.config
    return build_table_of_parts(
        context.run.folder,
        table,
        context.fingerprint,
        context.root,
        (listing or context.listing).images,
        config.extract.images_per_part,
        worker,
        {"config": config.model_dump(mode="json"), **arguments},
        context.resources,
        context.progress,
    )


def scored_split(config: RunConfig) -> str | None:
    """The split that is scored; None for a dataset without labels."""
    split = config.data.benchmark.evaluate_split
    return split and (config.evaluate.split or split)


def list_scored(config: RunConfig) -> Listing | None:
    """The photographs that are scored, with their labels; None for a dataset without labels.

    Raises:
        DataError: the split or its labels are missing.
    """
    split = scored_split(config)
    return None if split is None else list_images(config.data, split, config.concepts.granularity)


def _evaluate(context: Context) -> dict[str, Any]:
    from transfgu_ray.model import load_model_config
    from transfgu_ray.names import load_names
    from transfgu_ray.pipeline.atlas import build_atlas
    from transfgu_ray.pipeline.baselines import fit_baselines
    from transfgu_ray.pipeline.evaluate import evaluate
    from transfgu_ray.pipeline.samples import bank_image_ids
    from transfgu_ray.pipeline.scoring import read_counts
    from transfgu_ray.scores import metrics_json

    run, config = context.run, context.run.config
    scored = list_scored(config)
    if scored is None:
        # Only to be looked at: take those that are known to be readable.
        readable = set(bank_image_ids(run.folder))
        images = [image for image in context.listing.images if image.image_id in readable]
    else:
        images = list(scored.images)
    weights_sha256 = run.require("extract")["weights_sha256"]
    model = Folder(run.folder.uri_of("model"))
    kinds = load_model_config(model).kinds
    names = load_names(model, kinds)
    centroids, drawn = {}, {}
    if scored is not None and config.evaluate.baselines:
        centroids, drawn = fit_baselines(
            run.folder,
            config,
            context.fingerprint,
            context.root,
            context.listing.images,
            len(kinds),
            context.resources,
            context.progress,
        )
        drawn = {"baselines": drawn}
    # The photographs that are scored are no part of the run's input.
    fingerprint = context.fingerprint if scored is None else f"{context.fingerprint} {scored.fingerprint}"
    result = evaluate(
        run.folder,
        config,
        kinds,
        fingerprint,
        context.root,
        images,
        scored is not None,
        centroids,
        context.resources,
        context.progress,
    )
    stats = result.stats
    if scored is not None:
        require_some(stats, len(images))
    atlas, atlas_mb = {}, 0
    if config.evaluate.num_samples:
        atlas, atlas_mb = build_atlas(
            run.folder, config, context.fingerprint, context.root, context.listing.images, context.resources
        )
    counts = read_counts(run.folder, len(config.class_names), len(kinds))
    metrics = metrics_json(config, scored_split(config), stats.images, counts, names, weights_sha256)
    run.folder.write_bytes("metrics.json", json.dumps(metrics, indent=1).encode())
    return {
        **refusals(stats, (context.listing if scored is None else scored).refused),
        "rows_out": stats.images,
        "scored": metrics["scored"],
        "parts": result.num_parts,
        "parts_resumed": result.num_resumed,
        **drawn,
        "atlas": atlas,
        "peak_memory_mb": max(result.peak_mb, atlas_mb),
        "weights_sha256": weights_sha256,
    }


def _report(context: Context) -> dict[str, Any]:
    from transfgu_ray.pipeline.rewrite import write_pages

    content = write_pages(context.run)
    context.progress(1)
    return content


def _register(context: Context) -> dict[str, Any]:
    from transfgu_ray.pipeline import tracking

    run = context.run
    tracked = context.tracked
    # Epochs that an interrupted call had trained but not logged.
    history = json.loads(run.folder.read_bytes("train/history.json"))
    tracking.log_epochs(tracked, history)
    metrics = json.loads(run.folder.read_bytes("metrics.json"))
    strips = [name for name, _ in run.folder.files("samples") if name.endswith(".jpg")]
    pages = filter(run.folder.exists, ("report.html", "atlas.html"))
    artifacts = ["config.yaml", "metrics.json", *pages, *strips]
    tags = {"dataset_fingerprint": context.listing.fingerprint, **(context.trial.tags if context.trial else {})}
    if history and "score" in history[-1]:
        tags["score"] = f"{history[-1]['score']:.6f}"
    registered = tracking.register(tracked, run.folder, run.config, metrics, artifacts, tags)
    context.progress(1)
    return {"rows_in": 1, "rows_out": 1, "refused": [], **registered}


def require_some(stats: Any, num_images: int) -> None:
    """Refuses a table that has none of its photographs.

    Raises:
        DataError: none could be used.
    """
    if not stats.images:
        first = stats.refused[0]
        raise DataError(
            f"none of {num_images} photographs can be used; the first, {first['image_id']}: {first['reason']}"
        )


def _require_most(content: Mapping[str, Any], max_refused_share: float) -> None:
    """Refuses a table that lacks more of its photographs than is allowed.

    Raises:
        DataError: it does.
    """
    num_refused, total = len(content["refused"]), content["rows_in"]
    if num_refused > max_refused_share * total:
        reasons = sorted(content["refused_by_reason"].items(), key=lambda item: -item[1])
        raise DataError(
            f"{num_refused} of {total} photographs were refused, more than runtime.max_refused_share="
            f"{max_refused_share} allows: {', '.join(f'{count} x {reason}' for reason, count in reasons)}; mend them, "
            "or raise it and go on"
        )


def _table_content(context: Context, result: Any) -> dict[str, Any]:
    stats = result.stats
    return {
        **refusals(stats, context.listing.refused),
        "rows_out": result.num_rows,
        "images": stats.images,
        "dropped": stats.dropped,
        "batches_halved": stats.halvings,
        "parts": result.num_parts,
        "parts_resumed": result.num_resumed,
        "peak_memory_mb": result.peak_mb,
    }


def refusals(stats: Any, listed: Sequence[dict[str, str]] = ()) -> dict[str, Any]:
    """What a manifest says of the photographs that went in, and of those refused.

    Args:
        stats: what became of those that were read.
        listed: refused before they were read.
    """
    refused = [*listed, *stats.refused]
    # What follows a colon is of the one photograph.
    reasons = Counter(refusal["reason"].partition(":")[0] for refusal in refused)
    return {"rows_in": stats.images + len(refused), "refused": refused, "refused_by_reason": dict(reasons)}


STAGE_FUNCTIONS: dict[str, Callable[[Context], dict[str, Any]]] = {
    "extract": _extract,
    "concepts": _concepts,
    "labels": _labels,
    "train": _train,
    "evaluate": _evaluate,
    "report": _report,
    "register": _register,
}
