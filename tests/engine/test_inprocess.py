import threading
import time
from collections.abc import Callable

import pytest

from transfgu_ray.engine.inprocess import each_in_threads

pytestmark = pytest.mark.reports


def test_each_in_threads__every_unit_once_by_as_many_workers_as_threads() -> None:
    made: list[int] = []

    def work() -> Callable[[int], tuple[int, int]]:
        number = len(made)
        made.append(number)
        return lambda unit: (time.sleep(0.01), (unit, number))[1]

    results = list(each_in_threads(range(20), work, 3, threading.Event()))
    assert sorted(unit for unit, _ in results) == list(range(20))
    assert {number for _, number in results} == {0, 1, 2} == set(made)


def test_each_in_threads__an_error_ends_the_others_too() -> None:
    ended, done = threading.Event(), []

    def process(unit: int) -> int:
        if unit == 3:
            raise ValueError("unit 3")
        done.append(unit)
        return unit

    def work() -> Callable[[int], int]:
        return process

    with pytest.raises(ValueError, match="unit 3"):
        list(each_in_threads(range(1000), work, 1, ended))
    assert done == [0, 1, 2]
    assert ended.is_set()


def test_each_in_threads__a_worker_that_cannot_be_made() -> None:
    def work() -> Callable[[int], int]:
        raise ValueError("no model")

    with pytest.raises(ValueError, match="no model"):
        list(each_in_threads([0], work, 2, threading.Event()))


def test_each_in_threads__a_caller_that_stops_waits_for_units_at_work() -> None:
    ended, at_work, left = threading.Event(), threading.Event(), []

    def process(unit: int) -> int:
        if unit:
            at_work.set()
            ended.wait(5)
            left.append(unit)
        return unit

    def work() -> Callable[[int], int]:
        return process

    results = each_in_threads(range(9), work, 1, ended)
    assert next(results) == 0
    assert at_work.wait(5)
    results.close()
    assert left == [1]
