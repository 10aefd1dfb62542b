"""Random surroundings of a command: `python -m tests.environments --count 500 --seed 0`.

Each is a choice of variables, user, umask, working directory and limits, drawn by its own number, so that one that
failed can be tried again alone. In all of them a command may work, or refuse in a sentence, but never break down.
"""

import argparse
import functools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_REPOSITORY = Path(__file__).resolve().parents[1]
_TIMEOUT_S = 120
UID = 12345
# What each variable may be; {own} is a folder of the environment's user, {long} one with a path of 99 characters.
_VARIABLES: dict[str, tuple[str, ...]] = {
    "HOME": ("/", "/nowhere", "", "{own}", "relative", "/dev/null"),
    "TMPDIR": ("{long}", "/nowhere", "", "{own}", "relative", "/dev/null", "/proc"),
    "USER": ("", "nobody"),
    "LANG": ("C", "xx_YY.nothing", "en_US.ISO-8859-1", "", "POSIX"),
    "LC_ALL": ("C", "xx_YY", "tr_TR.UTF-8"),
    "PYTHONIOENCODING": ("ascii", "latin-1"),
    "COLUMNS": ("0", "abc", "-5", "1", "100000"),
    "LINES": ("0", "abc"),
    "TERM": ("", "dumb", "nothing"),
    "NO_COLOR": ("1",),
    "OMP_NUM_THREADS": ("abc", "0", "-1", "4,2", "", "1000"),
    "MKL_NUM_THREADS": ("abc", "0"),
    "OMP_PROC_BIND": ("nothing", "true"),
    "XDG_CACHE_HOME": ("/nowhere", "relative", "{own}"),
    "MPLCONFIGDIR": ("/nowhere", "/dev/null"),
    "MPLBACKEND": ("nothing", "TkAgg"),
    "RAY_TMPDIR": ("/nowhere", "{long}", "/dev/null", ""),
    "RAY_ADDRESS": ("127.0.0.1:9", "nothing", "auto", "local", "ray://127.0.0.1:9", "127.0.0.1:99999", ""),
    "RAY_AUTH_MODE": ("token", "disabled", "abc", ""),
    "RAY_AUTH_TOKEN": ("short", ""),
    "RAY_AUTH_TOKEN_PATH": ("/nowhere/token", "/dev/null", "{own}"),
    "RAY_object_timeout_milliseconds": ("abc", "100"),
    "RAY_memory_monitor_refresh_ms": ("-x", "0"),
    "RAY_RUNTIME_ENV_HOOK": ("abc", "a.b"),
    "RAY_OVERRIDE_RESOURCES": ("abc", "{{}}"),
    "RAY_NAMESPACE": ("%", ""),
    "RAY_BACKEND_LOG_LEVEL": ("abc", "debug"),
    "RAY_DEDUP_LOGS_SKIP_REGEX": ("(",),
    "RAY_GCS_SERVER_PORT": ("abc", "99999"),
    "RAY_JOB_CONFIG_JSON_ENV_VAR": ("abc",),
    "RAY_USE_TLS": ("1", "abc"),
    "RAY_NODE_IP_ADDRESS": ("abc",),
    "MLFLOW_TRACKING_URI": ("nothing://x", "http://127.0.0.1:9", "", "/dev/null/x"),
    "MLFLOW_HTTP_REQUEST_TIMEOUT": ("abc",),
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": ("abc", "-1"),
    "MLFLOW_RUN_ID": ("nothing",),
    "MLFLOW_EXPERIMENT_NAME": ("",),
}
_FOLDERS = ("usual", "/", "/proc", "deleted")
_UMASKS = (0o000, 0o077, 0o777, 0o277)
_LIMITS: dict[str, tuple[int, ...]] = {
    "RLIMIT_NOFILE": (16, 64, 256, 1024),
    "RLIMIT_NPROC": (1, 50, 200),
    "RLIMIT_AS": (2**28, 2**31, 2**34),
    "RLIMIT_FSIZE": (0, 2**20),
    # With less, Python itself ends before it reaches the command.
    "RLIMIT_STACK": (2**20, 2**22),
    "RLIMIT_CORE": (0,),
}


@dataclass
class Environment:
    """The surroundings of one call.

    Attributes:
        variables: set beside PATH and PYTHONPATH.
        folder: working directory.
        umask: of the process; None = as it is.
        limits: soft and hard ones, by their names in `resource`.
        is_unprivileged: whether the process belongs to a user without name or home.
    """

    variables: dict[str, str] = field(default_factory=dict)
    folder: str = "usual"
    umask: int | None = None
    limits: dict[str, int] = field(default_factory=dict)
    is_unprivileged: bool = False


