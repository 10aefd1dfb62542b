"""The space of a sweep: settings and their values, read from YAML or made for a configuration, and points in it."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from transfgu_ray.config.run import RunConfig, build_config
from transfgu_ray.errors import ConfigError

PAPER = "paper"
# Trials are comparable only on the same photographs, prior, tokens and protocol.
_FIXED = (
    "preset", "data", "encoder", "evaluate", "tracking", "runtime", "concepts.granularity", "train.features",
    "train.token_window", "train.crop_size", "train.inference_size", "train.backbone", "train.backbone_weights",
    "train.decoder_weights",
)  # fmt: skip
_SEPARATOR = ", "


@dataclass(frozen=True)
class Range:
    """All numbers from low to high, both included; whole numbers if both ends are whole.

    Attributes:
        low: smallest.
        high: largest.
        log: whether the logarithm, not the value, is drawn evenly.
    """

    low: float
    high: float
    log: bool = False

    def value(self, share: float) -> float:
        """Return the value at a share in [0, 1] of the range."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = low + (high - low) * share
        value = min(max(math.exp(value) if self.log else value, self.low), self.high)
        return round(value) if self.is_whole else value

    @property
    def is_whole(self) -> bool:
        """Whether the range holds only whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)


Space = Mapping[str, tuple[Any, ...] | Range]


def read_space(source: str, config: RunConfig) -> Space:
    """Return the space `paper` for a configuration, or read a space from a YAML file.

    A file maps each setting to a list of values or to `{low: 0.1, high: 3, log: true}`. Settings that change together
    share a key: `concepts.num_concepts, concepts.num_background: [[16, 4], [6, 2]]`.

    Raises:
        ConfigError: the file is missing or malformed, or names a setting or value that cannot be varied.
    """
    if source == PAPER:
        return _paper(config)
    try:
        values = yaml.safe_load(Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--space {source} is neither {PAPER!r} nor a readable file: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or not values:
        raise ConfigError(f"{source} must map settings to values, e.g. `train.omega_1: [0.3, 1, 3]`")
    space = {str(key): _read_values(str(key), value, source) for key, value in values.items()}
    _check(space, config, source)
    return space


def _paper(config: RunConfig) -> Space:
    """Return a space around the values of the supplement: last alpha, both weights, and K = number of classes.

    K is that of fine classes and of super-categories; where there are none, also half and twice the classes.
    """
    space: dict[str, tuple[Any, ...]] = {
        "train.alpha": ([0.03, 0.05], [0.03, 0.1], [0.03, 0.3]),
        "train.omega_1": (0.0, 1.0, 3.0),
        "train.omega_2": (0.0, 0.3, 1.0),
    }
    if not config.data.spec.super_of or config.concepts.granularity == "super":
        k = config.num_concepts
        return space | {"concepts.num_concepts": (max(1, k // 2), k, 2 * k)}
    counts = [
        build_config(config, None, ["concepts.num_concepts=null", f"concepts.granularity={name}"])
        for name in ("fine", "super")
    ]
    if config.region_mode != "things_and_stuff":
        return space | {"concepts.num_concepts": tuple(each.num_concepts for each in counts)}
    pairs = tuple([each.num_concepts, each.num_background] for each in counts)
    return space | {f"concepts.num_concepts{_SEPARATOR}concepts.num_background": pairs}


def _read_values(key: str, value: Any, where: str) -> tuple[Any, ...] | Range:
    if isinstance(value, list) and value:
        return tuple(value)
    try:
        found = Range(**value)
        if not (_is_number(found.low) and _is_number(found.high)) or not isinstance(found.log, bool):
            raise TypeError
    except TypeError:
        raise ConfigError(
            f"{key} in {where} must be a list of values or {{low: NUMBER, high: NUMBER, log: true|false}}"
        ) from None
    if not found.low < found.high or (found.log and found.low <= 0):
        raise ConfigError(f"{key} in {where}: low must be below high, and above 0 where log is true")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check(space: Space, config: RunConfig, where: str) -> None:
    for key, values in space.items():
        for name in key.split(_SEPARATOR):
            if any(name == fixed or name.startswith(f"{fixed}.") for fixed in _FIXED):
                raise ConfigError(
                    f"{name} in {where} cannot be varied: the trials of a sweep are compared on the same photographs, "
                    "prior, tokens and protocol; start a sweep for each value"
                )
        ends = (values.value(0), values.value(1)) if isinstance(values, Range) else values
        for value in ends:
            build_config(config, None, assignments(expand({key: value}, where)))


def expand(choice: Mapping[str, Any], where: str = "the space") -> dict[str, Any]:
    """Return a value per setting from a value per key.

    Raises:
        ConfigError: a key of several settings has a different number of values.
    """
    point: dict[str, Any] = {}
    for key, value in choice.items():
        names = key.split(_SEPARATOR)
        if len(names) == 1:
            point[key] = value
        elif isinstance(value, list) and len(value) == len(names):
            point |= dict(zip(names, value, strict=True))
        else:
            raise ConfigError(f"{key} in {where}: each of its values must be a list of {len(names)}")
    return point


def assignments(point: Mapping[str, Any]) -> list[str]:
    """Return a point as values of `--set`."""
    return [f"{name}={json.dumps(value)}" for name, value in point.items()]


def grid_points(space: Space) -> list[dict[str, Any]]:
    """Return every combination, the last key changing fastest.

    Raises:
        ConfigError: the space holds a range.
    """
    lists = []
    for key, values in space.items():
        if isinstance(values, Range):
            raise ConfigError(f"{key} is a range, which a grid cannot cover; give a list, or use --sampler random")
        lists.append(values)
    return [expand(dict(zip(space, choice, strict=True))) for choice in itertools.product(*lists)]


def random_points(space: Space, num_points: int, seed: int) -> list[dict[str, Any]]:
    """Draw points evenly, none twice, all where there are fewer; a larger number begins with the same points."""
    if not any(isinstance(values, Range) for values in space.values()):
        points = grid_points(space)
        return [points[i] for i in np.random.default_rng(seed).permutation(len(points))[:num_points]]
    found = []
    for number in range(num_points):
        shares = np.random.default_rng([seed, number]).random(len(space))
        found.append(
            expand({key: _at(values, share) for (key, values), share in zip(space.items(), shares, strict=True)})
        )
    return found


def _at(values: Sequence[Any] | Range, share: float) -> Any:
    if isinstance(values, Range):
        return values.value(share)
    return values[int(share * len(values))]


def plain_space(space: Space) -> dict[str, Any]:
    """Return the space as plain values for JSON or YAML."""
    return {key: asdict(values) if isinstance(values, Range) else list(values) for key, values in space.items()}


def plain_settings(space: Space) -> dict[str, Any]:
    """Return each setting separately with its values or range, as plain values for JSON."""
    settings: dict[str, Any] = {}
    for key, values in plain_space(space).items():
        if _SEPARATOR not in key:
            settings[key] = values
            continue
        for point in (expand({key: value}) for value in values):
            for name, value in point.items():
                settings.setdefault(name, [])
                settings[name] += [] if value in settings[name] else [value]
    return settings
