"""The batches of training workers, the same however they are read; and the loop on images and cached tokens."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models.resnet import Bottleneck

from tests.builders import small_resnet
from tests.fixtures import Counted
from transfgu_ray.algorithms.encoder.vit import Encoder
from transfgu_ray.algorithms.rounds.bootstrap import Bootstrap
from transfgu_ray.algorithms.rounds.schedule import Epoch, sample_order, schedule
from transfgu_ray.config.run import RunConfig, build_config
from transfgu_ray.datasets.listing import Listing
from transfgu_ray.engine.parts import UnitDone
from transfgu_ray.engine.session import Resources, ray_session
from transfgu_ray.engine.signs import Sign, signs_of_life
from transfgu_ray.engine.stream import Photo
from transfgu_ray.engine.trainer import fit, new_trainer
from transfgu_ray.errors import DataError
from transfgu_ray.models.weights import BACKBONE, load_run_backbone, load_run_encoder, resolve_backbone
from transfgu_ray.pipeline import train_loop as train_rounds
from transfgu_ray.pipeline.context import StageJob, Trial
from transfgu_ray.pipeline.tokens import TokenCacher
from transfgu_ray.pipeline.train_data import _read_photo, bank_image_ids, load_train_data, sample_index
from transfgu_ray.runs.index import IndexWriter
from transfgu_ray.runs.run import Run
from transfgu_ray.runs.stages import STAGES
from transfgu_ray.storage import Folder
from transfgu_ray.tracking.runs import Tracked

pytestmark = pytest.mark.ray
EPOCHS = schedule((2,), (0.03, 0.1))
COLOURLESS = "train.augment={jitter_prob: 0, grey_prob: 0, blur_prob: 0}"


@pytest.fixture(scope="module")
def cached_run(tmp_path_factory: pytest.TempPathFactory, labelled: Run) -> Run:
    """The run of five photographs with cached tokens; with batches of 4, the last batch of an epoch is filled up."""
    run = Run.open(shutil.copytree(labelled.folder.path, tmp_path_factory.mktemp("tokens") / "run").as_posix(), None)
    cache_tokens(run, configured(run, "cached"))
    return run


def configured(run: Run, tokens: str, *settings: str) -> RunConfig:
    """Return the run's configuration without colour augmentation, on images or on cached tokens."""
    return build_config(run.config, None, [f"train.features={tokens}", COLOURLESS, *settings])


def grid_hw(config: RunConfig) -> tuple[int, int]:
    height, width = config.train_crop_size
    return height // 8, width // 8


def cache_tokens(run: Run, config: RunConfig) -> None:
    data = Path(config.data.root)
    part = {"run_uri": run.folder.uri, "table": "tokens", "fingerprint": "", "device": "cpu", "threads": 1}
    cacher = TokenCacher(config, **part)
    photos = [Photo(path.name, path.read_bytes(), None, None) for path in sorted(data.iterdir())]
    done = [UnitDone.load(cacher.process(unit, photos[2 * unit : 2 * unit + 2])) for unit in range(3)]
    IndexWriter(run.folder, "tokens", "").finish({unit: of.record for unit, of in enumerate(done) if of.record})


def read_batches(
    run: Run, num_readers: int, rank: int = 0, world_size: int = 1, config: RunConfig | None = None
) -> list[dict[str, torch.Tensor]]:
    config = config or run.config
    index, device = sample_index(run.folder, config), torch.device("cpu")
    place = {"rank": rank, "world_size": world_size, "grid_hw": grid_hw(config)}
    how = {"epochs": EPOCHS, "num_readers": num_readers, "device": device, "config": config}
    return list(train_rounds._batches(index, run.folder.uri, **how, **place))


