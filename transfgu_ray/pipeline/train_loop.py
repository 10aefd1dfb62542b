"""The training loop of each Ray Train worker: batches, students, checkpoints and label-free measurements."""

import itertools
import time
from collections.abc import Iterator, Sequence
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
from transfgu_ray.engine.trainer import failures_noted, latest_state, report_state
from transfgu_ray.models.model import ModelConfig, build_decoder
from transfgu_ray.models.weights import load_run_backbone, load_run_encoder
from transfgu_ray.pipeline.train_data import TOKENS, bank_image_ids, load_train_data, read_photos, sample_index
from transfgu_ray.runs.references import RunFiles
from transfgu_ray.storage import Folder

HISTORY = "train/history.json"
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
        bands=config.data.bands,
    )


def train_loop(settings: dict[str, Any]) -> None:
    """Train; this function runs in each Ray Train worker. It returns at once where another start would only fail."""
    import ray.train

    context, sign = ray.train.get_context(), settings["sign"]
    # All workers must agree, and what ended the last start was known before this one.
    if sign.final_failure() is not None:
        return
    torch.set_num_threads(settings["threads"])
    training = _Training(settings, context.get_world_rank(), context.get_world_size())
    with failures_noted(sign, training.rank, lambda: training.position):
        training.start()
        training.run()


class _Training:
    """One start of a worker: what it reads, its students, and how far they are."""

    def __init__(self, settings: dict[str, Any], rank: int, world_size: int) -> None:
        self.rank, self._world_size = rank, world_size
        self._settings, self._sign = settings, settings["sign"]
        self._config: RunConfig = settings["config"]
        self._run_folder = Folder(settings["run_uri"])
        self._history: list[dict[str, float]] = []
        self._learners: dict[str, _Learner] = {}
        self._started_at = (0, 0)
        self._saved_at = time.monotonic()

    @property
    def position(self) -> tuple[int, int]:
        """Return the epochs that are finished, and the steps of all students in the one after them."""
        return len(self._history), sum(learner.done for learner in self._learners.values())

    def start(self) -> None:
        """Load encoder, students and places of photographs, and go on from the last checkpoint."""
        import ray.train.torch

        settings, config = self._settings, self._config
        self._device = ray.train.torch.get_device()
        self._encoder = load_run_encoder(self._run_folder, config.encoder.precision, str(self._device))
        reads_backbone = settings["sibling"] is not None or config.train.features == "live"
        self._backbone = load_run_backbone(self._run_folder, config, str(self._device)) if reads_backbone else None
        state = latest_state(settings["recovered"], self.rank, self._device) or {}
        self._history = state.get("history", [])
        self._learners = {"bootstrap": self._new_learner("bootstrap", settings, state)}
        if settings["sibling"] is not None:
            self._learners["sibling"] = self._new_learner("sibling", settings["sibling"], state)
        self._started_at = self.position
        is_measured = len(self._learners) > 1 and self.rank == 0
        self._measure = (
            _new_measure(
                self._run_folder, config, model=settings["model"], encoder=self._encoder, backbone=self._backbone
            )
            if is_measured
            else None
        )

    def _new_learner(self, name: str, of: dict[str, Any], state: dict[str, Any]) -> "_Learner":
        config, folder = of["config"], Folder(of["run_uri"])
        learner = _Learner(
            _new_bootstrap(config, self._settings["model"], self._encoder),
            sample_index(folder, config),
            run_folder=folder,
            config=config,
            rank=self.rank,
            world_size=self._world_size,
        )
        if name in state:
            own = (state["own"] or {}).get(name)
            learner.load_state_dict(state[name], own)
        learner.read(
            self._epochs_left(),
            grid_hw=self._encoder.grid_hw(config.train_crop_size),
            num_readers=self._settings["num_readers"],
            device=self._device,
        )
        return learner

    def _alive(self, number: int) -> None:
        """Give a sign of life while starting, which counts the first time only."""
        self._sign(0, 0, -1, number)

    def _epochs_left(self) -> list[Epoch]:
        train = self._config.train
        return schedule(self._config.whole_rounds, train.alpha, train.alpha_schedule)[len(self._history) :]

    def run(self) -> None:
        """Train to the end of the last epoch."""
        for epoch in self._epochs_left():
            for learner in self._learners.values():
                for _ in learner.learn(epoch, encoder=self._encoder, backbone=self._backbone):
                    self._sign(*self.position)
                    if self._is_due():
                        self._save({"epoch": epoch.index, "step": learner.done})
            measured = self._measured()
            terms = self._learners["bootstrap"].mean_terms()
            row = {"epoch": epoch.index, "round": epoch.round, "alpha": epoch.alpha, **terms, **measured}
            self._history.append(row)
            for learner in self._learners.values():
                learner.end_epoch()
            self._save(row)
            if self.rank == 0:
                self._run_folder.write_json(HISTORY, self._history)

    def _measured(self) -> dict[str, float]:
        if self._measure is None:
            return {}
        students = [learner.bootstrap.student for learner in self._learners.values()]
        return _measure(self._measure, students, num_classes=len(self._settings["model"].kinds))

    def _is_due(self) -> bool:
        """Return whether a checkpoint is due by the first worker's clock."""
        is_due = time.monotonic() - self._saved_at >= 60 * self._config.train.checkpoint_minutes
        if self._world_size == 1:
            return is_due
        told = torch.tensor(is_due, device=self._device, dtype=torch.uint8)
        torch.distributed.broadcast(told, 0)
        return bool(told.item())

    def _save(self, row: dict[str, float]) -> None:
        """Report numbers, with a checkpoint from which training goes on as if it had never stopped."""
        kept = None
        if self.rank == 0:
            epoch, step = self._started_at
            facts = {"peak_memory_mb": peak_memory_mb(), "resumed_at_epoch": epoch, "resumed_at_step": step}
            of_students = {name: learner.state_dict() for name, learner in self._learners.items()}
            kept = {**of_students, "history": self._history, "position": list(self.position), **facts}
        own = {name: learner.own_state() for name, learner in self._learners.items()}
        report_state(row, kept, self.rank, own)
        self._saved_at = time.monotonic()


