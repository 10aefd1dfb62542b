"""The lock of a folder: refused while another process lives, taken over when it is dead."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from transfgu_ray.errors import ArtifactError
from transfgu_ray.runs import lock
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
