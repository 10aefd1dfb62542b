import threading

import pytest

from transfgu_ray.engine.prefetch import made_ahead


@pytest.mark.parametrize("num_threads", [1, 3])
def test_made_ahead__in_order(num_threads: int) -> None:
    assert list(made_ahead(lambda i: i * i, range(20), num_threads)) == [i * i for i in range(20)]


def test_made_ahead__nothing_to_make() -> None:
    assert list(made_ahead(str, [], 2)) == []


def test_made_ahead__the_next_is_made_while_the_last_is_used() -> None:
    started = [threading.Event() for _ in range(6)]
    results = made_ahead(lambda i: (started[i].set(), i)[1], range(6), 1)
    assert next(results) == 0
    assert started[1].wait(5)


def test_made_ahead__takes_no_more_items_than_asked_for() -> None:
    taken = []
    results = made_ahead(str, (taken.append(i) or i for i in range(100)), 2)
    next(results)
    assert len(taken) == 3


def test_made_ahead__an_error_is_raised_at_its_place() -> None:
    results = made_ahead(lambda i: 1 // (2 - i), range(4), 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
