import json

import pytest
from ray.tune.search import Searcher

from transfgu_ray.studies.search import NewPoints
from transfgu_ray.studies.spaces import Range
from transfgu_ray.studies.trials import POINT

SPACE = {"train.omega_1": (0.0, 1.0, 3.0), "a.k, a.b": ([16, 4], [6, 2])}


def suggestions(search: NewPoints, count: int) -> list[dict]:
    return [json.loads(search.suggest(f"trial{i}")[POINT]) for i in range(count)]


def test_suggest__repeats_no_point_and_ends():
    search = NewPoints(SPACE, 0, metric="score", known=[], taken=[], first=[])
    found = suggestions(search, 6)
    assert len({json.dumps(point) for point in found}) == 6
    assert found[0].keys() == {"train.omega_1", "a.k", "a.b"}
    assert search.suggest("more") == Searcher.FINISHED


def test_suggest__knows_what_an_earlier_call_tried():
    tried = [{"train.omega_1": omega, "a.k": 16, "a.b": 4} for omega in (0.0, 1.0)]
    stopped = {"train.omega_1": 3.0, "a.k": 16, "a.b": 4}
    search = NewPoints(SPACE, 0, metric="score", known=[(point, 0.5) for point in tried], taken=[stopped], first=[])
    assert {point["a.k"] for point in suggestions(search, 3)} == {6}


def test_suggest__begins_with_interrupted_points():
    point = {"train.omega_1": 3.0, "a.k": 6, "a.b": 2}
    assert suggestions(NewPoints(SPACE, 0, metric="score", known=[], taken=[], first=[point]), 1) == [point]


def test_suggest__learns_from_results():
    search = NewPoints({"train.omega_1": Range(0.0, 1.0)}, 0, metric="score", known=[], taken=[], first=[])
    found = []
    for i in range(40):
        value = json.loads(search.suggest(f"trial{i}")[POINT])["train.omega_1"]
        found.append(value)
        search.on_trial_complete(f"trial{i}", {"score": -abs(value - 0.8)})
    near = [abs(value - 0.8) < 0.2 for value in found]
    # Even draws would give two fifths.
    assert sum(near[20:]) >= 14


@pytest.mark.parametrize("result", [None, {}, {"loss": 1}])
def test_on_trial_complete__without_a_result__is_not_learnt_from(result):
    search = NewPoints(SPACE, 0, metric="score", known=[], taken=[], first=[])
    search.suggest("one")
    search.on_trial_complete("one", result, error=result is None)
    assert search.suggest("two")[POINT]
