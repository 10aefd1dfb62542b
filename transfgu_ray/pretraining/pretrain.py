"""Training of an encoder on unlabelled images by DINO under Ray Train, continued where it stopped."""

import dataclasses
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transfgu_ray.algorithms.encoder.checkpoints import random_vit, read_safetensors
from transfgu_ray.algorithms.encoder.vit import Encoder
from transfgu_ray.engine.parts import PartStats, refusals
from transfgu_ray.engine.prefetch import num_readers
from transfgu_ray.engine.progress import Progress, Reporter
from transfgu_ray.engine.session import Resources, ray_session
from transfgu_ray.engine.trainer import read_state, run_training, watched_json
from transfgu_ray.engine.watchdog import unless_stalled
from transfgu_ray.errors import ConfigError, DataError
from transfgu_ray.pretraining.config import PretrainConfig
from transfgu_ray.pretraining.copies import COPIES, open_copies
from transfgu_ray.pretraining.copying import Copying, copy_images
from transfgu_ray.pretraining.folder import HISTORY, LATEST, RESULT, PretrainFolder, training_name
from transfgu_ray.pretraining.loop import build_network, encoder_bytes, pretrain_loop
from transfgu_ray.pretraining.sources import Source, open_source
from transfgu_ray.storage import Folder


@dataclass(frozen=True, kw_only=True)
class _Work:
    """One pretraining in progress.

    Attributes:
        opened: its folder and configuration.
        images: fingerprint of the images.
        fingerprint: of images and settings.
        sources: of the images.
        resources: workers and devices.
        reporter: shows progress.
        started: `time.perf_counter()` at the start.
    """

    opened: PretrainFolder
    images: str
    fingerprint: str
    sources: list[Source]
    resources: Resources
    reporter: Reporter
    started: float

    @property
    def config(self) -> PretrainConfig:
        return self.opened.config

    @property
    def out(self) -> Folder:
        return self.opened.folder


@dataclass(frozen=True)
class _Copied:
    """The finished working copies: counts and refusals, sizes of the two splits, seconds so far."""

    stats: PartStats
    num_train: int
    num_val: int
    seconds: float


def pretrain(
    opened: PretrainFolder, address: str | None, *, reporter: Reporter, overwrite: bool = False
) -> dict[str, Any]:
    """Train an encoder, continuing where an earlier call stopped; return its manifest.

    Raises:
        TransfguError: settings, images or folder are unusable, or the training diverged.
    """
    config, out = opened.config, opened.folder
    sources = open_sources(config)
    images = " ".join(source.fingerprint for source in sources)
    fingerprint = opened.fingerprint(images)
    manifest = opened.finished(fingerprint, overwrite)
    if manifest is not None:
        return manifest
    started = time.perf_counter()
    found = sum(source.num_images(split) for source in sources for split in ("train", "val"))
    check_early(config, sum(source.num_images("train") for source in sources))
    opened.require_space(0 if out.exists(COPIES) else found * 3 * config.data.source_size**2)
    with ray_session(address, config.runtime, note=reporter.note) as resources:
        check_workers(config, resources)
        work = _Work(
            opened=opened,
            images=images,
            fingerprint=fingerprint,
            sources=sources,
            resources=resources,
            reporter=reporter,
            started=started,
        )
        copied = _copy(work, found)
        state = _train(work, copied.num_train)
    return _finish(work, copied, state)


def open_sources(config: PretrainConfig) -> list[Source]:
    """Open the images to train on and those of `data.val_root`, which then are the split val.

    Raises:
        DataError: there are none.
    """
    sources = [open_source(config.data.root, "data.root", "--data")]
    if config.data.val_root is not None:
        sources.append(open_source(config.data.val_root, "data.val_root", "--val"))
        sources[0] = _only(sources[0], "train", "train")
        sources[1] = _only(sources[1], "val" if sources[1].num_images("val") else "train", "val")
    return sources


def _only(source: Source, split: str, renamed: str) -> Source:
    units = tuple(dataclasses.replace(unit, split=renamed) for unit in source.units if unit.split == split)
    return dataclasses.replace(source, units=units)


