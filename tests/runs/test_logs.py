"""The log of a command: its content, its place, and what is kept out of it."""

import io
import logging
import time
from pathlib import Path

import pytest

from transfgu_ray.errors import DataError
from transfgu_ray.runs import logs
from transfgu_ray.runs.logs import LogFormatter, begin_work, kept_log, log_of, logged_stage, logger
from transfgu_ray.storage import Folder


def the_log(folder: Path) -> str:
    (file,) = (folder / "logs").glob("*.log")
    return file.read_text()


def fail() -> None:
    begin_work()
    try:
        {}["missing"]
    except KeyError:
        raise DataError("the sentence") from None


def test_kept_log__has_the_traceback_that_the_message_hides(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught, kept_log(Folder(str(tmp_path)), "extract"), logged_stage("extract"):
        fail()
    text = the_log(tmp_path)
    assert "ERROR" in text
    assert "DataError: the sentence" in text
    assert "Caused by:" in text
    assert "KeyError: 'missing'" in text
    assert str(caught.value) == "the sentence", "the terminal shows no more than before"
    assert log_of(caught.value) == str(next((tmp_path / "logs").iterdir()))


def test_kept_log__is_named_where_it_says_more_than_the_message(tmp_path: Path) -> None:
    for error, is_named in ((DataError("before any work"), False), (RuntimeError("not foreseen"), True)):
        with pytest.raises(type(error)), kept_log(Folder(str(tmp_path / type(error).__name__)), "run"):
            raise error
        assert (log_of(error) is not None) == is_named


def test_kept_log__lines_have_level_and_stage(tmp_path: Path) -> None:
    with kept_log(Folder(str(tmp_path)), "run"):
        with logged_stage("labels"):
            logger.debug("unit %d: done", 7)
        logger.warning("between stages")
    text = the_log(tmp_path)
    assert "DEBUG   [labels] unit 7: done" in text
    assert "WARNING between stages" in text
    assert text.rstrip().endswith("done")
    logger.debug("after the command")
    assert the_log(tmp_path) == text


def test_kept_log__nothing_reaches_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logger.error("without a log")
    with kept_log(Folder(str(tmp_path)), "run"):
        logger.error("with one")
    assert capfd.readouterr() == ("", "")


def test_kept_log__says_what_stopped_a_command(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), kept_log(Folder(str(tmp_path)), "run"):
        raise KeyboardInterrupt
    assert "stopped by KeyboardInterrupt" in the_log(tmp_path)


def test_kept_log__holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "short")
    with kept_log(Folder(str(tmp_path)), "run"):
        try:
            raise RuntimeError("denied for wJalrXUtnFEMI")
        except RuntimeError:
            logger.exception("a worker printed wJalrXUtnFEMI, and a short word")
    text = the_log(tmp_path)
    assert "wJalrXUtnFEMI" not in text
    assert text.count("***") >= 2, "in the line and in the traceback"
    assert "a short word" in text


def test_kept_log__the_latest_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(str(tmp_path))
    for number in range(25):
        folder.write_bytes(f"logs/20250101-0000{number:02d}-run.log", b"old")
    folder.write_bytes("logs/20250101-000000-run.log.1", b"older")
    with kept_log(folder, "run"):
        pass
    names = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert len(names) == logs.NUM_KEPT
    assert names[0] == "20250101-000006-run.log"
    assert not names[-1].startswith("2025")


def test_kept_log__a_long_one_goes_on_in_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_MAX_BYTES", 2000)
    with kept_log(Folder(str(tmp_path)), "run"):
        for number in range(200):
            logger.info("line %d", number)
    sizes = {path.suffix: path.stat().st_size for path in (tmp_path / "logs").iterdir()}
    assert sizes.keys() == {".log", ".1"}
    assert max(sizes.values()) <= 2000
    assert "line 199" in the_log(tmp_path)


def test_kept_log__on_an_object_store_it_is_written_while_the_command_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_UPLOAD_SECONDS", 0.05)
    folder = Folder("memory://kept-log/run")

    def work() -> None:
        logger.info("early")
        end = time.monotonic() + 10
        while b"early" not in b"".join(folder.read_bytes(name) for name, _ in folder.files("logs")):
            assert time.monotonic() < end, "nothing was written before the end"
            time.sleep(0.05)
        fail()

    with pytest.raises(DataError) as caught, kept_log(folder, "run"):
        work()
    ((name, _),) = folder.files("logs")
    assert b"KeyError: 'missing'" in folder.read_bytes(name)
    assert log_of(caught.value) == folder.uri_of(name)


def test_kept_log__on_an_object_store_an_unchanged_one_is_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_UPLOAD_SECONDS", 0.02)
    folder = Folder("memory://kept-log/quiet")
    sent: list[str] = []
    write = Folder.write_bytes

    def counted(self: Folder, name: str, content: bytes) -> None:
        sent.append(name)
        write(self, name, content)

    monkeypatch.setattr(Folder, "write_bytes", counted)
    with kept_log(folder, "run"):
        time.sleep(0.6)
    # The empty file, what is logged at the start and, where it came later, the second line, and the end.
    assert 2 <= len(sent) <= 5


def test_formatter__a_cycle_of_causes_ends() -> None:
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    handler = logging.StreamHandler(io.StringIO())
    handler.setFormatter(LogFormatter())
    handler.handle(logging.LogRecord("x", logging.ERROR, "", 0, "text", (), (ValueError, one, None)))
    assert handler.stream.getvalue().count("ValueError: one") == 1
