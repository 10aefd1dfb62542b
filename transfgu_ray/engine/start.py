"""Starting a Ray on this machine, or connecting to one, in whatever surroundings, and ending it."""

import atexit
import ctypes
import importlib
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transfgu_ray.background import repeated
from transfgu_ray.config.sections import RuntimeConfig
from transfgu_ray.cores import usable_cores
from transfgu_ray.engine.environment import kept_environment
from transfgu_ray.engine.versions import require_same_code
from transfgu_ray.errors import ConfigError, foreign_words
from transfgu_ray.surroundings import is_writable, scratch_folder

_STARTS = 3
_LOGGED: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
# The longest path of a socket that Linux takes, less what Ray adds to its folder.
_LONGEST_FOLDER = 107 - len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1")
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")  # nosec B108  # parents of a private folder
# What is looked up, connected to and answered within it.
_PROBE_S = 5.0
_CLIENT_PORT = 10001


class _Started:
    """Whether the Ray of this process is one that it started."""

    here = False


def is_started_here() -> bool:
    """Return whether this process started its Ray, which then has the resources of this machine and no others."""
    return _Started.here


def import_ray(runtime: RuntimeConfig, *, is_local: bool) -> None:
    """Import Ray with the variables that it reads on import.

    Args:
        runtime: threads of the workers.
        is_local: whether it is to be started on this machine alone.

    Raises:
        ConfigError: a variable of the environment is one that Ray does not take.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Ray prints this amid the progress whenever several trials, each with several processes, run at once.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "worker processes have been started on node")
    if is_local:
        # 0 makes every process of a single machine listen on loopback only. The driver of a cluster must not set it,
        # or other nodes could not reach it.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        _provide_token()
    # Each worker would otherwise use all cores: intra-op threads come from the configuration.
    os.environ.setdefault("OMP_NUM_THREADS", str(runtime.threads))
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    if "ray" not in sys.modules:
        try:
            importlib.import_module("ray")
        except Exception as error:  # noqa: BLE001  # of any class: Ray reads each variable in its own way
            raise ConfigError(
                f"Ray cannot be loaded: {foreign_words(error)}; check the RAY_* variables of the environment"
            ) from None


def _provide_token() -> None:
    """Let the processes of a local Ray know each other by a token of their own where no lasting one can be kept."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    home = os.environ.get("HOME")
    lasting = Path(named) if named else Path(home, ".ray", "auth_token") if home else None
    if lasting is not None:
        try:
            if lasting.read_text().strip():
                return
        except FileNotFoundError:
            # Ray makes its own file, but none that somebody named.
            if not named and is_writable(lasting.parent):
                return
        except (OSError, UnicodeError):
            pass
    own = scratch_folder() / "ray_token"
    own.touch(mode=0o600)
    own.write_text(secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(own)


def start_ray(runtime: RuntimeConfig, *, dashboard: bool) -> None:
    """Start a local Ray; try again where a busy machine takes longer than the 30 s that Ray allows itself.

    Raises:
        ConfigError: Ray does not start in these surroundings.
    """
    import ray

    _require_memory(runtime.object_store_mb)
    settings = {
        # Ignore any cluster that already runs on this machine.
        "address": "local",
        # Slots, not cores: below four, Ray Train and the Ray Data that feeds it can wait for each other.
        "num_cpus": max(usable_cores(), 4),
        "include_dashboard": dashboard,
        "object_store_memory": runtime.object_store_mb * 2**20,
        "job_config": _job_config(sys.path),
        "_temp_dir": _temporary_folder(),
        **_LOGGED,
    }
    for attempt in range(_STARTS):
        try:
            with _quiet_start(), _own_address():
                ray.init(**settings)
            _Started.here = True
            return
        # Ray raises no narrower class here.
        except Exception as error:
            shut_down()
            if "timed out during startup" not in str(error) or attempt == _STARTS - 1:
                raise ConfigError(
                    f"no Ray can be started on this machine: {foreign_words(error)}; give it what it lacks, or name a "
                    "cluster by --ray-address"
                ) from error


def _require_memory(object_store_mb: int) -> None:
    """Refuse an object store that is larger than the memory.

    Raises:
        ConfigError: it is.
    """
    # In a container, its limit.
    utils: Any = importlib.import_module("ray._common.utils")
    memory_mb = utils.get_system_memory() // 2**20
    if object_store_mb > memory_mb:
        raise ConfigError(
            f"runtime.object_store_mb={object_store_mb} is more than the memory of this machine, {memory_mb} MB; ask "
            "for a part of it"
        )


def connect(address: str) -> None:
    """Connect to the Ray at an address.

    Raises:
        ConfigError: none answers there, or it is of another version.
    """
    import ray

    _require_answer(address)
    here = os.getcwd()
    try:
        with _quiet_start():
            ray.init(address=address, job_config=_job_config([here] if here in sys.path else []), **_LOGGED)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        shut_down()
        raise ConfigError(f"no Ray cluster answers at --ray-address {address}: {foreign_words(error)}") from None
    require_same_code()


def shut_down() -> None:
    """Leave Ray, and end it if it was started here."""
    import ray

    _Started.here = False
    with _kept_sigterm():
        ray.shutdown()


@contextmanager
def _kept_sigterm() -> Iterator[None]:
    """Keep the handler of SIGTERM, which Ray takes when it starts and when it ends.

    Its Python handler ends the process before anything else is closed, that of its C++ core aborts it within 3 seconds.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    utils: Any = importlib.import_module("ray._private.utils")
    of_ray, handler = utils.set_sigterm_handler, signal.getsignal(signal.SIGTERM)
    utils.set_sigterm_handler = lambda _: None
    # Only the main thread may set a handler in Python, and it is busy.
    get_handler, set_handler = ctypes.pythonapi.PyOS_getsig, ctypes.pythonapi.PyOS_setsig
    get_handler.restype = set_handler.restype = ctypes.c_void_p
    set_handler.argtypes = [ctypes.c_int, ctypes.c_void_p]
    kept = get_handler(signal.SIGTERM)
    try:
        with repeated(lambda: set_handler(signal.SIGTERM, kept), seconds=0.01, name="signals"):
            yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        utils.set_sigterm_handler = of_ray


def _job_config(paths: list[str]) -> Any:
    """Return the settings of a job whose workers search these folders first, in this order, and no others of ours.

    By itself Ray adds the working directory, where anything may lie: the workers would import what this process does
    not.
    """
    from ray.job_config import JobConfig

    class Searching(JobConfig):
        def _serialize(self) -> Any:
            # Workers put each before those that came earlier.
            self._py_driver_sys_path = [os.path.abspath(path) for path in reversed(paths)]
            return super()._serialize()

    return Searching()


def _temporary_folder() -> str:
    """Return the folder of a local Ray, whose sockets lie so deep in it that its path must be short.

    Raises:
        ConfigError: there is none.
    """
    # As Ray itself chooses it.
    default = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", "ray").absolute()  # nosec B108
    if len(os.fsencode(default)) <= _LONGEST_FOLDER and is_writable(default):
        return str(default)
    parents = [scratch_folder(), *map(Path, _SHORT_FOLDERS)]
    for parent in parents:
        if len(os.fsencode(parent)) + len("/ray-12345678") <= _LONGEST_FOLDER and is_writable(parent):
            folder = tempfile.mkdtemp(prefix="ray-", dir=parent)
            # After Ray, which is asked first.
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            return folder
    raise ConfigError(
        f"Ray needs a writable folder whose path has at most {_LONGEST_FOLDER} bytes, unlike {default}; set RAY_TMPDIR "
        "to one"
    )


@contextmanager
def _own_address() -> Iterator[None]:
    """Give the processes of a local Ray its address, through the environment that they inherit.

    Without it, Ray Train's cleaner searches the machine for a Ray and, if it finds two, frees none of the resources of
    a stopped training.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = {"RAY_GCS_SERVER_PORT": str(port), "RAY_ADDRESS": f"127.0.0.1:{port}"}
    with kept_environment(*address):
        os.environ.update(address)
        yield


@contextmanager
def _quiet_start() -> Iterator[None]:
    """Discard what Ray's C++ core prints while it starts; errors are still raised as exceptions."""
    sys.stderr.flush()
    kept = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        with _kept_sigterm():
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def _require_answer(address: str) -> None:
    """Find out within seconds whether anything answers at an address: Ray itself would try for a quarter of an hour.

    Raises:
        ConfigError: nothing does.
    """
    host, port = _host_and_port(address)
    if host is None:
        return
    said = f"no Ray cluster answers at --ray-address {address}"
    advice = "start one with `ray start --head`, correct the address, or leave it out to start a local Ray"
    try:
        with socket.create_connection((host, port), timeout=_PROBE_S):
            pass
    except OSError as error:
        raise ConfigError(f"{said}: {error.strerror or error}; {advice}") from None
    # Ray speaks TLS then, with certificates that it reads itself.
    if os.environ.get("RAY_USE_TLS", "0") not in ("0", ""):
        return
    grpc: Any = importlib.import_module("grpc")  # without types of its own
    with grpc.insecure_channel(f"{host}:{port}") as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_PROBE_S)
        except grpc.FutureTimeoutError:
            raise ConfigError(f"{said}: what listens there is no Ray; {advice}") from None


def _host_and_port(address: str) -> tuple[str | None, int]:
    """Return where a Ray is to be looked for; None where Ray finds out itself that there is none.

    Raises:
        ConfigError: the address has no such form.
    """
    if address == "auto":
        utils: Any = importlib.import_module("ray._private.utils")
        address = os.environ.get("RAY_ADDRESS", "auto")
        address = (utils.read_ray_address() or "auto") if address == "auto" else address
        if address == "auto":
            return None, 0
    form, _, place = address.rpartition("://")
    host, _, port = place.rpartition(":")
    if form == "ray" and not host:
        host, port = place, str(_CLIENT_PORT)
    if form not in ("", "ray") or not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ConfigError(f"--ray-address {address} must be host:port, ray://host:port, auto or local")
    return host.strip("[]"), int(port)
