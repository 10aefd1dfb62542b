"""Reading ahead for a training: the order of results, and how far it runs ahead."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from transfgu_ray.engine.prefetch import read_ahead, to_device
from transfgu_ray.errors import DataError, StorageError


def slow_at_first(number: int, scale: float) -> np.ndarray:
    """Make the first calls end last."""
    time.sleep(max(0.0, 0.3 - 0.1 * number))
    return np.array([number * scale])


@pytest.mark.ray
@pytest.mark.parametrize("num_ahead", [1, 3, 20])
def test_read_ahead__keeps_the_order_and_takes_calls_as_they_are_needed(local_ray: None, num_ahead: int) -> None:
    taken = 0

    def calls() -> Iterator[dict[str, float]]:
        nonlocal taken
        for number in range(8):
            taken += 1
            yield {"number": number, "scale": 0.5}

    for got, value in enumerate(read_ahead(slow_at_first, calls(), num_ahead)):
        assert value == got * 0.5
        assert taken == min(8, got + 1 + num_ahead)
    assert got == 7


@pytest.mark.ray
def test_read_ahead__no_calls_give_no_results(local_ray: None) -> None:
    assert list(read_ahead(slow_at_first, [], 2)) == []


def read_badly(folder: str, error: type[Exception]) -> int:
    """Fail the first two times."""
    tries = len(list(Path(folder).iterdir()))
    Path(folder, str(tries)).touch()
    if tries < 2:
        raise error("for a moment")
    return tries


@pytest.mark.ray
def test_read_ahead__repeats_what_a_storage_broke_and_nothing_else(local_ray: None, tmp_path: Path) -> None:
    (tmp_path / "storage").mkdir()
    (tmp_path / "data").mkdir()
    call = {"folder": str(tmp_path / "storage"), "error": StorageError}
    assert list(read_ahead(read_badly, [call], 1)) == [2]
    with pytest.raises(DataError):
        list(read_ahead(read_badly, [{"folder": str(tmp_path / "data"), "error": DataError}], 1))
    assert len(list((tmp_path / "data").iterdir())) == 1


def test_to_device__joins_parts_into_a_copy() -> None:
    parts = [np.arange(6, dtype=np.float16).reshape(3, 2), np.ones((1, 2), dtype=np.float16)]
    for part in parts:
        part.flags.writeable = False
    batch = to_device(parts, torch.device("cpu"))
    assert batch.dtype == torch.float16
    assert batch.tolist() == [[0, 1], [2, 3], [4, 5], [1, 1]]
    alone = to_device(parts[:1], torch.device("cpu"))
    alone += 1
    assert parts[0][0, 0] == 0
