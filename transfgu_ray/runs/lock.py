"""A lock that allows one writer per folder: a note of the owning process, refreshed while it lives."""

import contextlib
import hashlib
import itertools
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from transfgu_ray.background import interruptible, repeated
from transfgu_ray.errors import ArtifactError
from transfgu_ray.runs.exclusive import create
from transfgu_ray.storage import Folder

LOCK = ".lock.json"
_CLAIM = f"{LOCK}.after-"
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

    def __str__(self) -> str:
        return f"process {self.pid} of {self.host.partition(' ')[0]}"

    def note(self) -> bytes:
        """Return the owner as the content of a file."""
        return json.dumps(asdict(self), indent=1).encode()


@contextlib.contextmanager
def locked(folder: Folder) -> Iterator[None]:
    """Lock a folder for this process; refuse if another one works in it.

    A process on this machine is looked up by its id. One on another machine counts as alive while its note changes. No
    clocks are compared, so the folder of a lost machine is taken over after `PATIENCE_S`.

    Raises:
        ArtifactError: another process works there, or took the lock while this one could not renew it.
        StorageError: the storage does not answer.
    """
    mine = _Owner(uuid.uuid4().hex, _host(), os.getpid(), _started(os.getpid()) or "", 0)
    _acquire(folder, mine)
    try:
        with interruptible() as interrupt, repeated(_beat(folder.once(), mine, interrupt), seconds=BEAT_S, name="lock"):
            yield
    finally:
        # Should it fail, the next command finds the owner gone.
        with contextlib.suppress(OSError, ArtifactError):
            _delete_own(folder.once(), mine)


def _acquire(folder: Folder, mine: _Owner) -> None:
    while not create(folder, LOCK, mine.note()):
        note = folder.find_bytes(LOCK)
        # It may have been freed just now.
        if note is None:
            continue
        if _lives(folder, LOCK, note):
            raise ArtifactError(
                f"{_owner_in(note)} is at work in {folder.uri}; wait until it ends, or use another folder"
            )
        if _succeed(folder, note, mine):
            return


def _succeed(folder: Folder, note: bytes, mine: _Owner) -> bool:
    """Replace the note of a dead owner; return False if another process did.

    Raises:
        ArtifactError: another process is about to.
    """
    claim = _claim(folder, note, mine)
    if claim is None:
        return False
    try:
        # Claims go only after the note has changed, so that a later one on the same note ends here.
        if folder.find_bytes(LOCK) != note:
            return False
        folder.write_bytes(LOCK, mine.note())
    finally:
        with contextlib.suppress(OSError, ArtifactError):
            folder.delete(claim)
    for name in [name for name, _ in folder.files() if name.startswith(_CLAIM)]:
        folder.delete(name)
    return True


def _claim(folder: Folder, note: bytes, mine: _Owner) -> str | None:
    """Create the claim that only one process can create: it is named after the note, which is a dead owner's.

    A claim of a process that died itself is claimed likewise.

    Returns:
        its name; None if another process had it and is done.

    Raises:
        ArtifactError: a living process has it.
    """
    while True:
        claim = f"{_CLAIM}{hashlib.sha256(note).hexdigest()[:16]}"
        if create(folder, claim, mine.note()):
            return claim
        other = folder.find_bytes(claim)
        if other is None:
            return None
        if _lives(folder, claim, other):
            raise ArtifactError(f"{_owner_in(other)} began in {folder.uri} at the same moment; use another folder")
        note = other


def _beat(folder: Folder, mine: _Owner, interrupt: Callable[[Exception], None]) -> Callable[[], None]:
    """Return what renews the note, and ends the work if the lock is another's by now."""
    beats = itertools.count(1)

    def beat() -> None:
        # A failing storage is reported by the work itself, not by its lock.
        with contextlib.suppress(OSError, ArtifactError):
            renewed, note = replace(mine, beats=next(beats)).note(), folder.find_bytes(LOCK)
            if note is None:
                if create(folder, LOCK, renewed):
                    return
                note = folder.find_bytes(LOCK)
            owner = None if note is None else _parse(note)
            if owner is None or owner.id == mine.id:
                folder.write_bytes(LOCK, renewed)
                return
            interrupt(
                ArtifactError(
                    f"the lock of {folder.uri} was taken by {owner}; this command stopped, so that two do not write "
                    "there at once: wait until the other ends, or use another folder"
                )
            )

    return beat


def _delete_own(folder: Folder, mine: _Owner) -> None:
    note = folder.find_bytes(LOCK)
    owner = None if note is None else _parse(note)
    if owner is not None and owner.id == mine.id:
        folder.delete(LOCK)


def _lives(folder: Folder, name: str, note: bytes) -> bool:
    """Return whether the process that wrote a note or claim lives; of an unknown one, whether the file changes."""
    owner = _parse(note)
    here = owner is not None and owner.host == _host()
    end = time.monotonic() + (_DYING_S if here else PATIENCE_S)
    while time.monotonic() < end:
        if owner is not None and here and _started(owner.pid) != owner.started:
            return False
        if not here and folder.find_bytes(name) != note:
            return True
        time.sleep(0.2)
    return here


def _parse(note: bytes) -> _Owner | None:
    """Return the owner in a note; None if it is damaged."""
    try:
        owner = _Owner(**json.loads(note))
    except (ValueError, TypeError):
        return None
    kinds = [type(value) for value in asdict(owner).values()]
    return owner if kinds == [str, str, int, str, int] else None


def _owner_in(note: bytes) -> str:
    return str(_parse(note) or "another process")


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