def draw(number: int, *, may_change_user: bool) -> Environment:
    """Return the environment of a number."""
    rng = random.Random(number)  # not for secrets
    names = rng.sample(sorted(_VARIABLES), rng.choice((1, 1, 2, 3, 6)))
    limit = rng.choice(sorted(_LIMITS))
    return Environment(
        {name: rng.choice(_VARIABLES[name]) for name in names},
        rng.choice(_FOLDERS) if rng.random() < 0.3 else "usual",
        rng.choice(_UMASKS) if rng.random() < 0.3 else None,
        {limit: rng.choice(_LIMITS[limit])} if rng.random() < 0.3 else {},
        may_change_user and rng.random() < 0.4,
    )


@functools.cache
def why_no_other_user() -> str | None:
    """Return why no process of another user can be tried here; None if it can."""
    if os.getuid() != 0:
        return "only root can start processes of another user"
    if not _is_readable_by_others(Path(sys.executable)):
        return "other users cannot read this Python"
    return None if _is_readable_by_others(_REPOSITORY) else "other users cannot read this checkout"


def _is_readable_by_others(path: Path) -> bool:
    return all(folder.stat().st_mode & 0o001 for folder in (path.resolve(), *path.resolve().parents, *path.parents))


def call(environment: Environment, arguments: Callable[[Path], list[str]]) -> tuple[int, str]:
    """Run a command in an environment; return its exit code and what it printed.

    Args:
        environment: of the process.
        arguments: of the command, given a folder that it may write.
    """
    # Not below the folder of the tests, which other users cannot enter.
    own = Path(tempfile.mkdtemp(prefix="env", dir="/tmp"))
    long = own / ("x" * (98 - len(str(own))))
    usual, deleted = own / "usual", own / "deleted"
    for folder in (long, usual, deleted):
        folder.mkdir()
    folders = {"usual": str(usual), "deleted": str(deleted)}
    if environment.is_unprivileged:
        for folder in (own, long, usual, deleted):
            os.chown(folder, UID, UID)
    try:
        process = _started(
            [sys.executable, "-c", _ENTER, folders.get(environment.folder, environment.folder), *arguments(usual)],
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(_REPOSITORY),
                "PYTHONDONTWRITEBYTECODE": "1",
                **{name: value.format(own=usual, long=long) for name, value in environment.variables.items()},
            },
            umask=-1 if environment.umask is None else environment.umask,
            preexec_fn=lambda: _enter(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        return process.returncode, output.decode(errors="replace")
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _started(command: list[str], **how: Any) -> subprocess.Popen[bytes]:
    """Start a process; where the user's limit is used up by what has ended but is not reaped yet, a little later."""
    for wait in (1, 2, 4, 8):
        try:
            return subprocess.Popen(command, **how)
        except BlockingIOError:
            time.sleep(wait)
    return subprocess.Popen(command, **how)


# The working directory goes after the process has begun in it.
_ENTER = """
import os, sys
folder, *arguments = sys.argv[1:]
os.chdir(folder)
if folder.endswith("/deleted"):
    os.rmdir(folder)
sys.argv = ["transfgu", *arguments]
sys.path.remove("")
from transfgu_ray.cli import main
main()
"""


def _enter(environment: Environment) -> None:
    for name, value in environment.limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if environment.is_unprivileged:
        os.setgroups([])
        os.setgid(UID)
        os.setuid(UID)


def fault(code: int, output: str) -> str | None:
    """Return what is wrong with the end of a command; None if nothing is."""
    if "Traceback" in output or "terminate called" in output or "core dumped" in output:
        return "broke down"
    return None if code in (0, 1, 2) else f"ended with {code}"


def commands(model: Path, photographs: Path) -> list[Callable[[Path], list[str]]]:
    """Return what is tried in each environment."""
    (first, *_) = sorted(photographs.glob("*.jpg"))
    return [
        lambda own: ["predict", str(model), "--images", str(first), "--out", str(own / "masks")],
        lambda own: ["datasets", "check", "folder", str(photographs)],
    ]


def main() -> int:
    """Try many; print each that fails and return whether any did."""
    from tests.builders import make_folder
    from tests.models.test_model import _saved

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--only", choices=("predict", "datasets"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    failed, counts = 0, Counter[int]()
    with tempfile.TemporaryDirectory(prefix="envs", dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        photographs = make_folder(Path(folder, "photographs"), num_images=1)
        _saved(Path(folder, "model"))
        tried = commands(Path(folder, "model"), photographs)
        for number in range(options.seed, options.seed + options.count):
            environment = draw(number, may_change_user=why_no_other_user() is None)
            for arguments in tried:
                if options.only not in (None, arguments(Path())[0]):
                    continue
                code, output = call(environment, arguments)
                counts[code] += 1
                if reason := fault(code, output):
                    failed += 1
                    sys.stdout.write(f"{number}: {arguments(Path())[0]} {reason}: {environment}\n{output[-1500:]}\n")
                    sys.stdout.flush()
    ends = ", ".join(f"{count} x {code}" for code, count in sorted(counts.items()))
    sys.stdout.write(f"{options.count} environments, {failed} failed; exit codes: {ends}\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
