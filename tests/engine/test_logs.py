"""What Ray and its workers say: in the log, not in the terminal."""

import logging

import pytest

from transfgu_ray.engine.logs import divert_ray_loggers
from transfgu_ray.runs.logs import logger


class Collected(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


@pytest.fixture
def collected() -> Collected:
    handler, level = Collected(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_divert_ray_loggers__warnings_are_logged_and_not_printed(
    collected: Collected, capfd: pytest.CaptureFixture[str]
) -> None:
    import ray.data  # noqa: F401  # sets its loggers up

    for _ in range(2):
        divert_ray_loggers()
    for name in ("ray", "ray.data", "ray.data.some.module", "ray.train"):
        logging.getLogger(name).warning("of %s", name)
        logging.getLogger(name).info("not of interest")
    assert collected.lines == [
        f"WARNING of {name}" for name in ("ray", "ray.data", "ray.data.some.module", "ray.train")
    ]
    assert capfd.readouterr() == ("", "")


@pytest.mark.ray
def test_diverted_prints__lines_say_which_process_printed_them(
    local_ray: None, collected: Collected, capfd: pytest.CaptureFixture[str]
) -> None:
    import time

    import ray

    def talk() -> int:
        import os

        for _ in range(3):
            print("the same")  # noqa: T201  # what is tested
        print("something else", flush=True)  # noqa: T201  # what is tested
        return os.getpid()

    pid = ray.get(ray.remote(talk).options(num_cpus=0.1).remote())
    end = time.monotonic() + 30
    while not any("something else" in line for line in collected.lines):
        assert time.monotonic() < end, collected.lines
        time.sleep(0.1)
    said = [line.rpartition(": ")[2] for line in collected.lines if f"pid {pid}:" in line]
    assert said == ["the same", "(3 times)", "something else"]
    assert "something else" not in "".join(capfd.readouterr())
