"""Timing by ratios: compared actions take turns in one process, so that a busy machine slows all of them alike."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class Target:
    """One row of the table: a value and its target.

    Attributes:
        name: of the measure.
        sense: whether the value must be at most or at least the target.
        target: the wanted value; None where the value is only informative.
        value: as measured; None = not run.
    """

    name: str
    sense: Literal["<=", ">="]
    target: float | None
    value: float | None

    @property
    def reached(self) -> bool | None:
        """Whether the value meets the target; None where there is no value or no target."""
        if self.value is None or self.target is None:
            return None
        return self.value <= self.target if self.sense == "<=" else self.value >= self.target

    def as_json(self) -> dict[str, Any]:
        """Return the fields and whether the target was reached, as plain values."""
        return asdict(self) | {"reached": self.reached}


@dataclass
class Measurements:
    """The results of one part of the benchmark.

    Attributes:
        targets: rows of the table.
        details: seconds, sizes and shapes behind them, by name.
    """

    targets: list[Target] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


def take_turns(actions: Mapping[str, Callable[[], object]], num_rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each action in each round; a first round is not measured."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(num_rounds + 1):
        for name, action in actions.items():
            _wait_for_device()
            start = time.perf_counter()
            action()
            _wait_for_device()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, to: str) -> float:
    """Return the median over the rounds of the seconds of one action relative to another's in the same round."""
    return median(a / b for a, b in zip(seconds[name], seconds[to], strict=True))


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
