"""The training loop of each Ray Train worker: batches, students, checkpoints and label-free measurements."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from transfgu_ray.algorithms.encoder.resnet import Backbone
from transfgu_ray.algorithms.encoder.tokens import read_tokens
from transfgu_ray.algorithms.encoder.vit import Encoder
from transfgu_ray.algorithms.rounds.bootstrap import Bootstrap, BootstrapSettings, mean_terms
from transfgu_ray.algorithms.rounds.schedule import Epoch, sample_order, schedule, steps_per_epoch
from transfgu_ray.algorithms.scores.label_free import NUM_MEASURED, LabelFreeMeasure, agreement, score
from transfgu_ray.config.run import RunConfig
from transfgu_ray.engine.prefetch import read_ahead, to_device
from transfgu_ray.engine.stream import peak_memory_mb
from transfgu_ray.engine.trainer import Pulse, read_state, report_state
from transfgu_ray.errors import DataError
from transfgu_ray.models.model import ModelConfig, build_decoder
from transfgu_ray.models.weights import load_run_backbone, load_run_encoder
from transfgu_ray.pipeline.train_data import bank_image_ids, bank_index, load_train_data, read_photos
from transfgu_ray.storage import Folder

HISTORY = "train/history.json"
# Records epochs with a loss that was NaN or infinite.
STUMBLE = "train/stumble.json"
# Epsilon of the norms in the decoder's blocks (released: torch's default).
NORM_EPS = 1e-5
# Samples per reading task; limits the output of a task to tens of MB at K = 171.
_CROPS_PER_TASK = 32


def epoch_steps(config: RunConfig, num_images: int, world_size: int) -> tuple[int, int]:
    """Return (steps, images per worker and step) of an epoch; see `steps_per_epoch`."""
    train = config.train
    visits = num_images * train.epoch_repeats
    return steps_per_epoch(visits, train.batch_size, world_size=world_size, last_batch=train.last_batch)


def model_config(config: RunConfig, kinds: list[str], weights_sha256: str) -> ModelConfig:
    """Return the configuration of the finished model."""
    return ModelConfig(
        image_size=config.inference_size,
        kinds=(*kinds, "none") if config.has_background else tuple(kinds),
        decoder_layers=config.train.decoder_layers,
        decoder_heads=config.train.decoder_heads,
        precision=config.encoder.precision,
        weights_sha256=weights_sha256,
        token_window=config.train.token_window,
        decoder=config.train.decoder,
        backbone=config.train.backbone,
        norm_eps=NORM_EPS,
        qkv_bias=False,
        resample=config.data.resample,
    )


def train_loop(settings: dict[str, Any]) -> None:
    """Train; this function runs in each Ray Train worker."""
    import ray.train
    import ray.train.torch

    torch.set_num_threads(settings["threads"])
    config: RunConfig = settings["config"]
    run_folder = Folder(settings["run_uri"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    encoder = load_run_encoder(run_folder, config.encoder.precision, str(device))
    reads_backbone = settings["sibling"] is not None or config.train.features == "live"
    backbone = load_run_backbone(run_folder, config, str(device)) if reads_backbone else None
    model: ModelConfig = settings["model"]
    checkpoint = ray.train.get_checkpoint()
    state: dict[str, Any] = {"history": []} if checkpoint is None else read_state(checkpoint, device)
    history: list[dict[str, float]] = state["history"]
    resumed_at_epoch = len(history)
    train = config.train
    epochs = schedule(config.whole_rounds, train.alpha, train.alpha_schedule)[resumed_at_epoch:]
    feed = {
        "epochs": epochs,
        "rank": rank,
        "world_size": world_size,
        "grid_hw": encoder.grid_hw(config.train_crop_size),
        "num_readers": settings["num_readers"],
        "device": device,
    }

    def new_learner(name: str, of: dict[str, Any]) -> _Learner:
        own, folder = of["config"], Folder(of["run_uri"])
        bootstrap = _new_bootstrap(own, model, encoder)
        if name in state:
            bootstrap.load_state_dict(state[name])
        return _Learner(bootstrap, bank_index(folder), run_folder=folder, config=own, feed=feed)

    learners = {"bootstrap": new_learner("bootstrap", settings)}
    if settings["sibling"] is not None:
        learners["sibling"] = new_learner("sibling", settings["sibling"])
    students = [learner.bootstrap.student for learner in learners.values()]
    measure = (
        _new_measure(run_folder, config, model=model, encoder=encoder, backbone=backbone)
        if len(students) > 1 and rank == 0
        else None
    )
    _stop_after_second_stumble(run_folder)
    pulse = Pulse(run_folder) if rank == 0 else lambda **_: None
    for epoch in epochs:
        try:
            terms, *_ = [
                learner.learn(epoch, rank, encoder=encoder, backbone=backbone, pulse=pulse)
                for learner in learners.values()
            ]
        except FloatingPointError as error:
            _stumble(run_folder, str(error))
            raise
        measured = {} if measure is None else _measure(measure, students, num_classes=len(model.kinds))
        history.append({"epoch": epoch.index, "round": epoch.round, "alpha": epoch.alpha, **terms, **measured})
        kept = None
        if rank == 0:
            facts = {"peak_memory_mb": peak_memory_mb(), "resumed_at_epoch": resumed_at_epoch}
            of_students = {name: learner.bootstrap.state_dict() for name, learner in learners.items()}
            kept = {**of_students, "history": history, **facts}
        report_state(history[-1], kept)
        if rank == 0:
            run_folder.write_json(HISTORY, history)


def _stumble(run_folder: Folder, words: str) -> None:
    """Record a loss that is NaN or infinite, to be found when Ray Train restarts from the last checkpoint."""
    times = (run_folder.read_json(STUMBLE) or {"times": 0})["times"]
    run_folder.write_json(STUMBLE, {"words": words, "times": times + 1})


def _stop_after_second_stumble(run_folder: Folder) -> None:
    """Refuse to continue after a second stumble: a machine fault passes, one in data or settings repeats.

    Raises:
        DataError: a loss was NaN or infinite, and again after a restart.
    """
    stumble = run_folder.read_json(STUMBLE) or {"times": 0}
    if stumble["times"] > 1:
        # If the user runs the command again despite the error, it gets another try.
        run_folder.delete(STUMBLE)
        raise DataError(
            f"{stumble['words']}, and again after a restart from the last checkpoint; lower train.learning_rate, or "
            "check these photographs"
        )


class _Learner:
    """A student and the batches of the bank that it learns from."""

    def __init__(
        self, bootstrap: Bootstrap, index: pa.Table, *, run_folder: Folder, config: RunConfig, feed: dict[str, Any]
    ):
        self.bootstrap = bootstrap
        self._token_window = config.train.token_window
        self._run_folder, self._seed = run_folder, config.seed
        repeats = config.train.epoch_repeats
        self._steps, per_worker = epoch_steps(config, len(index), feed["world_size"])
        self._order = {
            "num_images": len(index),
            "repeats": repeats,
            "steps": self._steps,
            "per_worker": per_worker,
            "world_size": feed["world_size"],
        }
        self._batches = _batches(index, run_folder.uri, config=config, **feed)

    def learn(
        self,
        epoch: Epoch,
        rank: int,
        *,
        encoder: Encoder,
        backbone: Backbone | None,
        pulse: Callable[..., None],
    ) -> dict[str, float]:
        """Train for one epoch; return the mean of each loss term.

        Raises:
            FloatingPointError: a loss is NaN or infinite; the message names the photographs of the batch.
        """
        self.bootstrap.begin_epoch(epoch, rank)
        terms = []
        for step, batch in enumerate(itertools.islice(self._batches, self._steps)):
            tokens = _tokens(batch, encoder, token_window=self._token_window, backbone=backbone)
            try:
                terms.append(self.bootstrap.step(tokens, batch["scores"], epoch=epoch, step=step))
            except FloatingPointError as error:
                raise FloatingPointError(f"{error}, on {', '.join(self._photos_of(epoch, rank, step))}") from None
            pulse(epoch=epoch.index, step=step)
        return mean_terms(terms)

    def _photos_of(self, epoch: Epoch, rank: int, step: int) -> list[str]:
        order = sample_order(self._seed, epoch.index, **self._order)[rank, step]
        names = bank_image_ids(self._run_folder)
        return sorted({names[place] for place in order})


def _new_measure(
    run_folder: Folder, config: RunConfig, *, model: ModelConfig, encoder: Encoder, backbone: Backbone | None
) -> LabelFreeMeasure:
    """Return the label-free measure, on photographs of the bank that are the same in every trial."""
    index = bank_index(run_folder)
    chosen = np.sort(np.random.default_rng(0).permutation(len(index))[:NUM_MEASURED])
    photos = read_photos(index.take(pa.array(chosen)), run_folder, config=config, size=model.image_size)
    return LabelFreeMeasure(
        torch.from_numpy(photos).to(encoder.device),
        lambda images: read_tokens(encoder, images, window=model.token_window, backbone=backbone),
        encoder.grid_hw(model.image_size),
    )


def _measure(measure: LabelFreeMeasure, students: Sequence[nn.Module], *, num_classes: int) -> dict[str, float]:
    """Score the student without labels; return each component and the score."""
    decoders = [lambda tokens, grid_hw, of=of.eval(): of(tokens, grid_hw)[0] for of in students]
    student, sibling = map(measure.labels, decoders)
    components = {
        "agreement": agreement(student, sibling, num_classes=num_classes),
        **measure.components(decoders[0], num_classes),
    }
    return components | {"score": score(components)}


def _new_bootstrap(config: RunConfig, model_config: ModelConfig, encoder: Encoder) -> Bootstrap:
    from ray.train.torch import prepare_model

    torch.manual_seed(config.seed)
    return Bootstrap(new_student(config, model_config, encoder), bootstrap_settings(config), wrap=prepare_model)


def new_student(config: RunConfig, model_config: ModelConfig, encoder: Encoder) -> nn.Module:
    """Return the student of a run with its initial weights, on the encoder's device."""
    train = config.train
    student = build_decoder(model_config, encoder.embed_dim, dropout=train.dropout, class_init=train.class_init)
    return student.to(encoder.device)


