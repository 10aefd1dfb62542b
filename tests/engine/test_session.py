"""Ray sessions: what they grant, in processes of their own, apart from the Ray of the other tests."""

import subprocess
import sys

import pytest

from transfgu_ray.engine.session import cores_per_gpu

_SHARES = """
import ray
from transfgu_ray.engine.session import cores_per_gpu, own_node

ray.init(address="local", num_cpus=26, num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
share = ray.remote(num_cpus=0, num_gpus=1)(lambda: cores_per_gpu(own_node()))
print(ray.get([share.remote(), share.remote()]))
"""


@pytest.mark.parametrize(
    ("node", "want"),
    [
        ({"CPU": 96, "GPU": 8}, 12),
        ({"CPU": 13.0, "GPU": 4.0}, 3),
        ({"CPU": 0, "GPU": 1}, 1),
        ({"GPU": 1}, 1),
        ({"CPU": 2, "GPU": 8}, 1),
        ({"CPU": 6}, 6),
    ],
)
def test_cores_per_gpu__of_a_node(node: dict[str, float], want: int) -> None:
    assert cores_per_gpu(node) == want


@pytest.mark.ray
def test_cores_per_gpu__workers_share_what_ray_grants_on_their_node() -> None:
    done = subprocess.run([sys.executable, "-c", _SHARES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[13, 13]"
