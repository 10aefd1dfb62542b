"""Starting Ray where the surroundings refuse something, and connecting to what is no Ray, or one of another version."""

import os
import socket
import stat
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

from tests import environments
from tests.builders import make_folder
from tests.models.test_model import _saved
from transfgu_ray.config.sections import RuntimeConfig
from transfgu_ray.engine import session, start
from transfgu_ray.engine.versions import require_same_code
from transfgu_ray.errors import ConfigError, foreign_words

pytestmark = pytest.mark.reports

_SHADOWED = """
import os, sys
import ray
from transfgu_ray.config.sections import RuntimeConfig
from transfgu_ray.engine.session import ray_session

def found():
    import timm, transfgu_ray
    return timm.__file__, transfgu_ray.__file__

sys.path.remove("")
os.chdir(sys.argv[1])
with ray_session(None, RuntimeConfig(object_store_mb=100)):
    assert ray.get(ray.remote(found).remote()) == found()
"""


@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
def test_temporary_folder__is_short_and_writable(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR")
    for bad in (tmp_path / ("x" * 99), "/dev/null/x"):
        monkeypatch.setenv(name, str(bad))
        folder = start._temporary_folder()
        assert len(f"{folder}/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store") <= 107
        assert os.access(folder, os.W_OK)
    monkeypatch.setenv(name, "/tmp")
    assert start._temporary_folder() == "/tmp/ray"


@pytest.mark.parametrize("named", [None, "/dev/null/token"])
def test_token__of_its_own_where_none_can_be_kept(named: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", named or "")
    start._provide_token()
    path = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert len(path.read_text()) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_token__a_lasting_one_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("mine")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    start._provide_token()
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "token")


@pytest.mark.parametrize("form", ["{}", "ray://{}"])
def test_connect__a_cluster_that_is_gone_is_told_in_seconds(form: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"127.0.0.1:{server.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(ConfigError, match="what listens there is no Ray"):
            start.connect(form.format(place))
    with pytest.raises(ConfigError, match=f"at --ray-address .*{place}: Connection refused; start one with"):
        start.connect(form.format(place))
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("address", ["nothing", "host:99999", "http://host:80", ":6379", "ray://"])
def test_connect__refuses_what_is_no_address(address: str) -> None:
    with pytest.raises(ConfigError, match="must be host:port"):
        start.connect(address)


@pytest.mark.ray
def test_require_same_code__names_the_node_and_both_versions(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    require_same_code()
    monkeypatch.setattr(metadata, "version", lambda name: "0.0.1+cpu")
    with pytest.raises(ConfigError, match=r"node 127\.0\.0\.1 of the cluster has torch [1-9].*, this process 0\.0\.1"):
        require_same_code()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train_workers": 8}, r"runtime.train_workers=8 .* the 5 that .* \(4 CPUs\)"),
        ({"train_workers": 8, "min_train_workers": 6}, "runtime.min_train_workers=6"),
        ({"num_workers": 6}, "runtime.num_workers=6"),
        ({"train_workers": 8, "min_train_workers": 5, "num_workers": 5}, None),
        ({}, None),
    ],
)
@pytest.mark.parametrize("is_local", [True, False])
def test_require_room__a_local_ray_refuses_what_a_cluster_waits_for(
    settings: dict[str, int], words: str | None, is_local: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_granted", lambda: {"CPU": 4.0})
    monkeypatch.setattr(session, "is_started_here", lambda: is_local)
    runtime, said = RuntimeConfig(**settings), []
    resources = session.Resources(2, 2, 1, device="cpu", threads=1, num_blocks=None)
    if words and is_local:
        with pytest.raises(ConfigError, match=words):
            session._require_room(resources, runtime, said.append)
        return
    session._require_room(resources, runtime, said.append)
    assert len(said) == bool(words)
    assert all("waits until nodes join" in line for line in said)


def test_require_memory__refuses_a_store_larger_than_the_machine() -> None:
    with pytest.raises(ConfigError, match="object_store_mb=100000000 is more than the memory"):
        start._require_memory(10**8)


def test_foreign_words__keep_what_comes_after_the_first_line() -> None:
    error = RuntimeError("Version mismatch:\n  cluster: Ray 2.60\n  here: Ray 2.61\n")
    assert foreign_words(error) == "Version mismatch: cluster: Ray 2.60 here: Ray 2.61"
    assert foreign_words(ValueError()) == "ValueError"
    assert foreign_words(ValueError("a" * 500 + "b" * 500), most=10) == "aaaaa [...] bbbbb"


@pytest.mark.ray
@pytest.mark.slow
def test_workers__do_not_import_what_lies_in_the_working_directory(tmp_path: Path) -> None:
    for name in ("timm", "transfgu_ray"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('another one')")
    subprocess.run([sys.executable, "-c", _SHADOWED, str(tmp_path)], check=True)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        environments.Environment({"TMPDIR": "{long}", "RAY_DEDUP_LOGS_SKIP_REGEX": "("}),
        environments.Environment({"RAY_object_timeout_milliseconds": "abc"}),
        environments.Environment({"HOME": "/", "OMP_NUM_THREADS": "abc", "COLUMNS": "abc"}, is_unprivileged=True),
        environments.Environment({"HOME": "/nowhere", "LANG": "xx_YY.nothing"}, folder="deleted", umask=0o777),
        environments.Environment(limits={"RLIMIT_AS": 2**28}),
    ],
    ids=["long TMPDIR", "garbage for Ray", "no name and no home", "no folder", "little memory"],
)
def test_commands__never_break_down_in_bad_surroundings(environment: environments.Environment, tmp_path: Path) -> None:
    if environment.is_unprivileged and (reason := environments.why_no_other_user()):
        pytest.skip(reason)
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)
    photographs = make_folder(tmp_path / "photographs", num_images=1)
    _saved(tmp_path / "model")
    for arguments in environments.commands(tmp_path / "model", photographs):
        code, output = environments.call(environment, arguments)
        assert environments.fault(code, output) is None, output
