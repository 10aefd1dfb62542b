"""Signs of life of workers: what counts as one, and that it comes from inside a unit."""

import time
from pathlib import Path

import pytest

from tests.fixtures import Counted
from transfgu_ray.datasets.photographs import ImageRef
from transfgu_ray.engine import signs
from transfgu_ray.engine.session import Resources
from transfgu_ray.engine.signs import Board, Sign, ages, board, signs_of_life
from transfgu_ray.engine.stream import Photo, UnitWorker, set_up_ray_data, stream_units
from transfgu_ray.storage import Folder


def test_board__what_is_done_again_after_a_restart_is_no_sign_of_life():
    kept = Board()
    for position in [(0, 0), (0, 1), (1, 0), (0, 1), (1, 0), (1, 1)]:
        kept.sign("train", position, {"step": position[1]})
    assert kept.read("train") == (4, {"step": 1})
    kept.sign("train", (0, 5), {"step": 5})
    assert kept.read("train") == (4, {"step": 1})


def test_board__without_a_position_every_sign_counts():
    kept = Board()
    for _ in range(3):
        kept.sign("labels", (), {})
    assert kept.read("labels") == (3, {})
    assert kept.read("another") == (0, {})


def test_board__ages_of_works_until_they_are_forgotten():
    kept = Board()
    kept.sign("a", (), {})
    time.sleep(0.2)
    kept.sign("b", (), {})
    found = kept.ages()
    assert found["a"] >= found["b"] + 0.2
    kept.forget(["a", "nothing"])
    kept.sign("a", (), {})
    assert list(kept.ages()) == ["b"], "a process that dies later brought its work back"
    kept.begin("a")
    assert list(kept.ages()) == ["b", "a"]


@pytest.mark.ray
def test_signs_of_life__words_of_another_process_arrive(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(signs, "_EVERY_S", 0.1)
    heard = []
    with signs_of_life(heard.append) as sign:
        ray.get(ray.remote(lambda: sign(3, loss=0.5)).options(num_cpus=0.1).remote())
        end = time.monotonic() + 60
        while not heard and time.monotonic() < end:
            time.sleep(0.05)
        assert ages("")[sign.key] >= 0
    assert heard == [{"loss": 0.5}]
    end = time.monotonic() + 60
    while sign.key in ages("") and time.monotonic() < end:
        time.sleep(0.05)
    assert sign.key not in ages(""), "an ended work is still on the board"
    assert ray.get(board().read.remote(sign.key)) == (0, {})


def test_sign__without_ray_nothing_happens() -> None:
    Sign("nobody")(1)


class Slow(UnitWorker):
    """A worker that takes as long as several signs of life for each of its photographs."""

    def process(self, unit: int, photos: list[Photo]) -> bytes:
        """Look at each photograph for a while."""
        for _ in self.signed(photos):
            time.sleep(2.5)
        return b""


@pytest.mark.ray
def test_stream_units__signs_of_life_come_from_inside_a_unit(local_ray: None, tmp_path: Path) -> None:
    units = {0: [ImageRef(f"{i}.png", None, -1) for i in range(4)]}
    calls = []
    for result in stream_units(
        Folder(str(tmp_path)),
        units,
        worker=Slow,
        arguments={},
        resources=Resources(2, 1, 1, "cpu", 1, None),
        progress=Counted(calls.append),
    ):
        assert result.unit == 0
        assert len(calls) >= 2, "no sign of life before the unit's end"
    assert set(calls) == {0}


def test_ray_data__its_own_guard_is_off() -> None:
    from ray.data import DataContext

    set_up_ray_data()
    assert DataContext.get_current().execution_no_progress_timeout_s == -1
