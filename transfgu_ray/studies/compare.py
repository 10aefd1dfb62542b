"""Comparison of registered versions on the same photographs by the same protocol, on Ray."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.sparse import csr_array

from transfgu_ray.algorithms.scores.label_free import NUM_MEASURED, LabelFreeMeasure, score
from transfgu_ray.algorithms.scores.upsampling import upsample_argmax
from transfgu_ray.config.run import RunConfig
from transfgu_ray.config.sections import RuntimeConfig
from transfgu_ray.datasets.listing import Listing, open_root
from transfgu_ray.datasets.outputs import mark_outputs
from transfgu_ray.datasets.photographs import ImageRef
from transfgu_ray.engine.job import Job
from transfgu_ray.engine.parts import PartStats, decode_labelled, require_some
from transfgu_ray.engine.progress import Progress, Reporter
from transfgu_ray.engine.session import Resources, ray_session
from transfgu_ray.engine.stream import Photo, UnitWorker, stream_units
from transfgu_ray.engine.watchdog import unless_stalled
from transfgu_ray.images import to_working
from transfgu_ray.models.model import load_model, load_model_config
from transfgu_ray.pipeline.inputs import scored_split
from transfgu_ray.pipeline.scoring import Scorer, choose_samples, frame, read_counts, score_photos, token_batches
from transfgu_ray.reports.comparison import (
    best_version,
    comparison_markdown,
    comparison_picture,
    decide,
    scored_rows,
    unscored_row,
)
from transfgu_ray.reports.scores import STAGE_NAMES
from transfgu_ray.storage import Folder
from transfgu_ray.studies.versions import Entry, enter
from transfgu_ray.tracking.client import answering, registry_uri
from transfgu_ray.tracking.registry import Registry
from transfgu_ray.tracking.waiting import told_of_waits

_METHOD = STAGE_NAMES[-1]
_PICTURE = "comparison.png"
_NUM_SHOWN = 6
# A version is timed for at least this long.
_TIMED_SECONDS = 1.0
# Decides, alike for all versions, which photographs are measured and shown.
_SEED = 0


class VersionScorer(Scorer):
    """A scorer of the finished model alone."""

    shown = (_METHOD,)

    def __init__(self, config: RunConfig, run_uri: str, **part: Any) -> None:
        super().__init__(config, run_uri, **part)
        self._model = load_model(Folder(self.run_folder.uri_of("model")), self.device)

    def predict(self, images: list[Image.Image]) -> list[dict[str, np.ndarray]]:
        """Return the mask of each image at the scored size."""
        maps: list[torch.Tensor] = []
        for tokens in token_batches(self._model, images, self.config.evaluate.batch_size):
            maps += self._model.decode(tokens, self._model.config.image_size)
        return [{_METHOD: upsample_argmax(m, self.config.evaluate_image_size).cpu().numpy()} for m in maps]


class VersionMeasurer(UnitWorker):
    """Measures the label-free score and the speed of one version per unit, on the measured photographs."""

    def __init__(
        self, uris: list[str], configs: list[RunConfig], *, has_labels: bool, device: str, threads: int
    ) -> None:
        super().__init__(device, threads)
        self._uris = uris
        self._configs = configs
        self._has_labels = has_labels

    def process(self, unit: int, photos: list[Photo]) -> bytes:
        """Return score, components, speed, and counts and refusals of the photographs, as JSON."""
        config, stats = self._configs[unit], PartStats()
        limits, table = config.data, config.label_table if self._has_labels else None
        decoded = decode_labelled(photos, stats, limits=limits, table=table)
        images = [frame(image, None, config)[0] for _, image, _ in decoded]
        found = self._measure(self._uris[unit], images, config.evaluate.batch_size) if images else {}
        return json.dumps({"stats": vars(stats), **found}).encode()

    def _measure(self, uri: str, images: list[Image.Image], batch_size: int) -> dict[str, Any]:
        model = load_model(Folder(uri), self.device)
        working = np.stack([to_working(image, model.config.image_size, model.config.resample) for image in images])
        measure = LabelFreeMeasure(
            torch.from_numpy(working).to(self.device), model.read_tokens, model.encoder.grid_hw(model.config.image_size)
        )
        components = measure.components(
            lambda tokens, grid_hw: model.decoder(tokens, grid_hw)[0], len(model.config.kinds)
        )
        # The model has run before, so no first call is timed. Few photographs are segmented repeatedly.
        started, seconds, done = time.perf_counter(), 0.0, 0
        while seconds < _TIMED_SECONDS:
            for start in range(0, len(images), batch_size):
                model.segment(images[start : start + batch_size])
            done, seconds = done + len(images), time.perf_counter() - started
        return {
            "score": score(components),
            "components": components,
            "photos_per_second": round(done / seconds, 3),
        }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The versions of a registered model to compare, and the photographs.

    Attributes:
        name: of the model.
        numbers: of the versions, to which the champion is added; empty for all.
        dataset: layout of the photographs; None for the dataset that the versions were made on.
        data: folder or URI of the photographs.
        tracking_uri: of the registry; None for the default.
    """

    name: str
    numbers: Sequence[int]
    dataset: str | None
    data: str
    tracking_uri: str | None


