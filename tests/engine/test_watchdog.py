"""The watchdog ends a stalled stage with an error that names it, and leaves all others alone."""

import signal
import threading
import time
from collections.abc import Iterator

import pytest

from tests.fixtures import Counted
from transfgu_ray.engine.progress import Progress
from transfgu_ray.engine.watchdog import unless_stalled
from transfgu_ray.errors import StalledError

_SECOND = 1 / 60


@pytest.fixture
def on_sigint(request: pytest.FixtureRequest) -> Iterator[None]:
    before = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("on_sigint", [signal.default_int_handler, signal.SIG_IGN], ids=["", "nohup"], indirect=True)
def test_watchdog__wakes_a_main_thread_that_waits_for_a_lock(on_sigint: None) -> None:
    began = time.monotonic()
    words = r"^stage extract did nothing for 0\.01\d+ minutes and was stopped; `ray status` shows"
    with pytest.raises(StalledError, match=words), unless_stalled("stage extract", _SECOND, Progress()):
        threading.Event().wait(60)
    assert time.monotonic() - began < 10


def test_watchdog__timely_signs_of_life_keep_it_quiet() -> None:
    done = []
    with unless_stalled("stage extract", _SECOND, Counted(done.append)) as progress:
        for i in range(6):
            time.sleep(0.4)
            progress(i)
    assert done == list(range(6))


def test_watchdog__does_not_change_ctrl_c() -> None:
    with pytest.raises(KeyboardInterrupt), unless_stalled("stage extract", 1, Progress()):
        signal.raise_signal(signal.SIGINT)


def test_watchdog__passes_other_errors_on() -> None:
    with pytest.raises(ValueError, match="broken"), unless_stalled("stage extract", 1, Progress()):
        raise ValueError("broken")
    assert all(thread.name != "watchdog" for thread in threading.enumerate())


def test_watchdog__a_thread_of_a_trial_is_not_interrupted() -> None:
    found = []

    def trial() -> None:
        with unless_stalled("stage extract", _SECOND / 4, Counted(found.append)) as progress:
            time.sleep(1)
            progress(1)

    thread = threading.Thread(target=trial)
    thread.start()
    thread.join()
    assert found == [1]
