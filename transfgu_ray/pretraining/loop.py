"""The training loop that each Ray Train worker of a pretraining runs."""

import functools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from transfgu_ray.algorithms.dino.distillation import Dino
from transfgu_ray.algorithms.dino.multicrop import MultiCrop
from transfgu_ray.algorithms.dino.network import DinoHead, DinoNetwork, scale_linear_weights
from transfgu_ray.algorithms.dino.probe import collapse_alarms, knn_accuracy, rank_me
from transfgu_ray.algorithms.dino.schedules import DinoRecipe
from transfgu_ray.algorithms.encoder.checkpoints import dump_encoder, normalisation, random_vit
from transfgu_ray.algorithms.rounds.schedule import sample_order
from transfgu_ray.engine.prefetch import read_ahead, to_device
from transfgu_ray.engine.stream import peak_memory_mb
from transfgu_ray.engine.trainer import failures_noted, latest_state, report_state
from transfgu_ray.pretraining.config import PretrainConfig
from transfgu_ray.pretraining.copies import NO_LABEL, Copies, fetch_copies, open_copies, read_copies
from transfgu_ray.pretraining.folder import HISTORY, LATEST, identity
from transfgu_ray.storage import Folder

# Bytes read by one task; at least one batch.
_TASK_BYTES = 8 * 2**20
# Images that k-NN and RankMe use.
_MAX_BANK, _MAX_QUERIES, _PROBE_BATCH = 5000, 5000, 64
# Needed again every few steps of an epoch.
_epoch_order = functools.lru_cache(maxsize=2)(sample_order)


@dataclass(frozen=True)
class Stretch:
    """Steps between two checkpoints.

    Attributes:
        epoch: of the steps.
        first: first step.
        last: one past the last step.
        ends_epoch: whether the epoch ends with it.
    """

    epoch: int
    first: int
    last: int
    ends_epoch: bool


def stretches(epochs: int, epoch_steps: int, *, checkpoint_steps: int | None, start: int) -> Iterator[Stretch]:
    """Yield all stretches from the step `start` on."""
    for epoch in range(epochs):
        end = (epoch + 1) * epoch_steps
        for first in range(epoch * epoch_steps, end, checkpoint_steps or epoch_steps):
            last = min(first + (checkpoint_steps or epoch_steps), end)
            if first >= start:
                yield Stretch(epoch, first, last, last == end)


