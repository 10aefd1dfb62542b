import contextlib
import signal
import threading
import time

import pytest

from transfgu_ray.background import interruptible, repeated


def test_repeated__calls_until_the_context_ends_and_once_more():
    seen = []
    with repeated(lambda: seen.append(threading.current_thread().name), seconds=0.02, name="beat", once_more=True):
        while len(seen) < 3:
            time.sleep(0.01)
    ended = len(seen)
    assert set(seen) == {"beat"}
    assert ended >= 4
    time.sleep(0.1)
    assert len(seen) == ended, "its thread went on"


def test_repeated__a_short_context_needs_no_call():
    seen = []
    with repeated(lambda: seen.append(1), seconds=60, name="slow"):
        pass
    assert seen == []


def wait_for(interrupt, error):
    """Wait in the main thread, which another thread interrupts."""
    threading.Timer(0.1, interrupt, [error]).start()
    threading.Event().wait(30)


def test_interruptible__wakes_a_wait_and_of_two_nested_ones_the_right_one_raises():
    with pytest.raises(ValueError, match="outer"), interruptible() as outer, interruptible():
        wait_for(outer, ValueError("outer"))


def test_interruptible__a_body_that_swallows_it_is_ended_when_it_returns():
    began = time.monotonic()
    with (
        pytest.raises(ValueError, match="late"),
        interruptible() as interrupt,
        contextlib.suppress(KeyboardInterrupt),
    ):
        wait_for(interrupt, ValueError("late"))
    assert time.monotonic() - began < 10


def test_interruptible__works_where_ray_tune_has_put_its_own_handlers():
    from ray.tune.tune import _setup_signal_catching

    kept = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGUSR1)}
    began = time.monotonic()
    try:
        with pytest.raises(ValueError, match="stalled"), interruptible() as interrupt:
            wait_for((_setup_signal_catching(), interrupt)[1], ValueError("stalled"))
    finally:
        for each, handler in kept.items():
            signal.signal(each, handler)
    assert time.monotonic() - began < 10


def test_interruptible__outside_the_main_thread_the_error_comes_at_the_end():
    raised = []

    def work():
        try:
            with interruptible() as interrupt:
                interrupt(ValueError("lost"))
                raised.append("went on")
        except ValueError as error:
            raised.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert raised == ["went on", "lost"]
