"""The process group in which the workers of a training find each other."""

import os
import sys
import tempfile
from typing import Any

import ray
from ray.train.torch.config import (
    TorchConfig,
    _set_torch_distributed_env_vars,
    _setup_torch_process_group,
    _TorchBackend,
)


class LoopbackTorchConfig(TorchConfig):
    """Ray Train's configuration, except that workers on a single machine do not listen to other machines."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """Return the class that starts the process group."""
        return _LoopbackBackend


class _LoopbackBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Let workers on a single machine meet through a file, as PyTorch's own store listens on every interface."""
        if len(set(worker_group.execute(_node_id))) > 1:
            super().on_start(worker_group, backend_config)
            return
        worker_group.execute(_set_torch_distributed_env_vars)
        worker_group.execute(_use_loopback)
        folder = worker_group.execute_single(0, tempfile.mkdtemp)
        joined = [
            worker_group.execute_single_async(
                rank,
                _setup_torch_process_group,
                backend=backend_config.backend,
                world_rank=rank,
                world_size=len(worker_group),
                init_method=f"file://{folder}/store",
                timeout_s=backend_config.timeout_s,
            )
            for rank in range(len(worker_group))
        ]
        ray.get(joined)


def _node_id() -> str:
    return ray.get_runtime_context().get_node_id()


def _use_loopback() -> None:
    if sys.platform == "linux":
        # Otherwise Gloo listens on the address that the host name resolves to.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
