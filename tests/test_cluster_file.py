"""cluster.yaml, as Ray itself reads it, and what it pins."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_cluster_file__is_what_ray_accepts(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(cluster)
    validate_config(prepared)
    with pytest.raises(Exception, match="'gpus' was unexpected"):
        validate_config(prepared | {"gpus": 1})


def test_cluster_file__head_works_for_nobody_and_gpus_are_spot(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    assert types[cluster["head_node_type"]]["resources"] == {"CPU": 0}
    with_gpu = [kind for kind in types.values() if "GPU" in kind["resources"]]
    assert with_gpu
    for kind in with_gpu:
        assert kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert kind["docker"]["worker_image"].endswith("-gpu")
    # `runtime.num_workers=null` counts what is there at the start.
    assert all(kind["min_workers"] >= 1 for name, kind in types.items() if name != cluster["head_node_type"])
    assert sum(kind.get("max_workers", 0) for kind in types.values()) == cluster["max_workers"]


def test_cluster_file__images_are_what_pyproject_asks_for(cluster: dict[str, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (ray,) = (each for each in map(Requirement, project["dependencies"]) if each.name == "ray")
    images = [cluster["docker"]["image"]]
    images += [kind["docker"]["worker_image"] for kind in cluster["available_node_types"].values() if "docker" in kind]
    assert len(images) == 2
    for image in images:
        version, major, minor = re.fullmatch(r"rayproject/ray:([\d.]+)-py(\d)(\d+)(?:-gpu)?", image).groups()
        assert version in ray.specifier
        assert f"{major}.{minor}" in SpecifierSet(project["requires-python"])
