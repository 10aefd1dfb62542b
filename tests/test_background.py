import threading
import time

from transfgu_ray.background import repeated


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