class _Learner:
    """A student, the batches of the bank that it learns from, and how far it is in its epoch.

    Attributes:
        bootstrap: the student with its teacher and optimiser.
        done: steps of the current epoch.
    """

    def __init__(
        self,
        bootstrap: Bootstrap,
        index: pa.Table,
        *,
        run_folder: Folder,
        config: RunConfig,
        rank: int,
        world_size: int,
    ) -> None:
        self.bootstrap = bootstrap
        self.done = 0
        self._index, self._run_folder, self._config = index, run_folder, config
        self._rank, self._world_size = rank, world_size
        self._steps, self._per_worker = epoch_steps(config, len(index), world_size)
        self._terms: list[dict[str, float]] = []
        self._rng: torch.Tensor | None = None

    def read(self, epochs: list[Epoch], *, grid_hw: tuple[int, int], num_readers: int, device: torch.device) -> None:
        """Begin to read the batches of the epochs that are left."""
        self._batches = _batches(
            self._index,
            self._run_folder.uri,
            config=self._config,
            epochs=epochs,
            rank=self._rank,
            world_size=self._world_size,
            grid_hw=grid_hw,
            num_readers=num_readers,
            device=device,
            first_step=self.done,
        )

    def learn(self, epoch: Epoch, *, encoder: Encoder, backbone: Backbone | None) -> Iterator[int]:
        """Train to the end of the epoch, yielding after each step.

        Raises:
            FloatingPointError: a loss is NaN or infinite; the message names the photographs of the batch.
        """
        self.bootstrap.begin_epoch(epoch, self._rank, self.done)
        if self._rng is not None:
            _set_rng(self._rng, encoder.device)
            self._rng = None
        for step, batch in enumerate(itertools.islice(self._batches, self._steps - self.done), self.done):
            tokens = _tokens(batch, encoder, token_window=self._config.train.token_window, backbone=backbone)
            try:
                self._terms.append(self.bootstrap.step(tokens, batch["scores"], epoch=epoch, step=step))
            except FloatingPointError as error:
                raise FloatingPointError(f"{error}, on {', '.join(self._photos_of(epoch, step))}") from None
            self.done = step + 1
            yield step

    def mean_terms(self) -> dict[str, float]:
        """Return the mean of each loss term over the epoch so far."""
        return mean_terms(self._terms)

    def end_epoch(self) -> None:
        """Begin to count anew."""
        self.done, self._terms = 0, []

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the first worker needs to go on, and that is the same on all workers."""
        return {
            "bootstrap": self.bootstrap.state_dict(),
            "done": self.done,
            "photographs": self.done * self._per_worker * self._world_size,
            "terms": self._terms,
        }

    def own_state(self) -> torch.Tensor:
        """Return the state of this worker's generator, from which dropout is drawn."""
        device = next(self.bootstrap.student.parameters()).device
        return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()

    def load_state_dict(self, state: dict[str, Any], own: torch.Tensor | None) -> None:
        """Go on from `state_dict` and `own_state`.

        With another number of workers an epoch has other steps: it goes on after as many photographs, with generators
        seeded anew.
        """
        self.bootstrap.load_state_dict(state["bootstrap"])
        self.done, self._terms = state["done"], state["terms"]
        # An epoch seeds the generator when it begins.
        self._rng = own if self.done else None
        if state["done"] * self._per_worker * self._world_size != state["photographs"]:
            self.done = min(state["photographs"] // (self._per_worker * self._world_size), self._steps)
            self._rng = None

    def _photos_of(self, epoch: Epoch, step: int) -> list[str]:
        order = sample_order(
            self._config.seed,
            epoch.index,
            num_images=len(self._index),
            repeats=self._config.train.epoch_repeats,
            steps=self._steps,
            per_worker=self._per_worker,
            world_size=self._world_size,
        )[self._rank, step]
        names = bank_image_ids(self._run_folder)
        return sorted({names[place] for place in order})


def _set_rng(state: torch.Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def _new_measure(
    run_folder: Folder, config: RunConfig, *, model: ModelConfig, encoder: Encoder, backbone: Backbone | None
) -> LabelFreeMeasure:
    """Return the label-free measure, on photographs of the bank that are the same in every trial."""
    index = sample_index(run_folder, config)
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
    first_step: int = 0,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield this worker's batches of every epoch, one epoch after the other, in the order set by seed and epoch.

    The first epoch begins at `first_step`.
    """
    repeats = config.train.epoch_repeats
    steps, per_worker = epoch_steps(config, len(index), world_size)
    files = RunFiles(Folder(run_uri))
    tables = {"bank_uri": files.folder_of("labels").uri, "tokens_uri": files.folder_of(TOKENS).uri}
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
            begun = first_step if epoch is epochs[0] else 0
            for step, part in itertools.product(range(begun, steps), slices):
                yield {
                    "places": index.take(pa.array(order[step, part])),
                    "positions": position[step, part],
                    "step": step,
                    **tables,
                    "config": config,
                    "epoch": epoch.index,
                    "grid_hw": grid_hw,
                }

    samples = read_ahead(load_train_data, calls(), num_readers)
    while parts := list(itertools.islice(samples, len(slices))):
        yield {name: to_device([part[name] for part in parts], device) for name in parts[0]}
