"""Order and records of the workers of a pretraining by hand, and a killed pretraining against a bare loop."""

import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.builders import make_table
from tests.fixtures import Silent, transfgu
from tests.pipeline.test_tables import wait_for
from transfgu_ray.algorithms.dino.distillation import Dino
from transfgu_ray.algorithms.dino.multicrop import MultiCrop
from transfgu_ray.algorithms.dino.probe import knn_accuracy, rank_me
from transfgu_ray.algorithms.dino.schedules import DinoRecipe
from transfgu_ray.algorithms.encoder.checkpoints import load_encoder, read_safetensors
from transfgu_ray.algorithms.rounds.schedule import sample_order
from transfgu_ray.config.run import build_config
from transfgu_ray.errors import ArtifactError, ConfigError
from transfgu_ray.pretraining.config import PretrainConfig
from transfgu_ray.pretraining.copies import Copies, build_index
from transfgu_ray.pretraining.folder import PretrainFolder
from transfgu_ray.pretraining.loop import Share, Stretch, _epoch_row, build_network, stretches
from transfgu_ray.pretraining.presets import get_pretrain_preset
from transfgu_ray.pretraining.pretrain import _Watcher, check_early, open_sources, pretrain

TINY = (
    "encoder.overrides={embed_dim: 24, depth: 2, num_heads: 3, patch_size: 8, img_size: 32}",
    "data.source_size=32",
    "crops={global_size: 32, local_size: 16, num_local: 2}",
    "dino={num_prototypes: 16, head_hidden_dim: 16, head_bottleneck_dim: 8}",
    "schedule={epochs: 8, batch_size: 12, checkpoint_steps: 2}",
)
EPOCHS, BATCH = 8, 12


def config(*settings: str) -> PretrainConfig:
    return build_config(get_pretrain_preset("small_photos"), None, [*TINY, *settings])


def test_stretches__end_at_checkpoints_and_at_epochs() -> None:
    assert list(stretches(2, 3, checkpoint_steps=2, start=0)) == [
        Stretch(0, 0, 2, False),
        Stretch(0, 2, 3, True),
        Stretch(1, 3, 5, False),
        Stretch(1, 5, 6, True),
    ]
    assert list(stretches(2, 3, checkpoint_steps=2, start=3)) == list(stretches(2, 3, checkpoint_steps=2, start=0))[2:]
    assert list(stretches(2, 3, checkpoint_steps=None, start=3)) == [Stretch(1, 3, 6, True)]
    assert list(stretches(2, 3, checkpoint_steps=2, start=6)) == []


def make_copies(num_images: int) -> Copies:
    row = {"split": "train", "label": None, "file": "a", "row": 0}
    index = build_index([{"image_id": str(i), **row} for i in range(num_images)])
    rows = np.arange(num_images)
    # The first three rows are never trained on.
    return Copies(index, rows[3:], rows[:3], np.zeros(num_images, dtype=np.int64))


def rows(copies: Copies, settings: PretrainConfig, steps: range, *, rank: int, world_size: int) -> np.ndarray:
    return Share(copies=copies, config=settings, rank=rank, world_size=world_size).rows(steps)


def test_rows__workers_share_each_batch_of_a_permutation() -> None:
    copies, settings = make_copies(33), config("schedule.batch_size=8")
    ranks = [rows(copies, settings, range(6), rank=rank, world_size=2).reshape(6, 4) for rank in (0, 1)]
    batches = np.concatenate(ranks, 1)
    for epoch in (batches[:3], batches[3:]):
        assert len(set(epoch.flatten())) == 24, "no image twice"
        assert epoch.min() >= 3
    assert not np.array_equal(batches[:3], batches[3:])
    alone = rows(copies, settings, range(6), rank=0, world_size=1).reshape(6, 8)
    np.testing.assert_array_equal(np.sort(alone), np.sort(batches))


@pytest.mark.parametrize("first", range(6))
def test_rows__are_the_same_from_any_step_on(first: int) -> None:
    copies, settings = make_copies(33), config("schedule.batch_size=8")
    whole = rows(copies, settings, range(6), rank=1, world_size=2).reshape(6, 4)
    for last in range(first + 1, 7):
        np.testing.assert_array_equal(
            rows(copies, settings, range(first, last), rank=1, world_size=2).reshape(-1, 4), whole[first:last]
        )


