"""The parts of the benchmark, run in order, and their printed and written results."""

import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from transfgu_ray.bench import bank, extract, labels, many, scale, train
from transfgu_ray.bench.timing import Measurements
from transfgu_ray.cores import usable_cores
from transfgu_ray.errors import ConfigError
from transfgu_ray.runs.provenance import library_versions

PARTS: dict[str, Callable[[str], Measurements]] = {
    "labels": labels.measure,
    "extract": extract.measure,
    "train": train.measure,
    "bank": bank.measure,
    "ray": scale.measure_ray,
    "concepts": scale.measure_concepts,
    "hierarchy": scale.measure_hierarchy,
    "memory": scale.measure_memory,
    "scale": many.measure,
}


def run_parts(names: Sequence[str], threads: int, on_part: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Run the named parts (none = all) and yield, after each, the content of `--json` so far.

    Args:
        names: of `PARTS`.
        threads: torch threads of this process.
        on_part: called with the name of each part before it starts.

    Raises:
        ConfigError: a part does not exist.
    """
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise ConfigError(f"--only {unknown[0]}: no such part; allowed: {', '.join(PARTS)}")
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": usable_cores(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": threads,
    }
    targets: list[dict[str, Any]] = []
    details: dict[str, Any] = {}
    for name, measure in PARTS.items():
        if names and name not in names:
            continue
        on_part(name)
        found = measure(device)
        targets += [target.as_json() for target in found.targets]
        details[name] = found.details
        yield {"targets": targets, "details": details, "machine": machine, "versions": library_versions()}


def table_rows(targets: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return name, target, value and whether the target was reached, as printed."""
    words = {True: "yes", False: "NO", None: "-"}
    return [[t["name"], f"{t['sense']} {t['target']:g}", f"{t['value']:.3g}", words[t["reached"]]] for t in targets]


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