def compare(
    wanted: Comparison,
    out: Folder,
    *,
    address: str | None,
    reporter: Reporter,
    promote: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Score versions of a registered model; write comparison.json, .md and .png and log them to MLflow.

    An interrupted call continues where it stopped: until the end, versions/ in `out` keeps finished work.

    Args:
        wanted: versions and photographs.
        out: receives the results.
        address: Ray to use.
        reporter: shows progress.
        promote: move the alias `champion` to the best version if `decide` says so.
        force: see `decide`.

    Returns:
        Content of comparison.json.

    Raises:
        TransfguError: the model or a version does not exist, versions cannot be compared, or photographs are unusable.
    """
    uri = registry_uri(wanted.tracking_uri)
    with told_of_waits(uri, reporter.note), answering(uri):
        registry = Registry(wanted.name, uri)
        versions = registry.versions(wanted.numbers)
    entries, listing, has_labels = enter(registry, versions, dataset=wanted.dataset, data=wanted.data, out=out)
    measured = _choose(listing.images, NUM_MEASURED)
    num_scored = len(listing.images) if has_labels else min(len(measured), _NUM_SHOWN)
    with (
        reporter.stage("compare", (len(measured) + num_scored) * len(entries), "photographs") as show,
        unless_stalled("the comparison", RuntimeConfig().stall_minutes, show) as progress,
        ray_session(address, RuntimeConfig(), note=reporter.note) as resources,
    ):
        for entry in entries:
            for file, _ in entry.version.model.files():
                entry.model.copy_from(entry.version.model, file)
        found, stats = _measure(entries, measured, has_labels=has_labels, resources=resources, progress=progress)
        refused = {refusal["image_id"] for refusal in stats.refused}
        shown = _choose([image for image in measured if image.image_id not in refused], _NUM_SHOWN)
        counts, scored_stats = _count(
            entries, listing, shown=shown, has_labels=has_labels, resources=resources, progress=progress
        )
    comparison = _content(registry, entries, found=found, counts=counts)
    comparison |= {
        "num_images": scored_stats.images if counts else 0,
        "num_probed": stats.images,
        "device": resources.device,
        "refused": (scored_stats if has_labels else stats).refused,
        "promotion": None,
    }
    with told_of_waits(uri, reporter.note), answering(uri):
        if promote:
            comparison["promotion"] = _promote(registry, comparison, force)
        _write(registry, entries, comparison=comparison, out=out)
    return comparison


def _promote(registry: Registry, comparison: dict[str, Any], force: bool) -> dict[str, Any]:
    """Move the alias `champion` to the best version if `decide` says so; return whether it moved, and why."""
    moves, sentence = decide(comparison, force)
    if moves:
        registry.promote(comparison["best"])
    return {"moved": moves, "sentence": sentence}


def _choose(images: Sequence[ImageRef], count: int) -> list[ImageRef]:
    chosen = set(choose_samples([image.image_id for image in images], count, _SEED))
    return [image for image in images if image.image_id in chosen]


def _measure(
    entries: Sequence[Entry], measured: list[ImageRef], *, has_labels: bool, resources: Resources, progress: Progress
) -> tuple[list[dict[str, Any]], PartStats]:
    """Return label-free score and speed of each version, and counts and refusals of the photographs.

    Raises:
        DataError: none can be read.
    """
    arguments = {
        "uris": [entry.model.uri for entry in entries],
        "configs": [entry.config for entry in entries],
        "has_labels": has_labels,
    }
    found = {}
    root, units = open_root(entries[0].config.data.root), dict.fromkeys(range(len(entries)), measured)
    for result in stream_units(
        root, units, worker=VersionMeasurer, arguments=arguments, resources=resources, progress=progress
    ):
        found[result.unit] = json.loads(result.result)
        progress(len(measured))
    stats = [PartStats(**found[unit].pop("stats")) for unit in units]
    require_some(stats[0], len(measured))
    return [found[unit] for unit in units], stats[0]


def _count(
    entries: Sequence[Entry],
    listing: Listing,
    *,
    shown: list[ImageRef],
    has_labels: bool,
    resources: Resources,
    progress: Progress,
) -> tuple[dict[int, csr_array], PartStats]:
    """Write samples; return each version's confusion matrices and the counts and refusals of the photographs.

    Without labels there are no confusion matrices.

    Raises:
        DataError: none can be scored.
    """
    counts, stats = {}, PartStats()
    root = open_root(entries[0].config.data.root)
    samples = {image.image_id: f"{number:02d}" for number, image in enumerate(shown)}
    for entry in entries:
        job = Job(
            folder=entry.folder,
            config=entry.config,
            root=root,
            resources=resources,
            fingerprint=entry.fingerprint,
            progress=progress,
        )
        stats = score_photos(job, listing.images, samples=samples, scored=has_labels, scorer=VersionScorer).stats
        require_some(stats, len(listing.images))
        num_concepts = len(load_model_config(entry.model).kinds)
        found = read_counts(entry.folder, len(entry.config.class_names), num_concepts)
        if found:
            counts[entry.number] = found[_METHOD]
    return counts, stats


def _content(
    registry: Registry, entries: Sequence[Entry], *, found: Sequence[dict[str, Any]], counts: dict[int, csr_array]
) -> dict[str, Any]:
    config, champion = entries[0].config, registry.champion
    reference = entries[0].number if champion is None else champion
    scores = scored_rows(config, counts, reference) if counts else {}
    rows = []
    for entry, measure in zip(entries, found, strict=True):
        tagged = entry.version.tags.get("score")
        rows.append(
            {
                "version": entry.number,
                "aliases": list(entry.version.aliases),
                "recipe": entry.config.preset,
                "num_concepts": entry.config.num_concepts,
                "weights_sha256": load_model_config(entry.model).weights_sha256,
                "tagged_score": None if tagged is None else float(tagged),
                **measure,
                "megabytes": entry.version.num_bytes / 1e6,
                **scores.get(entry.number, unscored_row()),
            }
        )
    return {
        "model": registry.name,
        "tracking_uri": registry.uri,
        "dataset": config.data.dataset,
        "split": scored_split(config),
        "granularity": config.concepts.granularity,
        "protocol": config.evaluate.protocol,
        "unmatched": config.evaluate.unmatched,
        "scored": bool(counts),
        "champion": champion,
        "reference": reference,
        "best": best_version(rows, champion),
        "versions": rows,
    }


def _write(registry: Registry, entries: Sequence[Entry], *, comparison: dict[str, Any], out: Folder) -> None:
    """Write and log the results, then delete the intermediate work."""
    folders = {entry.number: entry.folder for entry in entries}
    models = {entry.number: load_model_config(entry.model) for entry in entries}
    files = {
        "comparison.json": json.dumps(comparison, indent=1).encode(),
        "comparison.md": comparison_markdown(comparison).encode(),
        _PICTURE: comparison_picture(comparison, folders, models),
    }
    mark_outputs(out, [_PICTURE])
    for file, data in files.items():
        out.write_bytes(file, data)
    registry.log_comparison(entries[0].version.run_id, comparison, files)
    out.delete("versions")