@dataclass(frozen=True, kw_only=True)
class Share:
    """The images that one worker trains on.

    Attributes:
        copies: all images.
        config: of the pretraining.
        rank: of the worker.
        world_size: number of workers.
    """

    copies: Copies
    config: PretrainConfig
    rank: int
    world_size: int

    def batches(self, out: Folder, steps: range, *, num_readers: int, device: torch.device) -> Iterator[torch.Tensor]:
        """Yield this worker's images for each step, uint8 (b, 3, s, s), in the order given by seed and epoch.

        Args:
            out: folder of the working copies.
            steps: of the training.
            num_readers: number of tasks that read ahead.
            device: receives the images.
        """
        per_worker = self.config.schedule.batch_size // self.world_size
        # Each task reads whole batches.
        stride = max(1, _TASK_BYTES // (3 * self.config.data.source_size**2 * per_worker))
        calls = (
            {"uri": out.uri, "places": self.copies.places(self.rows(steps[first : first + stride]))}
            for first in range(0, len(steps), stride)
        )
        for images in read_ahead(fetch_copies, calls, num_readers):
            for first in range(0, len(images), per_worker):
                yield to_device([images[first : first + per_worker]], device)

    def rows(self, steps: range) -> np.ndarray:
        """Return the index rows of this worker's images, step after step.

        The images left over after the last whole batch of an epoch are not used.
        """
        batch_size, num_images = self.config.schedule.batch_size, len(self.copies.train)
        epoch_steps = num_images // batch_size
        order = []
        for epoch in range(steps.start // epoch_steps, -(-steps.stop // epoch_steps)):
            start = epoch * epoch_steps
            whole = _epoch_order(
                self.config.seed,
                epoch,
                num_images=num_images,
                repeats=1,
                steps=epoch_steps,
                per_worker=batch_size // self.world_size,
                world_size=self.world_size,
            )[self.rank]
            order.append(whole[max(0, steps.start - start) : steps.stop - start])
        rows: np.ndarray = self.copies.train[np.concatenate(order).reshape(-1)]
        return rows


def pretrain_loop(settings: dict[str, Any]) -> None:
    """Train from the last checkpoint on; return at once where another start would only fail again."""
    import ray.train

    sign, rank = settings["sign"], ray.train.get_context().get_world_rank()
    if sign.final_failure() is not None:
        return
    position = [0]
    with failures_noted(sign, rank, lambda: tuple(position)):
        _pretrain(settings, rank, position)


def _pretrain(settings: dict[str, Any], rank: int, position: list[int]) -> None:
    """Train, keeping in `position` the steps done."""
    import ray.train
    from ray.train.torch import get_device

    torch.set_num_threads(settings["threads"])
    out = Folder(settings["out_uri"])
    config: PretrainConfig = settings["config"]
    device, world_size = get_device(), ray.train.get_context().get_world_size()
    copies = open_copies(out, config.seed, config.data.num_val)
    epoch_steps = len(copies.train) // config.schedule.batch_size
    total_steps = config.schedule.epochs * epoch_steps
    dino = _build_dino(config, total_steps, rank=rank, device=device)
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "history": {"epochs": [], "checkpoints": []}}
    if (kept := latest_state(settings["recovered"], rank)) is not None:
        state = kept
        dino.load_state_dict(state["dino"])
    history, start = state["history"], state["step"]
    position[0] = start
    share = Share(copies=copies, config=config, rank=rank, world_size=world_size)
    images = share.batches(out, range(start, total_steps), num_readers=settings["num_readers"], device=device)
    began = time.perf_counter()
    for stretch in stretches(
        config.schedule.epochs, epoch_steps, checkpoint_steps=config.schedule.checkpoint_steps, start=start
    ):
        terms = []
        for step in range(stretch.first, stretch.last):
            terms.append(dino.step(next(images), step))
            position[0] = step + 1
            if rank == 0:
                rate = (step + 1 - start) / (time.perf_counter() - began)
                settings["sign"](step + 1, step=step + 1, loss=terms[-1]["loss"], steps_per_second=rate)
        row = {"step": stretch.last, "epoch": stretch.epoch, **_mean_over_workers(terms, world_size, device)}
        history["checkpoints"].append(row)
        if stretch.ends_epoch:
            probed = _is_probed(stretch.epoch, config) and rank == 0
            history["epochs"].append(
                _epoch_row(history, config, _probe(dino, copies, out=out, config=config) if probed else {})
            )
        kept = None
        if rank == 0:
            seconds = state["seconds"] + time.perf_counter() - began
            reached = {"step": stretch.last, "seconds": seconds, "history": history}
            facts = {"peak_memory_mb": peak_memory_mb(), "resumed_at_step": start}
            kept = {"dino": dino.state_dict(), "position": [stretch.last], **reached, **facts}
        report_state({"step": stretch.last}, kept, rank)
        if rank == 0:
            out.write_bytes(LATEST, encoder_bytes(dino.teacher.vit, config, {"step": str(stretch.last)}))
            out.write_json(HISTORY, history)


def _build_dino(config: PretrainConfig, total_steps: int, *, rank: int, device: torch.device) -> Dino:
    """Build student and teacher of a worker, ready to train under Ray Train."""
    from ray.train.torch import prepare_model

    return Dino(
        build_network(config).to(device),
        DinoRecipe(**config.dino.model_dump()),
        crops=MultiCrop(**config.crops.model_dump()),
        total_steps=total_steps,
        seed=config.seed,
        rank=rank,
        wrap=prepare_model,
    )


def build_network(config: PretrainConfig) -> DinoNetwork:
    """Build backbone and head with weights from the seed."""
    vit = random_vit(config.encoder.name, dict(config.encoder.overrides.items()), config.seed)
    class_token = vit.cls_token
    assert isinstance(class_token, torch.Tensor), "check_early refuses encoders without a class token"
    recipe = config.dino
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        scale_linear_weights(vit)
        # DINO's deviation; with timm's 1e-6, small trainings without position embedding collapsed.
        torch.nn.init.trunc_normal_(class_token, std=0.02)
        head = DinoHead(
            class_token.shape[-1],
            recipe.head_hidden_dim,
            bottleneck_dim=recipe.head_bottleneck_dim,
            num_prototypes=recipe.num_prototypes,
        )
    mean, std = normalisation(vit)
    return DinoNetwork(vit, head, masked=recipe.masked_weight > 0, mean=mean, std=std)


def encoder_bytes(vit: torch.nn.Module, config: PretrainConfig, facts: dict[str, str]) -> bytes:
    """Return the backbone as float16 safetensors with the recipe and `facts` in their metadata."""
    facts = {"trained_by": "transfgu pretrain", "recipe": json.dumps(identity(config)), **facts}
    return dump_encoder(
        vit, config.encoder.name, overrides=dict(config.encoder.overrides.items()), dtype=torch.float16, facts=facts
    )


def _mean_over_workers(terms: list[dict[str, float]], world_size: int, device: torch.device) -> dict[str, float]:
    names = list(terms[0])
    means = torch.tensor([[row[name] for name in names] for row in terms], dtype=torch.float64, device=device).mean(0)
    if world_size > 1:
        torch.distributed.all_reduce(means)
        means /= world_size
    return dict(zip(names, means.tolist(), strict=True))


def _epoch_row(history: dict[str, Any], config: PretrainConfig, probed: dict[str, float]) -> dict[str, Any]:
    """Return the means over the stretches of the last epoch, weighted by their lengths, and what the probe found."""
    epoch = len(history["epochs"])
    ends = [row["step"] for row in history["checkpoints"]]
    rows = [row for row in history["checkpoints"] if row["epoch"] == epoch]
    before = ends[-len(rows) - 1] if len(ends) > len(rows) else 0
    weights = np.diff([before, *(row["step"] for row in rows)])
    names = [name for name in rows[0] if name not in ("step", "epoch")]
    means = {name: float(np.average([row[name] for row in rows], weights=weights)) for name in names}
    alarms = collapse_alarms(
        means["teacher_entropy"],
        means["usage_entropy"],
        num_prototypes=config.dino.num_prototypes,
        rank=probed.get("rank_me"),
    )
    return {"epoch": epoch, "step": ends[-1], **means, **probed, "alarms": alarms}


def _is_probed(epoch: int, config: PretrainConfig) -> bool:
    return (epoch + 1) % config.schedule.probe_epochs == 0 or epoch + 1 == config.schedule.epochs


def _probe(dino: Dino, copies: Copies, *, out: Folder, config: PretrainConfig) -> dict[str, float]:
    """Return RankMe of the validation images and, where there are labels, their k-NN accuracy and chance."""
    rng = np.random.default_rng([config.seed, 2])
    val = np.sort(rng.permutation(copies.val)[:_MAX_QUERIES])
    tokens = _tokens(dino, copies, out=out, rows=val)
    found = {"rank_me": rank_me(tokens)}
    labelled = copies.classes[val] != NO_LABEL
    bank = copies.train[copies.classes[copies.train] != NO_LABEL]
    if labelled.any() and len(bank):
        bank = np.sort(rng.permutation(bank)[:_MAX_BANK])
        truth = torch.from_numpy(copies.classes[val][labelled])
        votes = _tokens(dino, copies, out=out, rows=bank), torch.from_numpy(copies.classes[bank])
        found["knn_top1"] = knn_accuracy(*votes, queries=tokens[torch.from_numpy(labelled)], query_labels=truth)
        found["knn_chance"] = int(truth.bincount().max()) / len(truth)
    return found


def _tokens(dino: Dino, copies: Copies, *, out: Folder, rows: np.ndarray) -> torch.Tensor:
    device = dino.student.mean.device
    parts = []
    for start in range(0, len(rows), _PROBE_BATCH):
        images = torch.from_numpy(read_copies(out, copies.places(rows[start : start + _PROBE_BATCH])))
        parts.append(dino.class_tokens(images.to(device)).cpu())
    return torch.cat(parts)
