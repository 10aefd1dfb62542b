"""What each training worker is fed: the same samples in the same order, however they are read."""

import numpy as np
import pytest
import torch

from tests.builders import make_folder
from tests.pipeline.conftest import make_run
from transfgu_ray.algorithms.rounds import sample_order, schedule
from transfgu_ray.artifacts import Run
from transfgu_ray.config import RunConfig
from transfgu_ray.pipeline import train_rounds
from transfgu_ray.pipeline.samples import bank_index, load_samples

pytestmark = pytest.mark.ray
EPOCHS = schedule((2,), (0.03, 0.1))
GRID_HW = (4, 4)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Run:
    """A run of five photographs that has its bank; batches of 4 end an epoch with a filled one."""
    folder = tmp_path_factory.mktemp("labelled")
    data = make_folder(folder / "data", num_images=5)
    return make_run(folder / "run", data, stages=("extract", "concepts", "labels"))


def read_batches(run: Run, num_readers: int, rank: int = 0, world_size: int = 1) -> list[dict[str, torch.Tensor]]:
    index, device = bank_index(run.folder), torch.device("cpu")
    place = (rank, world_size, GRID_HW, num_readers, device)
    return list(train_rounds._batches(index, run.folder.uri, run.config, EPOCHS, *place))


def read_plainly(run: Run, config: RunConfig, rank: int = 0, world_size: int = 1) -> list[dict[str, np.ndarray]]:
    """The batches by the definition, one after the other and without Ray."""
    index, found = bank_index(run.folder), []
    for epoch in EPOCHS:
        order = sample_order(config.seed, epoch.index, 5, 1, 2, 4 // world_size, world_size)[rank]
        positions = (np.arange(4 * 2 // world_size) * world_size + rank).reshape(2, -1)
        for rows, position in zip(order, positions, strict=True):
            values = config.model_dump(mode="json")
            found.append(load_samples(index.take(rows), position, run.folder.uri, values, epoch.index, GRID_HW))
    return found


def assert_equal(batches: list[dict[str, torch.Tensor]], expected: list[dict[str, np.ndarray]]) -> None:
    for batch, want in zip(batches, expected, strict=True):
        assert batch.keys() == want.keys()
        for name in want:
            np.testing.assert_array_equal(batch[name].numpy(), want[name])


@pytest.mark.parametrize("samples_a_task", [32, 3])
@pytest.mark.parametrize("num_readers", [1, 3])
def test_batches__equal_samples_read_one_after_the_other(
    labelled: Run, monkeypatch: pytest.MonkeyPatch, num_readers: int, samples_a_task: int
) -> None:
    monkeypatch.setattr(train_rounds, "_SAMPLES_A_TASK", samples_a_task)
    batches = read_batches(labelled, num_readers)
    assert [len(batch["image"]) for batch in batches] == [4] * 4
    assert_equal(batches, read_plainly(labelled, labelled.config))


@pytest.mark.parametrize("rank", [0, 1])
def test_batches__of_two_workers_are_halves_with_augmentations_of_their_own(labelled: Run, rank: int) -> None:
    assert_equal(read_batches(labelled, 1, rank, 2), read_plainly(labelled, labelled.config, rank, 2))