def check_early(config: PretrainConfig, num_images: int) -> None:
    """Refuse, before anything is computed, settings that cannot succeed.

    Raises:
        ConfigError: a view is not a multiple of the patch, or a batch is larger than the training set.
        WeightsError: the encoder is unknown or not a plain vision transformer.
    """
    vit = random_vit(config.encoder.name, dict(config.encoder.overrides.items()), config.seed)
    patch = Encoder(vit).patch_size
    sizes = {"crops.global_size": config.crops.global_size}
    if config.crops.num_local:
        sizes["crops.local_size"] = config.crops.local_size
    for name, size in sizes.items():
        if size % patch:
            raise ConfigError(
                f"{name} is {size} px, which the encoder's patch of {patch} px does not divide; choose a multiple"
            )
    if config.schedule.batch_size > num_images:
        raise ConfigError(
            f"schedule.batch_size={config.schedule.batch_size} is more than the {num_images} images to train on; "
            "lower it or give more images"
        )


def check_workers(config: PretrainConfig, resources: Resources) -> None:
    """Refuse a batch that the workers cannot share evenly.

    Raises:
        ConfigError: it leaves a remainder.
    """
    if config.schedule.batch_size % resources.train_workers:
        raise ConfigError(
            f"schedule.batch_size={config.schedule.batch_size} must be a multiple of the {resources.train_workers} "
            "Ray Train workers (runtime.train_workers)"
        )


def _copy(work: _Work, num_images: int) -> _Copied:
    """Make the working copies.

    Raises:
        ConfigError: fewer images than one batch are left to train on.
        DataError: fewer than two images can be used.
    """
    data = work.config.data
    settings = [data.source_size, data.min_side_px, data.max_pixels, data.bands]
    key = hashlib.sha256(json.dumps([settings, work.images]).encode()).hexdigest()
    with (
        work.reporter.stage("images", num_images, "images") as show,
        unless_stalled("the copying of images", work.config.runtime.stall_minutes, show) as progress,
    ):
        stats = copy_images(Copying(work.out.uri, data, key), work.sources, resources=work.resources, progress=progress)
    num_train, num_val = _require_enough(work.out, work.config, stats)
    return _Copied(stats, num_train, num_val, time.perf_counter() - work.started)


def _require_enough(out: Folder, config: PretrainConfig, stats: PartStats) -> tuple[int, int]:
    """Return how many images are trained on and how many are held out."""
    if stats.images < 2:
        reason = f"; the first, {stats.refused[0]['image_id']}: {stats.refused[0]['reason']}" if stats.refused else ""
        raise DataError(f"only {stats.images} of {stats.images + len(stats.refused)} images can be used{reason}")
    copies = open_copies(out, config.seed, config.data.num_val)
    if len(copies.train) < config.schedule.batch_size:
        raise ConfigError(
            f"schedule.batch_size={config.schedule.batch_size} is more than the {len(copies.train)} images to train "
            f"on ({len(copies.val)} are held out, {len(stats.refused)} refused); lower it or give more images"
        )
    return len(copies.train), len(copies.val)