def read_plainly(run: Run, config: RunConfig, rank: int = 0, world_size: int = 1) -> list[dict[str, np.ndarray]]:
    """Return the batches by their definition, one after the other and without Ray."""
    index, found = sample_index(run.folder, config), []
    for epoch in EPOCHS:
        order = sample_order(
            config.seed,
            epoch.index,
            num_images=5,
            repeats=1,
            steps=2,
            per_worker=4 // world_size,
            world_size=world_size,
        )[rank]
        positions = (np.arange(4 * 2 // world_size) * world_size + rank).reshape(2, -1)
        for step, (rows, position) in enumerate(zip(order, positions, strict=True)):
            found.append(
                load_train_data(
                    index.take(rows),
                    position,
                    bank_uri=run.folder.uri,
                    tokens_uri=run.folder.uri,
                    config=config,
                    epoch=epoch.index,
                    step=step,
                    grid_hw=grid_hw(config),
                )
            )
    return found


def assert_equal(batches: list[dict[str, torch.Tensor]], expected: list[dict[str, np.ndarray]]) -> None:
    for batch, want in zip(batches, expected, strict=True):
        assert batch.keys() == want.keys()
        for name in want:
            np.testing.assert_array_equal(batch[name].numpy(), want[name])


@pytest.mark.parametrize("samples_a_task", [32, 3])
@pytest.mark.parametrize("num_readers", [1, 3])
def test_batches__equal_samples_read_one_after_the_other(
    cached_run: Run, monkeypatch: pytest.MonkeyPatch, num_readers: int, samples_a_task: int
) -> None:
    monkeypatch.setattr(train_rounds, "_CROPS_PER_TASK", samples_a_task)
    batches = read_batches(cached_run, num_readers)
    assert [len(batch["image"]) for batch in batches] == [4] * 4
    assert_equal(batches, read_plainly(cached_run, cached_run.config))


@pytest.mark.parametrize("rank", [0, 1])
def test_batches__of_two_workers_are_halves_with_augmentations_of_their_own(cached_run: Run, rank: int) -> None:
    assert_equal(read_batches(cached_run, 1, rank, 2), read_plainly(cached_run, cached_run.config, rank, 2))


@pytest.mark.parametrize("num_readers", [1, 3])
def test_batches__of_cached_tokens_equal_samples_read_one_after_the_other(cached_run: Run, num_readers: int) -> None:
    config = configured(cached_run, "cached")
    batches = read_batches(cached_run, num_readers, config=config)
    assert [batch["tokens"].shape for batch in batches] == [(4, 16, 24)] * 4
    assert_equal(batches, read_plainly(cached_run, config))
    # Regions and flips are those of the images.
    for batch, want in zip(batches, read_plainly(cached_run, configured(cached_run, "live")), strict=True):
        np.testing.assert_array_equal(batch["scores"].numpy(), want["scores"])


def with_tokens(run: Run, config: RunConfig, folder: Path) -> Run:
    """A copy of the run under another configuration, with its backbone and tokens."""
    copy = Run(Folder(str(shutil.copytree(run.folder.path, folder))), config)
    backbone = resolve_backbone(config)
    if backbone is not None:
        copy.folder.write_bytes(BACKBONE, backbone)
    cache_tokens(copy, config)
    return copy


def train_in_this_process(
    run: Run, sibling: Run | None = None, sign: Sign | None = None, recovered: str | None = None
) -> list[dict[str, float]]:
    """Train in this process, where steps can be patched; return the history."""
    settings = {
        "run_uri": run.folder.uri,
        "config": run.config,
        "model": train_rounds.model_config(run.config, ["foreground"] * 4, ""),
        "threads": 1,
        "num_readers": 2,
        "recovered": recovered,
        "sign": Sign("training in this process") if sign is None else sign,
        "sibling": sibling and {"run_uri": sibling.folder.uri, "config": sibling.config},
    }
    alone = Resources(num_cores=1, num_workers=1, train_workers=0, device="cpu", threads=1, num_blocks=None)
    trainer = new_trainer(
        train_rounds.train_loop,
        settings,
        storage=run.folder,
        name="rounds",
        resources=alone,
        runtime=run.config.runtime,
    )
    fit(trainer, settings["sign"], "do something")
    return json.loads(run.folder.read_bytes(train_rounds.HISTORY))


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("train.token_window=16",),
        ("train.backbone_weights=random", "train.backbone=resnet50_fpn", "train.decoder=classifier"),
    ],
    ids=["tokens", "windows", "resnet"],
)
def test_train_loop__cached_tokens_of_whole_photographs_train_as_the_photographs(
    cached_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
) -> None:
    monkeypatch.setattr("transfgu_ray.algorithms.encoder.resnet._build", lambda: small_resnet(Bottleneck))
    # At the working size, a crop of the whole image is the photograph whose tokens are cached.
    whole = ("train.augment={crop_scale: [1, 1], flip_prob: 0}", "train.crop_size=[64, 64]")
    runs = {}
    for tokens in ("live", "cached"):
        config = configured(cached_run, tokens, *whole, *settings)
        runs[tokens] = with_tokens(cached_run, config, tmp_path / tokens)
    encoder = load_run_encoder(cached_run.folder, "float32", "cpu")
    backbone = load_run_backbone(runs["live"].folder, runs["live"].config, "cpu")
    for live, cached in zip(*(read_batches(run, 1, config=run.config) for run in runs.values()), strict=True):
        side = runs["live"].config.train.token_window
        seen, kept = (
            train_rounds._tokens(batch, encoder, token_window=side, backbone=backbone) for batch in (live, cached)
        )
        # Half a float16 step, plus the last bits that depend on the shape of the batch.
        torch.testing.assert_close(kept, seen, rtol=2.0**-11, atol=1e-5 * float(seen.abs().max()))
        assert torch.equal(live["scores"], cached["scores"])
    live, cached = map(train_in_this_process, runs.values())
    assert [row["round"] for row in cached] == [0, 1]
    for row, want in zip(cached, live, strict=True):
        # A loss is a mean over many tokens with roundings of either sign, so it moves by less than a single one may.
        assert row == pytest.approx(want, rel=2.0**-11)


