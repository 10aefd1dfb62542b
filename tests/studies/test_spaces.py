import json
from pathlib import Path

import pytest

from transfgu_ray.config.presets import configure
from transfgu_ray.errors import ConfigError
from transfgu_ray.studies.spaces import (
    Range,
    assignments,
    expand,
    grid_points,
    plain_space,
    random_points,
    read_space,
)

DEMO = configure("demo", None, [])


def read(tmp_path: Path, text: str):
    file = tmp_path / "space.yaml"
    file.write_text(text)
    return read_space(str(file), DEMO)


def test_paper__varies_alpha_both_weights_and_both_ks():
    points = grid_points(read_space("paper", DEMO))
    assert len(points) == 3 * 3 * 3 * 2
    assert {(p["concepts.num_concepts"], p["concepts.num_background"]) for p in points} == {(16, 4), (6, 2)}
    assert {p["train.alpha"][1] for p in points} == {0.05, 0.1, 0.3}


def test_paper__of_a_folder__varies_k_around_the_configured():
    config = configure("tiny_cpu", None, ["concepts.num_concepts=10"])
    assert {p["concepts.num_concepts"] for p in grid_points(read_space("paper", config))} == {5, 10, 20}


def test_paper__of_things_only__varies_k_alone():
    config = configure("demo", None, ["data.dataset=voc"])
    assert {p["concepts.num_concepts"] for p in grid_points(read_space("paper", config))} == {10, 20, 40}


def test_read_space__takes_lists_ranges_and_joint_settings(tmp_path):
    space = read(
        tmp_path,
        "train.omega_1: {low: 0.1, high: 10, log: true}\n"
        "concepts.num_concepts, concepts.num_background: [[16, 4], [6, 2]]\n",
    )
    assert space["train.omega_1"] == Range(0.1, 10, True)
    assert plain_space(space)["train.omega_1"] == {"low": 0.1, "high": 10, "log": True}
    found = expand({"concepts.num_concepts, concepts.num_background": [6, 2]})
    assert found == {"concepts.num_concepts": 6, "concepts.num_background": 2}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train.omega_3: [1]", "did you mean train.omega_"),
        ("train.omega_1: [-1]", "train.omega_1"),
        ("train.omega_1: 3", "list of values or {low"),
        ("train.omega_1: {low: 3, high: 1}", "low must be below high"),
        ("train.omega_1: {low: 0, high: 1, log: true}", "above 0"),
        ("train.omega_1: {low: a, high: 1}", "low: NUMBER"),
        ("encoder.weights: [random]", "encoder.weights in"),
        ("evaluate.protocol: [stego]", "cannot be varied"),
        ("train.omega_1, train.omega_2: [[1, 2, 3]]", "a list of 2"),
        ("- 1", "must map settings"),
        ("a: [", "not valid YAML"),
    ],
)
def test_read_space__refuses(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words.replace("[", r"\[").replace("{", r"\{")):
        read(tmp_path, text)


def test_read_space__without_a_file__says_so():
    with pytest.raises(ConfigError, match="neither 'paper' nor a readable file"):
        read_space("nowhere.yaml", DEMO)


def test_random_points__are_distinct_and_a_prefix_of_more():
    space = read_space("paper", DEMO)
    points = random_points(space, 20, seed=3)
    assert len({json.dumps(point) for point in points}) == 20
    assert random_points(space, 30, seed=3)[:20] == points
    assert random_points(space, 20, seed=4) != points
    assert len(random_points(space, 1000, seed=3)) == 54


def test_random_points__of_a_range__fill_it_and_are_a_prefix_of_more():
    space = {"train.omega_1": Range(0.01, 1, True), "concepts.num_concepts": Range(4, 7)}
    points = random_points(space, 200, seed=0)
    assert random_points(space, 10, seed=0) == points[:10]
    values = [point["train.omega_1"] for point in points]
    assert all(0.01 <= value <= 1 for value in values)
    # Half of the values lie below the middle of the logarithms.
    assert 70 < sum(value < 0.1 for value in values) < 130
    assert {point["concepts.num_concepts"] for point in points} == {4, 5, 6, 7}


def test_grid_points__of_a_range__is_refused():
    with pytest.raises(ConfigError, match="which a grid cannot cover"):
        grid_points({"train.omega_1": Range(0, 1)})


def test_assignments__are_read_back_as_they_were():
    point = {"train.alpha": [0.03, 0.3], "concepts.num_background": 4}
    config = configure("demo", None, assignments(point))
    assert (config.train.alpha, config.concepts.num_background) == ((0.03, 0.3), 4)
