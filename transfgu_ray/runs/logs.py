"""The log of one command: `logs/<time>-<command>.log` in the folder that it works on, whatever the storage.

The terminal shows sentences; the log holds what is behind them: every level of the logger `transfgu_ray`, warnings of
Ray, what workers print, and the traceback of every error.
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
# The latest commands of a folder; older logs are deleted.
NUM_KEPT = 20
_MAX_BYTES = 10 * 2**20
# Object stores cannot append: the whole log is written again so often.
_UPLOAD_SECONDS = 30.0
_SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY", re.IGNORECASE)
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
# Shorter ones would blot out words.
_MIN_SECRET_CHARS = 8

logger = logging.getLogger("transfgu_ray")
# Nothing reaches the terminal by itself, not even from the handler of last resort.
logger.propagate = False
logger.addHandler(logging.NullHandler())


class _Command:
    """What this process is doing: the stage, for every line of the log, and whether work has begun at all."""

    stage = ""
    has_begun = False


def begin_work() -> None:
    """Say that the input was accepted: what fails from now on has more behind it than its sentence says."""
    _Command.has_begun = True


@contextmanager
def logged_stage(name: str) -> Iterator[None]:
    """Name the stage in every line that is logged meanwhile, by any thread."""
    _Command.stage = name
    try:
        yield
    finally:
        _Command.stage = ""


class LogFormatter(logging.Formatter):
    """One line per record, with the stage, and below it the traceback with every cause; secrets are blotted out."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(stage)s%(message)s")
        values = {value for name, value in os.environ.items() if _SECRET_NAME.search(name)}
        # A path of a secret is none.
        self._secrets = sorted(v for v in values if len(v) >= _MIN_SECRET_CHARS and not os.path.exists(v))

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        record.stage = f"[{_Command.stage}] " if _Command.stage else ""
        # Another handler's formatter may have left its text of the traceback, without the causes.
        record.exc_text = None
        text = super().format(record)
        record.exc_text = None
        for secret in self._secrets:
            text = text.replace(secret, "***")
        # Ray colours what it quotes of other processes.
        return _COLOUR.sub("", text)

    def formatException(self, ei: Any) -> str:  # the base class's name
        """Return the traceback of an error and of all that led to it, also where `raise ... from None` hides them."""
        error: BaseException | None = ei[1]
        found: list[BaseException] = []
        while error is not None and error not in found:
            found.append(error)
            error = error.__cause__ or error.__context__
        parts = ("".join(traceback.format_exception(each, chain=False)).rstrip() for each in found)
        return "\n\nBehind it:\n\n".join(parts)


class _LogFile(RotatingFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # the base class's name
        """Do nothing: a full disk is reported by the work itself."""


@contextmanager
def kept_log(folder: Folder, command: str) -> Iterator[None]:
    """Keep the log of a command in its folder.

    An error that passes is logged with its traceback. One after `begin_work`, or not foreseen, gets a note that says
    where the log is.

    Args:
        folder: that the command works on.
        command: its name.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    name = f"{LOGS}/{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{command}.log"
    _Command.has_begun = False
    _drop_old(folder)
    with tempfile.TemporaryDirectory(prefix="transfgu-log-") as scratch:
        file = Path(folder.join(name)) if folder.is_local else Path(scratch, Path(name).name)
        # Tells at once of a folder that cannot be written.
        folder.write_bytes(name, b"")
        handler = _LogFile(file, maxBytes=_MAX_BYTES, backupCount=1, encoding="utf-8")
        handler.setFormatter(LogFormatter())
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)

        def upload() -> None:
            # A storage that fails is reported by the work itself.
            with suppress(OSError, ArtifactError):
                for part in (file, Path(f"{file}.1")):
                    if not folder.is_local and part.exists():
                        folder.write_bytes(f"{LOGS}/{part.name}", part.read_bytes())

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
    """Return where the log of a failed command is, as `kept_log` noted it; None where it has no more to say."""
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith("log: ")]
    return notes[0].removeprefix("log: ") if notes else None


def _drop_old(folder: Folder) -> None:
    names = sorted(name for name, _ in folder.files(LOGS) if name.endswith(".log")) if folder.exists(LOGS) else []
    for name in names[: max(0, len(names) - NUM_KEPT + 1)]:
        folder.delete(name)
        folder.delete(f"{name}.1")
