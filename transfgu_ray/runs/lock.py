"""A lock that allows one writer per folder: a note of the owning process, refreshed while it lives."""

import contextlib
import itertools
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from transfgu_ray.background import repeated
from transfgu_ray.errors import ArtifactError
from transfgu_ray.storage import Folder

LOCK = ".lock.json"
BEAT_S = 5.0
# Longer than two beats, so that one late beat does not count as a missing one.
PATIENCE_S = 13.0
# A killed process has left the process table by then.
_DYING_S = 5.0


@dataclass(frozen=True)
class _Owner:
    """The process that works in a folder.

    Attributes:
        id: id of this lock.
        host: host of the process and its boot id, so that a restarted machine counts as another.
        pid: id of the process.
        started: its start time in ticks of its machine, which tells it from a later process of the same id.
        beats: grows while the process lives.
    """

    id: str
    host: str
    pid: int
    started: str
    beats: int


@contextlib.contextmanager
def locked(folder: Folder) -> Iterator[None]:
    """Lock a folder for this process; refuse if another one works in it.

    A process on this machine is looked up by its id. One on another machine counts as alive while its note changes. No
    clocks are compared, so the folder of a lost machine is taken over after `PATIENCE_S`.

    Raises:
        ArtifactError: another process works there.
    """
    owner = _read(folder)
    if owner is not None and _lives(owner, folder):
        raise ArtifactError(
            f"process {owner.pid} of {owner.host.partition(' ')[0]} is at work in {folder.uri}; wait until it ends, or "
            "use another folder"
        )
    mine = _Owner(uuid.uuid4().hex, _host(), os.getpid(), _started(os.getpid()) or "", 0)
    _write(folder, mine)
    # Of two processes that found it free at the same time, the last to write owns it.
    found = _read(folder)
    if found is None or found.id != mine.id:
        raise ArtifactError(f"another process began in {folder.uri} at the same moment; use another folder")
    beats = itertools.count(1)

    def beat() -> None:
        # A failing storage is reported by the work itself, not by its lock.
        with contextlib.suppress(ArtifactError):
            _write(folder, replace(mine, beats=next(beats)))

    try:
        with repeated(beat, seconds=BEAT_S, name="lock"):
            yield
    finally:
        with contextlib.suppress(OSError):
            folder.delete(LOCK)


def _lives(owner: _Owner, folder: Folder) -> bool:
    here = owner.host == _host()
    end = time.monotonic() + (_DYING_S if here else PATIENCE_S)
    while time.monotonic() < end:
        if here and _started(owner.pid) != owner.started:
            return False
        if not here and _read(folder) != owner:
            return True
        time.sleep(0.2)
    return here


def _read(folder: Folder) -> _Owner | None:
    """Return the note; None if it is missing or damaged."""
    try:
        return _Owner(**json.loads(folder.read_bytes(LOCK)))
    except (OSError, ValueError, TypeError):
        return None


def _write(folder: Folder, owner: _Owner) -> None:
    folder.write_json(LOCK, asdict(owner))


def _host() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}".strip()


def _started(pid: int) -> str | None:
    """Return when a process of this machine started; None if it is gone or a zombie."""
    try:
        # The name before the last bracket may itself hold spaces and brackets.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    # Machines without /proc.
    try:
        os.kill(pid, 0)
    except PermissionError:
        return ""
    except OSError:
        return None
    return ""
