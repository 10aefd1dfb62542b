"""The log of one command: `logs/<time>-<command>.log` in the folder that it works on, on any storage.

The terminal shows short messages; the log holds the details: every level of the logger `transfgu_ray`, Ray's warnings,
what workers print, and the traceback of every error.
"""

import logging
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from transfgu_ray.background import repeated
from transfgu_ray.errors import ArtifactError, TransfguError
from transfgu_ray.runs.provenance import library_versions
from transfgu_ray.storage import Folder

LOGS = "logs"
# Latest logs kept per folder; older ones are deleted.
NUM_KEPT = 20
_MAX_BYTES = 10 * 2**20
# Object stores cannot append, so the whole log is written again at this interval.
_UPLOAD_SECONDS = 30.0
_SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY", re.IGNORECASE)
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
# Masking shorter values would hide ordinary words.
_MIN_SECRET_CHARS = 8

logger = logging.getLogger("transfgu_ray")
# Nothing may reach the terminal, not even through Python's handler of last resort.
logger.propagate = False
logger.addHandler(logging.NullHandler())


class _Command:
    """The state of this process: the stage, shown in every line of the log, and whether work has begun."""

    stage = ""
    has_begun = False


def begin_work() -> None:
    """Mark the input as accepted: the error message of a later failure also names the log."""
    _Command.has_begun = True


@contextmanager
def logged_stage(name: str) -> Iterator[None]:
    """Name the stage in every line that any thread logs within the context."""
    _Command.stage = name
    try:
        yield
    finally:
        _Command.stage = ""


class LogFormatter(logging.Formatter):
    """A formatter that adds the stage to each line and every cause to a traceback, and masks secrets."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(stage)s%(message)s")
        values = {value for name, value in os.environ.items() if _SECRET_NAME.search(name)}
        # The path of a file with a secret is not itself secret.
        self._secrets = sorted(v for v in values if len(v) >= _MIN_SECRET_CHARS and not os.path.exists(v))

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        record.stage = f"[{_Command.stage}] " if _Command.stage else ""
        # Another handler may have cached its own text of the traceback, without the causes.
        record.exc_text = None
        text = super().format(record)
        record.exc_text = None
        for secret in self._secrets:
            text = text.replace(secret, "***")
        # Ray colours the output that it quotes from other processes.
        return _COLOUR.sub("", text)

    def formatException(self, ei: Any) -> str:  # the base class's name
        """Return the traceback of an error and of all its causes, even those hidden by `raise ... from None`."""
        error: BaseException | None = ei[1]
        found: list[BaseException] = []
        while error is not None and error not in found:
            found.append(error)
            error = error.__cause__ or error.__context__
        parts = ("".join(traceback.format_exception(each, chain=False)).rstrip() for each in found)
        return "\n\nCaused by:\n\n".join(parts)


class _LogFile(RotatingFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # the base class's name
        """Ignore the error: a full disk is reported by the work itself."""


@contextmanager
def kept_log(folder: Folder, command: str) -> Iterator[None]:
    """Write the log of a command to its folder.

    An error that passes through is logged with its traceback. One raised after `begin_work`, or of an unexpected class,
    gets a note with the place of the log.

    Args:
        folder: folder that the command works on.
        command: name of the command.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    name = f"{LOGS}/{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{command}.log"
    _Command.has_begun = False
    _drop_old(folder)
    with tempfile.TemporaryDirectory(prefix="transfgu-log-") as scratch:
        file = Path(folder.join(name)) if folder.is_local else Path(scratch, Path(name).name)
        # A folder that cannot be written fails here, before any work.
        folder.write_bytes(name, b"")
        handler = _LogFile(file, maxBytes=_MAX_BYTES, backupCount=1, encoding="utf-8")
        handler.setFormatter(LogFormatter())
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)

        sent: dict[Path, int] = {}

        def upload() -> None:
            # A failing storage is reported by the work itself.
            with suppress(OSError, ArtifactError):
                for part in (file, Path(f"{file}.1")):
                    # Most often nothing was logged since the last time.
                    if not folder.is_local and part.exists() and sent.get(part) != (changed := part.stat().st_mtime_ns):
                        folder.once().write_bytes(f"{LOGS}/{part.name}", part.read_bytes())
                        sent[part] = changed

        try:
            with repeated(upload, seconds=_UPLOAD_SECONDS, name="log upload", once_more=True):
                logger.info("transfgu %s, pid %d", " ".join(sys.argv[1:]), os.getpid())
                logger.info("versions: %s", ", ".join(f"{k} {v}" for k, v in library_versions().items()))
                try:
                    yield
                    logger.info("done")
                except Exception as error:
                    logger.exception("failed: %s", error)
                    if _Command.has_begun or not isinstance(error, TransfguError):
                        error.add_note(f"log: {folder.uri_of(name)}")
                    raise
                except BaseException as stop:
                    logger.warning("stopped by %s", type(stop).__name__)
                    raise
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
            handler.close()


def log_of(error: BaseException) -> str | None:
    """Return the place of a failed command's log, as `kept_log` noted it; None where the log adds nothing."""
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith("log: ")]
    return notes[0].removeprefix("log: ") if notes else None


def _drop_old(folder: Folder) -> None:
    names = sorted(name for name, _ in folder.files(LOGS) if name.endswith(".log")) if folder.exists(LOGS) else []
    for name in names[: max(0, len(names) - NUM_KEPT + 1)]:
        folder.delete(name)
        folder.delete(f"{name}.1")
