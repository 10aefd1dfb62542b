"""Words for the time that MLflow lets a command wait."""

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator

from transfgu_ray.tracking.local_store import store_file

# Without a word, and of one question to a server.
_SILENCE_SECONDS, _ANSWER_SECONDS = 4.0, 3


@contextlib.contextmanager
def told_of_waits(uri: str, note: Callable[[str], None]) -> Iterator[None]:
    """Note once if the body takes seconds while the tracking server does not answer, or the store is locked.

    Args:
        uri: tracking URI.
        note: takes one line; called from another thread.
    """
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(_SILENCE_SECONDS):
            if (words := _hindrance(uri)) and not is_over.is_set():
                note(words)
                return

    thread = threading.Thread(target=watch, daemon=True, name="watch MLflow")
    thread.start()
    try:
        yield
    finally:
        is_over.set()


def _hindrance(uri: str) -> str | None:
    """Return the line on what a command waits for; None where MLflow answers, or cannot be asked."""
    if uri.startswith(("http://", "https://")):
        reason = _unanswered(uri)
        return reason and f"waiting for MLflow at {uri}, at most four minutes: {reason}"
    file = store_file(uri)
    return (
        f"waiting for the MLflow store {file}, at most two minutes: another process has locked it"
        if (file is not None and _is_locked(str(file)))
        else None
    )


def _unanswered(uri: str) -> str | None:
    """Return why a server does not answer; None if it does, be it with an error."""
    import requests

    try:
        requests.get(f"{uri.rstrip('/')}/health", timeout=_ANSWER_SECONDS)
    except requests.Timeout:
        return f"no answer within {_ANSWER_SECONDS} s"
    except requests.ConnectionError as error:
        return "connection refused" if "refused" in str(error) else "no connection"
    except requests.RequestException as error:
        return type(error).__name__
    return None


def _is_locked(file: str) -> bool:
    try:
        with contextlib.closing(sqlite3.connect(file, timeout=0, isolation_level=None)) as store:
            store.execute("BEGIN IMMEDIATE")
            store.execute("ROLLBACK")
    except sqlite3.DatabaseError as error:
        return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY
    return False