def bootstrap_settings(config: RunConfig) -> BootstrapSettings:
    """Return the settings with which a student of the run learns."""
    train = config.train
    return BootstrapSettings(
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        gradient_clamp=train.gradient_clamp,
        omega_1=train.omega_1,
        omega_2=train.omega_2,
        seed=config.seed,
        diversity=train.diversity,
        round_0=train.round_0,
        foreground_above=config.cam.background_threshold if train.uncertainty == "foreground" else None,
    )


def _tokens(
    batch: dict[str, torch.Tensor], encoder: Encoder, *, token_window: int | None, backbone: Backbone | None
) -> torch.Tensor:
    """Return the decoder's input for a batch: its cached tokens, or those of its images."""
    if "tokens" in batch:
        return batch["tokens"].float()
    return read_tokens(encoder, batch["image"], window=token_window, backbone=backbone)


def _batches(
    index: pa.Table,
    run_uri: str,
    *,
    config: RunConfig,
    epochs: list[Epoch],
    rank: int,
    world_size: int,
    grid_hw: tuple[int, int],
    num_readers: int,
    device: torch.device,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield this worker's batches of every epoch, one epoch after the other, in the order set by seed and epoch."""
    repeats = config.train.epoch_repeats
    steps, per_worker = epoch_steps(config, len(index), world_size)
    # A batch comes from one task or several.
    slices = [slice(start, start + _CROPS_PER_TASK) for start in range(0, per_worker, _CROPS_PER_TASK)]

    def calls() -> Iterator[dict[str, Any]]:
        for epoch in epochs:
            order = sample_order(
                config.seed,
                epoch.index,
                num_images=len(index),
                repeats=repeats,
                steps=steps,
                per_worker=per_worker,
                world_size=world_size,
            )[rank]
            # The position distinguishes repeated visits of an image within an epoch.
            position = np.arange(order.size).reshape(order.shape) * world_size + rank
            for step, part in itertools.product(range(steps), slices):
                places = index.take(pa.array(order[step, part]))
                yield {
                    "places": places,
                    "positions": position[step, part],
                    "step": step,
                    "run_uri": run_uri,
                    "config": config,
                    "epoch": epoch.index,
                    "grid_hw": grid_hw,
                }

    samples = read_ahead(load_train_data, calls(), num_readers)
    while parts := list(itertools.islice(samples, len(slices))):
        yield {name: to_device([part[name] for part in parts], device) for name in parts[0]}
