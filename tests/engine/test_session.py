"""Ray sessions: what they grant, in processes of their own, apart from the Ray of the other tests."""

import json
import subprocess
import sys
from typing import Any

import pytest

from transfgu_ray.config.sections import RuntimeConfig
from transfgu_ray.engine.session import cores_per_gpu, ray_session

_SHARES = """
import ray
from transfgu_ray.engine.session import cores_per_gpu, own_node

ray.init(address="local", num_cpus=26, num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
share = ray.remote(num_cpus=0, num_gpus=1)(lambda: cores_per_gpu(own_node()))
print(ray.get([share.remote(), share.remote()]))
"""

_LOCAL = """
import json
from transfgu_ray.config.sections import RuntimeConfig
from transfgu_ray.engine.session import ray_session
from transfgu_ray.errors import ConfigError

said, refused = [], None
try:
    with ray_session(None, RuntimeConfig(device="cuda", object_store_mb=100), note=said.append):
        pass
except ConfigError as error:
    refused = str(error)
runtime = RuntimeConfig(num_workers=3, object_store_mb=100)
with ray_session(None, runtime, note=said.append), ray_session(None, runtime, note=said.append) as inner:
    print(json.dumps([said, refused, inner.num_workers]))
"""

# A node with a GPU, which only Ray has to believe in, is added as soon as somebody waits for it.
_CLUSTER = """
import json, os, subprocess, sys
# Or Ray lets a single node listen on 127.0.0.1 alone, and no other join.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "1"
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.cluster_utils import Cluster
from ray.experimental.internal_kv import _internal_kv_get
from transfgu_ray.config.sections import RuntimeConfig
from transfgu_ray.engine.session import ray_session
from transfgu_ray.errors import StalledError

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
joining = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--num-gpus=1"]
said, found, stalled, nodes = [], [], None, []

def note(text):
    said.append(text)
    if text.startswith("waiting"):
        nodes.append(subprocess.Popen([*joining, f"--address={cluster.address}"], stdout=subprocess.DEVNULL))

def look(resources):
    asked = json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL) or "[]")
    found.append([resources.device, resources.num_workers, resources.train_workers, asked])

try:
    with ray_session(cluster.address, RuntimeConfig(device="cuda", stall_minutes=0.02), note=said.append):
        pass
except StalledError as error:
    stalled = str(error)
with ray_session(cluster.address, RuntimeConfig(num_workers=2), note=note) as resources:
    look(resources)
runtime = RuntimeConfig(device="cuda", num_workers=3, train_workers=2, stall_minutes=1)
for _ in range(2):
    with ray_session(cluster.address, runtime, note=note) as resources:
        look(resources)
nodes[0].terminate()
nodes[0].wait()
cluster.shutdown()
print(json.dumps([said, found, stalled]))
"""


def run_apart(program: str) -> Any:
    """Run a program in a process of its own; return the JSON that it prints last."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


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
    assert run_apart(_SHARES) == [13, 13]


@pytest.mark.ray
@pytest.mark.ray
def test_ray_session__within_another_does_not_leave_the_gpus_that_are_gone_for_the_moment(local_ray: None) -> None:
    with ray_session(None, RuntimeConfig(device="cuda", train_workers=3)) as resources:
        assert (resources.device, resources.num_workers, resources.train_workers) == ("cuda", 1, 3)
    with ray_session(None, RuntimeConfig()) as resources:
        assert (resources.device, resources.train_workers) == ("cpu", 1)


def test_ray_session__a_local_one_refuses_cuda_and_says_once_where_it_runs() -> None:
    said, refused, num_workers = run_apart(_LOCAL)
    assert refused == "runtime.device=cuda, but this Ray has no GPU; use auto or cpu"
    assert said == ["on 3 workers, CPU only: this Ray has no GPU"]
    assert num_workers == 3


@pytest.mark.slow
@pytest.mark.ray
def test_ray_session__on_a_cluster_waits_for_the_first_gpu_and_asks_for_as_many_as_workers() -> None:
    said, found, stalled = run_apart(_CLUSTER)
    assert stalled.startswith("runtime.device=cuda waited 0.02 minutes for a GPU, but this Ray still has none; ")
    request = "this Ray has none; its autoscaler is asked for"
    lacking = [line for line in said if line.startswith("runtime.")]
    assert lacking[0].startswith(
        "runtime.num_workers=3 asks for more workers than the 1 that this Ray has room for (3 CPUs, 1 GPUs): "
    )
    assert [line for line in said if line not in lacking] == [
        f"waiting at most 0.02 minutes for a GPU, since {request} 1",
        "on 2 workers, CPU only: this Ray has no GPU (with runtime.device=cuda a run waits for one)",
        f"waiting at most 1 minutes for a GPU, since {request} 3",
        "on 3 workers with a GPU each",
        "on 3 workers with a GPU each",
    ]
    # Requests last until taken back, as the first and the third session have done; workers may outnumber GPUs.
    assert found == [["cpu", 2, 1, []], ["cuda", 3, 2, [{"GPU": 1}] * 3], ["cuda", 3, 2, []]]
