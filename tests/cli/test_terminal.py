import io
import re

import pytest
from rich.console import Console

from transfgu_ray.cli import terminal
from transfgu_ray.cli.terminal import Terminal, printable


def test_printable__a_name_stays_on_its_line_and_does_nothing_to_the_terminal():
    assert printable("a\nb\x1b[2J\u202e.jpg") == r"a\nb\x1b[2J\u202e.jpg"
    assert printable("été à la plage 日本.jpg") == "été à la plage 日本.jpg"


def _logged(capsys: pytest.CaptureFixture[str], *updates: dict) -> list[str]:
    with Terminal(quiet=False).stage("labels", 40, "photographs") as progress:
        for update in updates:
            progress(4, **update)
    return capsys.readouterr().err.splitlines()


def test_stage__a_log_has_a_line_each_tenth_with_rate_time_left_and_refusals(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "_LEAST_S", 0)
    first, *lines, last = _logged(capsys, {}, {"refused": 2}, {"words": "loss 0.3"}, *[{}] * 7)
    assert first == "labels: 40 photographs"
    assert lines[0] == "labels: 4/40 photographs"
    assert re.fullmatch(r"labels: 8/40 photographs, [\d.]+/s, \d s left, 2 refused", lines[1])
    assert lines[2].endswith("2 refused, loss 0.3")
    assert len(lines) == 9
    assert last == "labels: done, 40 of 40 photographs in 0 s, 2 refused"


def test_stage__a_quick_stage_does_not_flood_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    assert _logged(capsys, *[{}] * 10) == ["labels: 40 photographs", "labels: done, 40 of 40 photographs in 0 s"]


def test_stage__a_slow_stage_shows_life_between_tenths(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "_MOST_S", 0)
    with Terminal(quiet=False).stage("train", 1000, "photographs") as progress:
        progress(1)
        progress(1)
    assert "train: 2/1000 photographs" in capsys.readouterr().err


@pytest.mark.parametrize("width", [80, 60])
def test_stage__a_terminal_has_one_line(width: int) -> None:
    shown, screen = Terminal(quiet=False), io.StringIO()
    shown._progress = Console(file=screen, force_terminal=True, width=width, legacy_windows=False)
    with shown.stage("extract", 12345, "photographs") as progress:
        for _ in range(3):
            progress(1234, refused=7)
    drawn = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", screen.getvalue())
    last = re.split(r"[\r\n]+", drawn.strip())[-1]
    assert "3702/12345 photographs" in last
    assert "\n" not in drawn.strip(), "one line, drawn over itself"


def test_stage__quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal(quiet=True).stage("labels", 2, "photographs") as progress:
        progress(1, "words", refused=1)
    assert capsys.readouterr() == ("", "")


def test_stage__one_pass_is_said_in_the_singular(capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal(quiet=False).stage("concepts", 1, "passes") as progress:
        progress(1)
    assert capsys.readouterr().err.splitlines() == ["concepts: 1 pass", "concepts: done, 1 of 1 pass in 0 s"]