def test_epoch_row__weighs_stretches_by_their_length() -> None:
    entropies = {"teacher_entropy": 1.0, "usage_entropy": 2.0}
    checkpoints = [
        {"step": 3, "epoch": 0, "loss": 9.0, **entropies},
        {"step": 5, "epoch": 1, "loss": 1.0, **entropies},
        {"step": 6, "epoch": 1, "loss": 4.0, **entropies},
    ]
    row = _epoch_row({"checkpoints": checkpoints, "epochs": [{}]}, config(), {"rank_me": 1.5})
    assert (row["epoch"], row["step"], row["loss"], row["rank_me"]) == (1, 6, 2.0, 1.5)
    assert row["alarms"] == ["all images have nearly the same embedding (RankMe 1.5)"]


def test_watcher__reports_each_epoch_once_with_its_alarms() -> None:
    notes: list[str] = []
    done: list[int] = []
    watcher = _Watcher(config(), 9, epochs=1, progress=lambda more, words="": done.append(more), note=notes.append)
    rows = [
        {"epoch": 0, "step": 3, "loss": 2.0, "alarms": []},
        {"epoch": 1, "step": 6, "loss": 1.5, "alarms": ["collapsed"], "rank_me": 8.0},
    ]
    rows[1] |= {"knn_top1": 0.5, "knn_chance": 0.25}
    watcher.on_history({"epochs": rows[:1]})
    watcher.on_progress({"step": 6, "loss": 1.5, "steps_per_second": 1 / 1100})
    watcher.on_history({"epochs": rows})
    # A worker died and continues from an older checkpoint.
    watcher.on_progress({"step": 4, "loss": 1.6, "steps_per_second": 1 / 1100})
    watcher.on_history({"epochs": rows[:1]})
    watcher.on_history({"epochs": rows})
    assert notes == [
        "continuing after 1 of 8 epochs",
        "epoch 2/8: loss 1.5000, k-NN 50.00 % (chance 25.00 %), RankMe 8.0, 0 images/s, 0 h 55 min left",
        "  warning: collapsed",
    ]
    assert done == [6]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("crops.global_size=30", r"crops\.global_size is 30 px, which the encoder's patch of 8 px does not divide"),
        ("crops.local_size=12", r"crops\.local_size is 12 px"),
        ("schedule.batch_size=41", r"schedule\.batch_size=41 is more than the 40 images to train on"),
    ],
)
def test_check_early__refuses(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_early(config(setting), 40)


def test_open_sources__val_root_replaces_the_tables_own(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        make_table(tmp_path / folder / "train-0.parquet", 5)
        make_table(tmp_path / folder / "val-0.parquet", 2)
    named = config(f"data.root={tmp_path / 'one'}", f"data.val_root={tmp_path / 'two'}")
    assert [(s.num_images("train"), s.num_images("val")) for s in open_sources(named)] == [(5, 0), (0, 2)]
    table = config(f"data.root={tmp_path / 'one'}", f"data.val_root={tmp_path / 'two' / 'train-0.parquet'}")
    assert [(s.num_images("train"), s.num_images("val")) for s in open_sources(table)] == [(5, 0), (0, 5)]


@pytest.mark.slow
@pytest.mark.ray
def test_pretrain__killed_and_continued_equals_a_bare_loop(tmp_path: Path, local_ray: None) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    make_table(data / "train-0.parquet", 40, row_group_size=9)
    make_table(data / "val-0.parquet", 8, seed=1)
    broken = pa.table({"path": ["x.png"], "bytes": [b"no picture"], "label": [0], "mask": [None]})
    whole = pq.read_table(data / "train-0.parquet")
    pq.write_table(pa.concat_tables([whole, broken.cast(whole.schema)]), data / "train-0.parquet")
    settings = [word for setting in TINY for word in ("--set", setting)]
    command = ("pretrain", str(out), "--data", str(data), "--preset", "small_photos", *settings)
    process = transfgu(*command)
    wait_for(out, "train/dino-*/checkpoint_manager_snapshot.json", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "pretrain.json").exists()

    reporter = Reporter()
    named = config(f"data.root={data}")
    manifest = pretrain(PretrainFolder.open(str(out), named, False), None, reporter=reporter)
    history = json.loads((out / "history.json").read_bytes())
    assert 0 < manifest["resumed_at_step"] < EPOCHS * (40 // BATCH)
    assert [row["step"] for row in history["checkpoints"]][:5] == [2, 3, 5, 6, 8]
    expected, teacher = bare_loop(named, data)
    for row, want in zip(history["epochs"], expected, strict=True):
        assert {name: row.get(name) for name in want} == pytest.approx(want, rel=1e-6)
    encoder = load_encoder((out / "encoder.safetensors").read_bytes(), "encoder")
    for name, value in encoder.vit.state_dict().items():
        torch.testing.assert_close(value, teacher[name].half().float(), atol=1e-6, rtol=1e-3)
    assert encoder.cls_tokens(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 24)

    assert [refusal["image_id"] for refusal in manifest["refused"]] == ["x.png"]
    assert (manifest["rows_in"], manifest["rows_out"]) == (49, 48)
    assert (manifest["images_train"], manifest["images_val"], manifest["images_seen"]) == (40, 8, 288)
    assert manifest["knn_top1"] == history["epochs"][-1]["knn_top1"]
    assert reporter.done["images"] == 49
    assert reporter.done["train"] == 24
    assert reporter.notes[-1].startswith("epoch 8/8: loss ")
    assert not (out / "images").exists()
    metadata = read_safetensors((out / "encoder.safetensors").read_bytes(), "")[1]
    assert metadata["images_seen"] == "288"
    assert json.loads(metadata["recipe"])["schedule"]["epochs"] == EPOCHS
    assert metadata["weights_sha256"] == manifest["weights_sha256"]

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert pretrain(PretrainFolder.open(str(out), named, False), None, reporter=Reporter()) == manifest
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    make_table(data / "train-0.parquet", 41)
    with pytest.raises(ArtifactError, match="other settings or images"):
        pretrain(PretrainFolder.open(str(out), named, False), None, reporter=Reporter())


class Reporter(Silent):
    """Remembers notes too."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def bare_loop(named: PretrainConfig, data: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """The same training without Ray, copies or checkpoints: epochs of the history, and the teacher's weights."""
    pixels, labels = {}, {}
    for split in ("train", "val"):
        rows = pq.read_table(data / f"{split}-0.parquet").to_pylist()[:40]
        resized = [Image.open(io.BytesIO(row["bytes"])).resize((32, 32), Image.Resampling.BICUBIC) for row in rows]
        pixels[split] = torch.from_numpy(np.stack([np.asarray(image).transpose(2, 0, 1) for image in resized]))
        labels[split] = torch.tensor([row["label"] for row in rows])
    steps = 40 // BATCH
    recipe, crops = DinoRecipe(**named.dino.model_dump()), MultiCrop(**named.crops.model_dump())
    dino = Dino(build_network(named), recipe, crops=crops, total_steps=EPOCHS * steps, seed=named.seed)
    history = []
    for epoch in range(EPOCHS):
        order = sample_order(named.seed, epoch, num_images=40, repeats=1, steps=steps, per_worker=BATCH, world_size=1)[
            0
        ]
        terms = [dino.step(pixels["train"][order[i]], epoch * steps + i) for i in range(steps)]
        row: dict[str, Any] = {name: float(np.mean([term[name] for term in terms])) for name in terms[0]}
        if epoch + 1 == EPOCHS:
            bank, queries = (dino.class_tokens(pixels[split]) for split in ("train", "val"))
            row["knn_top1"] = knn_accuracy(bank, labels["train"], queries=queries, query_labels=labels["val"])
            row |= {"knn_chance": 0.5, "rank_me": rank_me(queries)}
        history.append(row)
    return history, dino.teacher.vit.state_dict()


def test_build_network__class_token_starts_at_dinos_deviation():
    network = build_network(get_pretrain_preset("rendered_prior"))
    assert 0.015 < network.vit.cls_token.std() < 0.025
    again = build_network(get_pretrain_preset("rendered_prior"))
    assert torch.equal(network.vit.cls_token, again.vit.cls_token)
