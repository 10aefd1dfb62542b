"""What a process finds where it is started, made fit for the libraries that would fail on it.

Containers and schedulers start processes as users without a name or a home, with folders that cannot be written, and
with variables that were meant for other programs. What can be replaced is replaced, for this process and for those
that it starts; the rest is refused in one sentence.
"""

import atexit
import functools
import math
import os
import pwd
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from transfgu_ray.errors import ConfigError

# Of these, libraries read a number of threads; garbage makes them print, or fail.
_THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
# Of each limit: what a command needs, what it takes if it may, the unit, and the option of `ulimit`. More files help
# nobody, and some programs close every possible one when they start.
_LIMITS = {
    "RLIMIT_NOFILE": (64, 65536, "open files", "-n"),
    "RLIMIT_STACK": (2**20, 2**20, "bytes of stack", "-s"),
    "RLIMIT_AS": (2**32, 2**32, "bytes of address space", "-v"),
}


def settle_surroundings() -> None:
    """Replace what libraries would fail on, before they are imported.

    Raises:
        ConfigError: there is no working directory, no folder for temporary files, or a variable that Ray does not take.
    """
    try:
        Path.cwd()
    except OSError as error:
        raise ConfigError(
            f"the working directory cannot be used ({error.strerror}); change to another folder, e.g. `cd ~`"
        ) from None
    # Whoever creates a file must be able to use it.
    os.umask(os.umask(0o077) & 0o077)
    for stream in (sys.stdout, sys.stderr):
        # Names of photographs may hold what the encoding of the terminal lacks.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    _settle_temporary_folder()
    _settle_user()
    for name in _THREADS:
        if name in os.environ and not all(part.isdigit() and int(part) for part in os.environ[name].split(",")):
            del os.environ[name]
    _settle_limits()
    _require_readable_settings()


def _settle_limits() -> None:
    """Take as much as the limits of the process allow, and refuse those that end it amid the work.

    Raises:
        ConfigError: one is too small.
    """
    for name, (least, wanted, unit, option) in _LIMITS.items():
        kind = getattr(resource, name)
        soft, hard = (math.inf if value == resource.RLIM_INFINITY else value for value in resource.getrlimit(kind))
        if hard < least:
            raise ConfigError(
                f"this process may have {hard:.0f} {unit}, but needs at least {least}; raise the limit (`ulimit "
                f"{option}`, or the memory that a job asks for)"
            )
        if soft < min(wanted, hard):
            resource.setrlimit(kind, (int(min(wanted, hard)), -1 if hard == math.inf else int(hard)))


def _require_readable_settings() -> None:
    """Refuse values of Ray's own settings that end the process which reads them, as its core does without a word."""
    names = sorted(name for name in os.environ if name.startswith("RAY_") and name[4:5].islower())
    if not names:
        return
    command = [sys.executable, "-c", "import ray"]
    tried = subprocess.run(command, capture_output=True, check=False)  # nosec B603  # fixed arguments
    if tried.returncode < 0:
        raise ConfigError(f"Ray does not take the value of {' or '.join(names)} in the environment; unset it")


def _settle_temporary_folder() -> None:
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError:
        raise ConfigError(
            "there is no folder for temporary files: neither $TMPDIR, /tmp, /var/tmp nor the working directory can be "
            "written; set TMPDIR to one that can"
        ) from None
    # Python passes over one that it cannot write, other programs do not.
    if "TMPDIR" in os.environ:
        os.environ["TMPDIR"] = os.path.abspath(folder)


def _settle_user() -> None:
    """Give the process a name, a home and places for caches, as far as it lacks them."""
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        os.environ.setdefault("USER", f"uid{os.getuid()}")
        # Else the home of a user is looked up by its name, which fails.
        os.environ.setdefault("HOME", "/")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    if not is_writable(caches):
        os.environ["XDG_CACHE_HOME"] = str(scratch_folder() / "cache")
    configs = Path(os.environ.get("MPLCONFIGDIR") or Path("~/.config").expanduser())
    if not is_writable(configs):
        os.environ["MPLCONFIGDIR"] = str(scratch_folder() / "matplotlib")


@functools.cache
def scratch_folder() -> Path:
    """Return a folder for this user alone that goes when the process ends."""
    folder = tempfile.mkdtemp(prefix="transfgu-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def is_writable(folder: Path) -> bool:
    """Return whether a folder can be written, or made where there is none."""
    try:
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        # A folder above it cannot be entered.
        return False