def test_train_loop__a_loss_that_is_not_finite_names_its_photographs_and_stops_when_it_recurs(
    cached_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = with_tokens(cached_run, configured(cached_run, "cached"), tmp_path / "run")
    real = Bootstrap.step

    def poisoned(self: Bootstrap, tokens: torch.Tensor, scores: torch.Tensor, *, epoch: Epoch, step: int) -> object:
        if (epoch.index, step) == (1, 1):
            tokens = torch.full_like(tokens, torch.nan)
        return real(self, tokens, scores, epoch=epoch, step=step)

    monkeypatch.setattr(Bootstrap, "step", poisoned)
    ids = bank_image_ids(run.folder)
    batch = sorted(
        {
            ids[place]
            for place in sample_order(run.config.seed, 1, num_images=5, repeats=1, steps=2, per_worker=4, world_size=1)[
                0, 1
            ]
        }
    )
    words = f"the loss is nan in epoch 1, step 1, on {', '.join(batch)}"
    with signs_of_life(lambda words: None) as sign:
        # Its worker may start once more, which then finds that another start is no use.
        for _ in range(2):
            with pytest.raises(FloatingPointError, match=f"{words}$"):
                train_in_this_process(run, sign=sign)
        with pytest.raises(DataError, match=f"{words}, and again after a restart from the last checkpoint; do some"):
            train_in_this_process(run, sign=sign)
    assert not run.folder.exists("model/decoder.safetensors")


def test_train_loop__on_cached_tokens_never_calls_the_encoder(
    cached_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = train_rounds.load_run_encoder

    def watched(*arguments: object) -> Encoder:
        encoder = real(*arguments)
        encoder.all_tokens = lambda images: calls.append(len(images)) or Encoder.all_tokens(encoder, images)
        return encoder

    monkeypatch.setattr(train_rounds, "load_run_encoder", watched)
    cached, live = (
        with_tokens(cached_run, configured(cached_run, tokens), tmp_path / tokens) for tokens in ("cached", "live")
    )
    train_in_this_process(cached)
    assert calls == []
    train_in_this_process(live)
    assert calls == [4] * 4, "teacher and student share one forward a step"


def test_train_loop__beside_a_sibling_learns_the_same_and_is_measured(cached_run: Run, tmp_path: Path) -> None:
    config = configured(cached_run, "cached")
    alone, watched = (with_tokens(cached_run, config, tmp_path / name) for name in ("alone", "watched"))
    sibling = Run(watched.folder, config.model_copy(update={"seed": 7}))
    want, found = train_in_this_process(alone), train_in_this_process(watched, sibling)
    measured = ("agreement", "consistency", "silhouette", "usage", "score")
    assert [{name: value for name, value in row.items() if name not in measured} for row in found] == want
    assert all(-1 <= row[name] <= 1 for row in found for name in measured[:3])
    assert all(1 <= row["usage"] <= config.num_concepts + 1 for row in found)
    # A twin with the same seed would agree in every patch.
    twin = with_tokens(cached_run, config, tmp_path / "twin")
    assert train_in_this_process(twin, twin)[-1]["agreement"] == pytest.approx(1)
    assert found[-1]["agreement"] < 0.99


@pytest.mark.parametrize("beside_a_sibling", [False, True], ids=["alone", "sibling"])
def test_train_loop__goes_on_inside_an_epoch_as_if_it_had_never_stopped(
    cached_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside_a_sibling: bool
) -> None:
    config = configured(cached_run, "cached", "train.checkpoint_minutes=1.0e-9")
    run = with_tokens(cached_run, config, tmp_path / "run")
    sibling = Run(run.folder, config.model_copy(update={"seed": 7})) if beside_a_sibling else None
    reports = []

    def keep(row: dict[str, float], state: dict[str, object], rank: int, own: object) -> None:
        reports.append((row, copy.deepcopy(state), copy.deepcopy(own)))

    monkeypatch.setattr(train_rounds, "report_state", keep)
    want = train_in_this_process(run, sibling)
    undisturbed, reports = reports, []
    steps = 2 * (1 + beside_a_sibling)
    # Two epochs, each with a report after every step and one at its end.
    assert len(undisturbed) == 2 * (steps + 1)
    positions = [tuple(state["position"]) for _, state, _ in undisturbed]
    assert positions == sorted(positions)
    for number, (_, state, own) in enumerate(undisturbed[:-1]):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        torch.save(state, folder / "state.pt")
        torch.save(own, folder / "rank-0.pt")
        assert train_in_this_process(run, sibling, recovered=str(folder)) == want
        _, last, _ = reports[-1]
        for name in ("bootstrap", "sibling") if beside_a_sibling else ("bootstrap",):
            weights, wanted = (of[name]["bootstrap"]["student"] for of in (last, undisturbed[-1][1]))
            assert all(torch.equal(weights[key], wanted[key]) for key in wanted), f"other weights after {number}"
        assert len(reports) == len(undisturbed) - number - 1, "steps were done again"
        reports.clear()


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"no image")], ids=["gone", "damaged"])
def test_load_train_data__names_a_photograph_that_changed(
    cached_run: Run, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    photo = shutil.copytree(cached_run.config.data.root, tmp_path / "photos") / bank_image_ids(cached_run.folder)[0]
    photo_before = photo.read_bytes()
    damage(photo)
    with pytest.raises(DataError, match=rf"{photo} has changed since the bank was labelled \(now: .+\); restore it"):
        _read_photo(str(photo), cached_run.config, (64, 64))
    photo.write_bytes(photo_before)
    assert _read_photo(str(photo), cached_run.config, (64, 64)).shape == (3, 64, 64)


def test_learner__with_other_workers_goes_on_after_as_many_photographs(cached_run: Run) -> None:
    config = configured(cached_run, "live", "train.batch_size=4", "train.epoch_repeats=4")
    index = sample_index(cached_run.folder, cached_run.config)
    encoder = load_run_encoder(cached_run.folder, "float32", "cpu")
    kinds = train_rounds.model_config(config, ["foreground"] * 4, "")

    def learner(world_size: int) -> train_rounds._Learner:
        student = train_rounds.new_student(config, kinds, encoder)
        return train_rounds._Learner(
            Bootstrap(student, train_rounds.bootstrap_settings(config)),
            index,
            run_folder=cached_run.folder,
            config=config,
            rank=0,
            world_size=world_size,
        )

    # 20 visits: 5 steps of 4 photographs on one or two workers, 6 of 3 on three.
    two, three = learner(2), learner(3)
    two.done = 3
    state = two.state_dict()
    same = learner(2)
    same.load_state_dict(state, two.own_state())
    assert (same.done, same._rng is None) == (3, False)
    three.load_state_dict(state, None)
    assert (three.done, three._rng) == (4, None)


@pytest.mark.slow
def test_run_stage__mlflow_that_fails_ends_neither_the_progress_nor_the_reports_of_a_trial(
    labelled: Run, tmp_path: Path
) -> None:
    run = Run.open(str(shutil.copytree(labelled.folder.path, tmp_path / "run")), None)
    done, reported = [], []
    # Its store has no such run.
    lost = Tracked(f"sqlite:///{tmp_path}/mlflow.db", "0" * 32)
    with ray_session(None, run.config.runtime) as resources:
        job = StageJob(
            folder=run.folder,
            config=run.config,
            root=Folder(run.config.data.root),
            resources=resources,
            fingerprint="f" * 64,
            progress=Counted(done.append),
            run=run,
            listing=Listing(()),
            inputs="",
            tracked=lost,
            trial=Trial(lost, {}, None, 1, lambda history: reported.append(len(history)), "training of a test"),
        )
        content = STAGES["train"].function(job)
    assert (content["epochs"], reported[-1], sum(done)) == (2, 2, 2)