def _train(work: _Work, num_train: int) -> dict[str, Any]:
    """Run Ray Train and return the state of the last checkpoint.

    Raises:
        ConfigError: the training diverged.
    """
    config, out, resources = work.config, work.out, work.resources
    name = training_name(work.fingerprint)
    if not out.exists(f"train/{name}"):
        out.delete(HISTORY)
    settings = {
        "out_uri": out.uri,
        "config": config,
        "threads": resources.threads,
        "num_readers": num_readers(resources),
    }
    total_steps = config.schedule.epochs * (num_train // config.schedule.batch_size)
    with (
        work.reporter.stage("train", total_steps, "steps") as show,
        unless_stalled("the training", config.runtime.stall_minutes, show) as progress,
    ):
        known = out.read_json(HISTORY) or {"epochs": []}
        watcher = _Watcher(config, total_steps, epochs=len(known["epochs"]), progress=progress, note=work.reporter.note)
        with watched_json(out, HISTORY, watcher.on_history):
            result = run_training(
                pretrain_loop,
                settings,
                folder=out,
                name=name,
                resources=resources,
                runtime=config.runtime,
                on_sign=watcher.on_progress,
                not_finite="lower dino.learning_rate or raise dino.warmup_frac (the encoder of the last checkpoint, if "
                f"there was one, is {out.uri_of(LATEST)})",
            )
        progress(total_steps - watcher.steps)
    return read_state(result.checkpoint)


class _Watcher:
    """Reports the progress and the history that workers write to files."""

    def __init__(
        self,
        config: PretrainConfig,
        total_steps: int,
        *,
        epochs: int,
        progress: Progress,
        note: Callable[[str], None],
    ) -> None:
        self._config, self._total_steps, self._progress, self._note = config, total_steps, progress, note
        self._epochs, self._rate = epochs, 0.0
        self.steps = 0
        if epochs:
            note(f"continuing after {epochs} of {config.schedule.epochs} epochs")

    def on_progress(self, now: Mapping[str, float]) -> None:
        step = int(now["step"])
        self._rate = now["steps_per_second"]
        # After a failure the steps start again at a checkpoint.
        if step > self.steps:
            self._progress(step - self.steps, f"loss {now['loss']:.3f}")
            self.steps = step

    def on_history(self, history: dict[str, Any]) -> None:
        for row in history["epochs"][self._epochs :]:
            self._note(self._line(row))
            for alarm in row["alarms"]:
                self._note(f"  warning: {alarm}")
        self._epochs = max(self._epochs, len(history["epochs"]))

    def _line(self, row: dict[str, Any]) -> str:
        words = [f"epoch {row['epoch'] + 1}/{self._config.schedule.epochs}: loss {row['loss']:.4f}"]
        words += [quality(row)] if "rank_me" in row else []
        if self._rate:
            left = (self._total_steps - row["step"]) / self._rate
            words.append(f"{self._rate * self._config.schedule.batch_size:.0f} images/s")
            words.append(f"{int(left // 3600)} h {int(left % 3600 // 60):02} min left")
        return ", ".join(words)


def quality(row: dict[str, Any]) -> str:
    """Return k-NN accuracy and RankMe of an epoch as text."""
    words = [f"RankMe {row['rank_me']:.1f}"]
    if "knn_top1" in row:
        words.insert(0, f"k-NN {100 * row['knn_top1']:.2f} % (chance {100 * row['knn_chance']:.2f} %)")
    return ", ".join(words)


def _finish(work: _Work, copied: _Copied, state: dict[str, Any]) -> dict[str, Any]:
    """Write the encoder, drop the working copies, and write the manifest."""
    config, out, stats = work.config, work.out, copied.stats
    network = build_network(config)
    network.load_state_dict(state["dino"]["teacher"])
    last = state["history"]["epochs"][-1]
    images_seen = state["step"] * config.schedule.batch_size
    probed = {name: last[name] for name in ("knn_top1", "knn_chance", "rank_me") if name in last}
    facts = {"images_seen": images_seen, **probed, "data_fingerprint": work.images}
    data = encoder_bytes(network.vit, config, {name: str(value) for name, value in facts.items()})
    out.write_bytes(RESULT, data)
    out.write_json(HISTORY, state["history"])
    out.delete(COPIES)
    return work.opened.write_manifest(
        work.fingerprint,
        {
            **refusals(stats),
            "rows_out": stats.images,
            "images_train": copied.num_train,
            "images_val": copied.num_val,
            "passed_over": dict(sum((Counter(source.passed_over) for source in work.sources), Counter())),
            "epochs": len(state["history"]["epochs"]),
            "steps": state["step"],
            "images_seen": images_seen,
            "seconds": round(state["seconds"] + copied.seconds, 3),
            "images_per_second": round(images_seen / state["seconds"], 3),
            "resumed_at_step": state["resumed_at_step"],
            "peak_memory_mb": state["peak_memory_mb"],
            "train_workers": work.resources.train_workers,
            "device": work.resources.device,
            **{name: last[name] for name in ("loss", "teacher_entropy", "usage_entropy")},
            **probed,
            "alarms": last["alarms"],
            "epochs_with_alarms": sum(bool(row["alarms"]) for row in state["history"]["epochs"]),
            "weights_sha256": read_safetensors(data, RESULT)[1]["weights_sha256"],
            "input_fingerprint": work.images,
        },
    )
