"""One local Ray for all pipeline tests, and runs small enough to make in seconds."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.builders import make_folder, make_voc
from tests.faults.storage import FailingDisk
from transfgu_ray import storage
from transfgu_ray.algorithms.scores import intervals
from transfgu_ray.config.presets import get_preset
from transfgu_ray.config.run import build_config
from transfgu_ray.config.sections import RuntimeConfig
from transfgu_ray.engine.progress import Progress
from transfgu_ray.engine.session import ray_session
from transfgu_ray.pipeline.run import run_stages
from transfgu_ray.runs.run import Run
from transfgu_ray.runs.stages import STAGES

TINY = (
    "encoder.overrides={embed_dim: 24, depth: 2, num_heads: 3, patch_size: 8}",
    "data.image_size=[64, 64]",
    "cam.image_size=[64, 64]",
    "train.image_size=[64, 64]",
    "train.inference_size=[32, 32]",
    "train.last_batch=fill",
    "extract.window_fracs=[0.5, 0.3]",
    "extract.images_per_part=2",
    "concepts.num_concepts=4",
    "train.batch_size=4",
    "train.round_epochs=[1, 1]",
    "evaluate.num_samples=2",
    "evaluate.baselines=[patch_tokens, decoder_tokens, random_vit, raw_colour]",
    "runtime.num_workers=1",
)


@pytest.fixture(scope="session")
def _few_resamples() -> Iterator[None]:
    """Intervals are not what these tests are about, and a thousand resamples of every method take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "RESAMPLES", 20)
        yield


class Counted(Progress):
    """Adds up what was done."""

    def __init__(self, add: Callable[[int], None]) -> None:
        self._add = add

    def __call__(self, done: int = 0, words: str = "", *, refused: int = 0) -> None:
        self._add(done)


class Silent:
    """A reporter that only remembers how far stages came and what was said. Like a terminal, it cannot be pickled."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.done: dict[str, int] = {}
        self.notes: list[str] = []

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None, unit: str) -> Iterator[Progress]:
        self.done[name] = 0

        def add(done: int) -> None:
            self.done[name] += done

        yield Counted(add)

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="session")
def local_ray(_few_resamples: None) -> Iterator[None]:
    with ray_session(None, RuntimeConfig(object_store_mb=200)):
        yield


@pytest.fixture(scope="session")
def photographs_with_refused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five photographs and a file that is none."""
    data = make_folder(tmp_path_factory.mktemp("photographs"), num_images=5)
    (data / "photo_001a.jpg").write_text("no picture")
    return data


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory, photographs_with_refused: Path, local_ray: None) -> Run:
    """A run that has its bank, in three parts of two, one and two photographs. To be copied, not changed."""
    folder = tmp_path_factory.mktemp("labelled") / "run"
    return make_run(folder, photographs_with_refused, stages=("extract", "concepts", "labels"))


@pytest.fixture(scope="session")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_voc(tmp_path_factory.mktemp("voc"), num_train=6, num_val=3)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, voc: Path, local_ray: None) -> Run:
    """A whole run on `voc`. To be copied, not changed."""
    return make_run(tmp_path_factory.mktemp("whole") / "run", voc, dataset="voc")


def open_run(folder: Path, data: Path, *settings: str, dataset: str = "folder", overwrite: bool = False) -> Run:
    named = [f"data.root={json.dumps(str(data))}", f"data.dataset={dataset}"]
    if dataset == "folder":
        named.append("data.region_mode=things_and_stuff")
    return Run.open(str(folder), build_config(get_preset("tiny_cpu"), None, [*named, *TINY, *settings]), overwrite)


def make_run(
    folder: Path, data: Path, *settings: str, stages: tuple[str, ...] = STAGES.lasting, dataset: str = "folder"
) -> Run:
    run = open_run(folder, data, *settings, dataset=dataset)
    run_stages(run, stages, address=None, reporter=Silent())
    return run


def transfgu(*arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """The real command, in a process of its own; `env` is added to this one's variables."""
    return subprocess.Popen(
        [sys.executable, "-m", "transfgu_ray.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env=os.environ | (env or {}),
        start_new_session=True,
    )


def training_workers(mark: str) -> list[int]:
    """Return the processes of trainings whose environment holds a mark, as those of a command do that was given it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        # A process may end while it is read.
        with contextlib.suppress(OSError):
            name, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
            if b"TrainWorker" in name and mark.encode() in environment:
                found.append(int(folder.name))
    return found


@pytest.fixture
def failing_disk(monkeypatch: pytest.MonkeyPatch) -> type[FailingDisk]:
    """Open local folders on a `FailingDisk` from here on."""
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.001)
    resolve = storage.resolve
    monkeypatch.setattr(storage, "resolve", lambda path: (FailingDisk(), resolve(path)[1]))
    return FailingDisk


@pytest.fixture
def dead_disk(failing_disk: type[FailingDisk], monkeypatch: pytest.MonkeyPatch) -> None:
    """Open local folders on a disk that never answers."""
    monkeypatch.setattr(failing_disk, "times", 10**9)
    monkeypatch.setattr(storage, "RETRY_S", 0.0)
