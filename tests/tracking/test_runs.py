"""A tracking server or store that is away: nothing waits for it that need not, and nothing is lost."""

import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from tests.faults.cluster import free_port
from tests.faults.tracking import TrackingServer, tracking_server
from transfgu_ray.config.presets import get_preset
from transfgu_ray.config.run import RunConfig, build_config
from transfgu_ray.errors import ArtifactError
from transfgu_ray.storage import Folder
from transfgu_ray.tracking.client import has_run, hasty, patient
from transfgu_ray.tracking.registry import Registry
from transfgu_ray.tracking.runs import Tracked, begin, ended_on_error, epochs_logged, log_epochs
from transfgu_ray.tracking.sweeps import begin_sweep

HISTORY = [{"epoch": epoch, "round": 0, "loss": 1 / (1 + epoch), "score": 0.5} for epoch in range(6)]


def config_at(uri: str) -> RunConfig:
    return build_config(get_preset("tiny_cpu"), None, [f"tracking.uri={uri}"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    with tracking_server(tmp_path_factory.mktemp("server")) as running:
        yield running


def logged(tracked: Tracked, name: str) -> dict[int, int]:
    """Return how often each epoch was logged."""
    return Counter(each.step for each in mlflow.MlflowClient(tracked.uri).get_metric_history(tracked.run_id, name))


def wait_for(tracked: Tracked, epochs: int, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while len(logged(tracked, "train/loss")) < epochs:
        assert time.monotonic() < end, f"MLflow did not get {epochs} epochs"
        time.sleep(0.1)


def assert_each_once(tracked: Tracked, epochs: int) -> None:
    for name in ("train/loss", "train/round", "train/score"):
        assert logged(tracked, name) == dict.fromkeys(range(epochs), 1)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["freeze", "kill"])
def test_epochs_logged__a_server_that_is_away_holds_nothing_up_and_gets_each_epoch_once(
    server: TrackingServer, tmp_path: Path, fault: str
) -> None:
    tracked = begin(Folder(str(tmp_path / "run")), config_at(server.uri))
    with epochs_logged(tracked) as log:
        log(HISTORY[:1])
        wait_for(tracked, 1)
        getattr(server, fault)()
        # They return although nobody answers before the next lines.
        for epochs in (2, 3, 4):
            log(HISTORY[:epochs])
        time.sleep(12)
        {"freeze": server.thaw, "kill": server.start}[fault]()
        wait_for(tracked, 4)
        log(HISTORY)
    patient(log_epochs)(tracked, HISTORY)
    assert_each_once(tracked, len(HISTORY))


@pytest.mark.slow
def test_epochs_logged__ends_while_the_server_is_away_and_the_rest_is_logged_later(
    server: TrackingServer, tmp_path: Path
) -> None:
    tracked = begin(Folder(str(tmp_path / "run")), config_at(server.uri))
    with epochs_logged(tracked) as log:
        log(HISTORY[:1])
        wait_for(tracked, 1)
        server.freeze()
        log(HISTORY)
    # What was sent to the frozen server is obeyed now, at the same time as what is sent again.
    server.thaw()
    patient(log_epochs)(tracked, HISTORY)
    assert_each_once(tracked, len(HISTORY))


def test_epochs_logged__without_a_run_takes_epochs_and_logs_nothing() -> None:
    with epochs_logged(None) as log:
        log(HISTORY)


def test_log_epochs__an_epoch_is_logged_whole_or_not_at_all(tmp_path: Path) -> None:
    tracked = begin(Folder(str(tmp_path / "run")), config_at(f"sqlite:///{tmp_path}/mlflow.db"))
    # A term that MLflow refuses stands for a server that is lost between two terms.
    with pytest.raises(MlflowException):
        log_epochs(tracked, [{"epoch": 0, "loss": 1.0, "no:?term": 0.0, **HISTORY[0]}])
    log_epochs(tracked, HISTORY)
    assert_each_once(tracked, len(HISTORY))


@pytest.mark.slow
def test_begin__waits_for_a_store_that_another_process_has_locked(tmp_path: Path) -> None:
    config = config_at(f"sqlite:///{tmp_path}/mlflow.db")
    first = begin(Folder(str(tmp_path / "run")), config)
    other = sqlite3.connect(tmp_path / "mlflow.db", check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    # Longer than MLflow itself waits.
    unlock = threading.Timer(40, other.rollback)
    unlock.start()
    second = begin(Folder(str(tmp_path / "other")), config)
    assert (second.uri, second.run_id == first.run_id) == (first.uri, False)
    unlock.join()
    other.close()


@pytest.fixture
def nowhere() -> Iterator[str]:
    """The URI of a server that does not run, without minutes of waiting for it."""
    with hasty(1):
        yield f"http://127.0.0.1:{free_port()}"


def test_has_run__of_a_server_that_does_not_answer_is_unknown(nowhere: str, tmp_path: Path) -> None:
    tracked = begin(Folder(str(tmp_path / "run")), config_at(f"sqlite:///{tmp_path}/mlflow.db"))
    client = mlflow.MlflowClient(tracked.uri)
    assert (has_run(client, tracked.run_id), has_run(client, "0" * 32)) == (True, False)
    with pytest.raises(MlflowException):
        has_run(mlflow.MlflowClient(nowhere), tracked.run_id)


def test_server__that_does_not_answer_is_reported_in_a_sentence(nowhere: str, tmp_path: Path) -> None:
    sentence = r"^MLflow at http://127\.0\.0\.1:\d+ failed: .*; the same command continues from here$"
    with pytest.raises(ArtifactError, match=sentence):
        begin_sweep(Folder(str(tmp_path)), config_at(nowhere), {"objective": "score"})
    with pytest.raises(ArtifactError, match=sentence):
        Registry("transfgu", nowhere)


def test_ended_on_error__does_not_wait_minutes_for_a_server_that_does_not_answer() -> None:
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), ended_on_error(Tracked(f"http://127.0.0.1:{free_port()}", "0" * 32)):
        raise KeyboardInterrupt
    # MLflow itself would try for four.
    assert time.monotonic() - started < 120
