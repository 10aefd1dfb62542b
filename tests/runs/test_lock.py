"""The lock of a folder: refused while another process lives, taken over when it is dead."""

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from tests.faults.storage import FaultyStore, s3_server
from transfgu_ray import storage
from transfgu_ray.errors import ArtifactError, StorageError
from transfgu_ray.runs import exclusive, lock
from transfgu_ray.runs.lock import LOCK, locked
from transfgu_ray.storage import Folder

HOLD = """
import sys, time
from transfgu_ray.runs.lock import locked
from transfgu_ray.storage import Folder
with locked(Folder(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""

# Waits for its own beginning, so that imports do not set the processes apart; holds what it gets until it is told.
RACE = """
import sys
from transfgu_ray.errors import ArtifactError
from transfgu_ray.runs import lock
from transfgu_ray.storage import Folder
lock._DYING_S = lock.PATIENCE_S = 1.0
for line in sys.stdin:
    folder = Folder(line.strip())
    try:
        with lock.locked(folder):
            print("locked", flush=True)
            sys.stdin.readline()
    except ArtifactError as error:
        print(error, flush=True)
        sys.stdin.readline()
    print("done", flush=True)
"""


class Racers:
    """Processes that try to lock a folder at the same moment."""

    def __init__(self, count: int, env: dict[str, str]) -> None:
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", RACE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | env,
            )
            for _ in range(count)
        ]

    def race(self, uri: str) -> list[str]:
        """Return what each said; all hold or have given up when this returns."""
        self._tell(uri)
        said = [process.stdout.readline().strip() for process in self.processes]
        self._tell("")
        assert [process.stdout.readline() for process in self.processes] == ["done\n"] * len(self.processes)
        return said

    def _tell(self, line: str) -> None:
        for process in self.processes:
            process.stdin.write(f"{line}\n")
            process.stdin.flush()

    def end(self) -> None:
        for process in self.processes:
            process.communicate()


@pytest.fixture
def racers() -> Iterator[Racers]:
    racers = Racers(6, {})
    yield racers
    racers.end()


@pytest.fixture(scope="module")
def store() -> Iterator[FaultyStore]:
    pytest.importorskip("moto", reason="moto, of the extra `test`, is not installed")
    with s3_server() as server:
        yield server


def one_alone(said: list[str]) -> bool:
    refused = [line for line in said if "is at work in" in line or "at the same moment" in line]
    return said.count("locked") == 1 and len(refused) == len(said) - 1


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.1)
    monkeypatch.setattr(lock, "PATIENCE_S", 1.0)
    monkeypatch.setattr(lock, "_DYING_S", 1.0)


def note(folder: Path) -> dict:
    return json.loads((folder / LOCK).read_text())


def test_locked__leaves_nothing(tmp_path: Path) -> None:
    with locked(Folder(str(tmp_path))):
        assert note(tmp_path)["pid"] == os.getpid()
        time.sleep(0.35)
        assert note(tmp_path)["beats"] >= 2
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError), locked(Folder(str(tmp_path))):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_locked__refused_while_a_process_lives_and_free_once_it_is_killed(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    refusal = rf"process {process.pid} of \S+ is at work in {tmp_path}; wait until it ends"
    with pytest.raises(ArtifactError, match=refusal), locked(Folder(str(tmp_path))):
        pass
    # Not yet collected: its entry in the process table is still there.
    os.kill(process.pid, signal.SIGKILL)
    with locked(Folder(str(tmp_path))):
        assert note(tmp_path)["pid"] == os.getpid()
    process.communicate()


@pytest.mark.parametrize("beating", [True, False])
def test_locked__owner_on_another_machine_lives_while_its_note_changes(tmp_path: Path, beating: bool) -> None:
    other = {"id": "a", "host": "node-7 boot", "pid": 1, "started": "1", "beats": 0}
    (tmp_path / LOCK).write_text(json.dumps(other))
    if beating:
        later = threading.Timer(0.3, lambda: (tmp_path / LOCK).write_text(json.dumps(other | {"beats": 1})))
        later.start()
        with pytest.raises(ArtifactError, match="process 1 of node-7 is at work"), locked(Folder(str(tmp_path))):
            pass
        later.join()
    else:
        with locked(Folder(str(tmp_path))):
            assert note(tmp_path)["id"] != "a"


def test_locked__a_later_process_of_the_same_number_is_another(tmp_path: Path) -> None:
    mine = {"id": "a", "host": lock._host(), "pid": os.getpid(), "started": "1", "beats": 0}
    (tmp_path / LOCK).write_text(json.dumps(mine))
    with locked(Folder(str(tmp_path))):
        assert note(tmp_path)["id"] != "a"


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"id": 1}'])
def test_locked__takes_over_a_damaged_note(tmp_path: Path, damage: str) -> None:
    (tmp_path / LOCK).write_text(damage)
    with locked(Folder(str(tmp_path))):
        assert note(tmp_path)["pid"] == os.getpid()


def test_locked__one_alone_of_several_that_begin_at_the_same_moment(tmp_path: Path, racers: Racers) -> None:
    for number in range(8):
        said = racers.race(str(tmp_path / str(number)))
        assert one_alone(said), said
        assert list((tmp_path / str(number)).iterdir()) == []


DEAD_NOTES = {
    "of a dead process here": lambda: {"host": lock._host(), "pid": os.getpid(), "started": "1"},
    "of a lost machine": lambda: {"host": "node-7 boot", "pid": 1, "started": "1"},
}


def dead_note(kind: str, number: int = 0) -> bytes:
    return json.dumps({"id": f"dead {number}", "beats": number} | DEAD_NOTES[kind]()).encode()


@pytest.mark.parametrize("kind", DEAD_NOTES)
def test_locked__one_alone_takes_over_from_a_dead_owner(tmp_path: Path, racers: Racers, kind: str) -> None:
    for number in range(4):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / LOCK).write_bytes(dead_note(kind, number))
        said = racers.race(str(folder))
        assert one_alone(said), said
        assert list(folder.iterdir()) == []


def test_locked__on_an_object_store_one_alone(store: FaultyStore) -> None:
    racers = Racers(4, store.env)
    try:
        for number in range(3):
            assert one_alone(racers.race(f"s3://bucket/free-{number}"))
        for number, kind in enumerate(DEAD_NOTES):
            with store.open().open_output_stream(f"bucket/dead-{number}/{LOCK}") as stream:
                stream.write(dead_note(kind))
            assert one_alone(racers.race(f"s3://bucket/dead-{number}"))
    finally:
        racers.end()
    assert [name for name in store.files("bucket") if LOCK in name] == []


@pytest.fixture
def on_store(store: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> Folder:
    for name, value in store.env.items():
        monkeypatch.setenv(name, value)
    return Folder("s3://bucket/run")


def test_create__a_conditional_put_needs_no_waiting(on_store: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exclusive, "SETTLE_S", 10**6)
    assert exclusive.create(on_store, "a", b"1")
    assert not exclusive.create(on_store, "a", b"2")
    assert on_store.read_bytes("a") == b"1"
    assert exclusive.create(on_store, "a", b"1"), "its own, whose answer was lost"


def test_create__endpoint_and_region_as_in_the_uri(store: FaultyStore, on_store: Folder) -> None:
    host = store.url.partition("://")[2]
    folder = Folder(f"s3://bucket/by-uri?scheme=http&endpoint_override={host}&region=us-east-1")
    assert exclusive._put_unless_there(folder, "a", b"1") is True
    assert exclusive._put_unless_there(folder, "a", b"2") is False
    assert Folder("s3://bucket/by-uri").read_bytes("a") == b"1"


def test_create__other_stores_settle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exclusive, "SETTLE_S", 0.3)
    folder = Folder(f"memory://{tmp_path.name}")
    later = threading.Timer(0.1, lambda: folder.write_bytes("a", b"2"))
    later.start()
    assert not exclusive.create(folder, "a", b"1"), "of two that found none, the last to write has it"
    later.join()
    assert exclusive.create(folder, "b", b"1")
    assert not exclusive.create(folder, "b", b"2")
    folder.delete("")


def test_create__without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    folder = Folder(str(tmp_path))
    assert exclusive.create(folder, "a", b"1")
    assert not exclusive.create(folder, "a", b"2")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"1"}


def test_locked__a_claim_of_a_killed_process_does_not_block(tmp_path: Path) -> None:
    chain = [dead_note("of a dead process here", number) for number in range(3)]
    (tmp_path / LOCK).write_bytes(chain[0])
    folder = Folder(str(tmp_path))
    for before, after in itertools.pairwise(chain):
        claim = lock._claim(folder, before, lock._Owner(**json.loads(after)))
        assert (tmp_path / claim).name.startswith(f"{LOCK}.after-")
        (tmp_path / claim).write_bytes(after)
    with locked(folder):
        assert note(tmp_path)["pid"] == os.getpid()
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_locked__an_unknown_owner_lives_while_its_note_changes(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("{")
    later = threading.Timer(0.3, lambda: (tmp_path / LOCK).write_text("{{"))
    later.start()
    with pytest.raises(ArtifactError, match=f"another process is at work in {tmp_path}"), locked(Folder(str(tmp_path))):
        pass
    later.join()


@pytest.mark.parametrize("time_of_file", [0, 2**33], ids=["1970", "2242"])
@pytest.mark.parametrize("beating", [True, False])
def test_locked__clocks_do_not_matter(tmp_path: Path, time_of_file: int, beating: bool) -> None:
    def write(beats: int) -> None:
        scratch = tmp_path.with_suffix(".note")
        scratch.write_bytes(json.dumps(json.loads(dead_note("of a lost machine")) | {"beats": beats}).encode())
        os.utime(scratch, (time_of_file, time_of_file))
        scratch.replace(tmp_path / LOCK)

    write(0)
    if not beating:
        with locked(Folder(str(tmp_path))):
            assert note(tmp_path)["pid"] == os.getpid()
        return
    later = threading.Timer(0.3, write, (1,))
    later.start()
    with pytest.raises(ArtifactError, match="is at work"), locked(Folder(str(tmp_path))):
        pass
    later.join()


def test_locked__a_note_that_cannot_be_read_is_not_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Down(pafs.LocalFileSystem):
        def open_input_file(self, path):
            raise OSError(errno.EIO, "Input/output error")

    written = dead_note("of a dead process here")
    (tmp_path / LOCK).write_bytes(written)
    folder = Folder(str(tmp_path))
    monkeypatch.setattr(folder, "fs", Down())
    monkeypatch.setattr(storage, "RETRY_S", 0.1)
    with pytest.raises(StorageError, match=rf"the storage does not answer: {tmp_path}/{LOCK}"), locked(folder):
        pass
    assert (tmp_path / LOCK).read_bytes() == written


def test_locked__the_work_ends_when_another_takes_the_lock(tmp_path: Path) -> None:
    other = dead_note("of a lost machine")
    words = rf"the lock of {tmp_path} was taken by process 1 of node-7; this command stopped"

    def work() -> None:
        with locked(Folder(str(tmp_path))):
            scratch = tmp_path.with_suffix(".note")
            scratch.write_bytes(other)
            scratch.replace(tmp_path / LOCK)
            threading.Event().wait(60)
            pytest.fail("the work went on")

    with pytest.raises(ArtifactError, match=words):
        work()
    assert (tmp_path / LOCK).read_bytes() == other, "it is not ours to delete"


def test_locked__a_lost_note_is_written_again(tmp_path: Path) -> None:
    with locked(Folder(str(tmp_path))):
        (tmp_path / LOCK).unlink()
        end = time.monotonic() + 60
        while not (tmp_path / LOCK).exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        assert note(tmp_path)["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_locked__a_failing_heartbeat_does_not_end_the_work(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with locked(Folder(str(folder))):
        shutil.rmtree(folder)
        folder.write_text("in the way")
        time.sleep(0.5)
        folder.unlink()
