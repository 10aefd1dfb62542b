"""Base of every configuration: strict sections, read from YAML and `--set`, with one-sentence errors."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from transfgu_ray.errors import ConfigError
from transfgu_ray.storage import refuse_credentials

Positive = Annotated[int, Field(ge=1)]

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]

Bands = Annotated[
    tuple[Positive, Positive, Positive] | None,
    Field(
        strict=False,
        description="bands that are taken as red, green and blue, counted from 1, e.g. [3, 2, 1]; null = the colours "
        "that the file names (ours)",
    ),
]


class Section(BaseModel):
    """Base of all sections: immutable, refuses unknown keys and infinite numbers, converts no types silently."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False)


def tuple_field(description: str, default: tuple[Any, ...]) -> Any:
    """Return a field for a tuple of at least one element."""
    # YAML has only lists, so tuples are exempt from strict typing.
    return Field(default=default, strict=False, min_length=1, description=description)


# Characters of a wrong value that a message repeats.
_MOST_SHOWN = 80

# Configuration of a command: a run, or a pretraining.
C = TypeVar("C", bound=Section)


def merge_settings(base: Section, file: str | None, assignments: Sequence[str]) -> dict[str, Any]:
    """Return the values of `base` with changes, as in `build_config`, not checked yet.

    Of a section, only the settings given change; any other value, a mapping too, is replaced as a whole, so that
    `encoder.overrides={}` empties it. `encoder.overrides.depth=2` changes one entry of it.

    Raises:
        ConfigError: a missing or malformed file, or an unknown key.
    """
    values, kind = base.model_dump(mode="json"), type(base)
    if file is not None:
        _merge(values, _read_yaml(file), kind=kind, where=file)
    for assignment in assignments:
        names, value = _parse_assignment(assignment)
        _merge(values, _nest(names, value, values=values, kind=kind), kind=kind, where=f"--set {assignment}")
    return values


def parse_config(values: dict[str, Any], kind: type[C]) -> C:
    """Return a checked configuration from plain values.

    Raises:
        ConfigError: a value is wrong (all problems in one sentence), or a URI holds a password.
    """
    for name, value in flatten(values).items() if isinstance(values, dict) else ():
        if isinstance(value, str):
            refuse_credentials(name, value)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = error.errors()
        # A list with a bad element is also called too short, which does not help.
        useful = [problem for problem in problems if problem["type"] != "too_short"] or problems
        raise ConfigError("; ".join(map(_explain, useful))) from None


def dump_yaml(config: Section) -> str:
    """Return the resolved configuration as YAML that `--config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested sections as dotted names: {"train": {"omega_1": 1.0}} -> {"train.omega_1": 1.0}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the settings that differ, as `name: old -> new`."""
    old_flat, new_flat = flatten(old), flatten(new)
    names = [*old_flat, *(name for name in new_flat if name not in old_flat)]
    return [
        f"{name}: {old_flat.get(name)} -> {new_flat.get(name)}"
        for name in names
        if old_flat.get(name) != new_flat.get(name)
    ]


def _read_yaml(file: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {file}: {error.strerror}; check --config") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold sections such as `train:`, not a {type(values).__name__}")
    return values


def _parse_assignment(assignment: str) -> tuple[list[str], Any]:
    name, equals, text = assignment.partition("=")
    # Before any message can repeat it.
    refuse_credentials(f"--set {name}", text)
    if not equals or not name.strip():
        raise ConfigError(f"--set {assignment} must look like section.field=value, e.g. concepts.num_concepts=27")
    try:
        return name.strip().split("."), yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {assignment}: the value is not valid YAML") from None


def _section(kind: type[Section], field: str) -> type[Section] | None:
    """Return the section behind a field; None where it holds a value."""
    found = kind.model_fields[field].annotation if field in kind.model_fields else None
    return found if isinstance(found, type) and issubclass(found, Section) else None


def _nest(names: Sequence[str], value: Any, *, values: dict[str, Any], kind: type[Section]) -> dict[str, Any]:
    """Return an assignment as nested sections; one to an entry of a mapping keeps the other entries."""
    name, *rest = names
    if not rest:
        return {name: value}
    inner, current = _section(kind, name), values.get(name)
    if inner is not None and current is not None:
        return {name: _nest(rest, value, values=current, kind=inner)}
    return {name: {**(current if isinstance(current, dict) else {}), ".".join(rest): value}}


def _merge(values: dict[str, Any], changes: dict[str, Any], *, kind: type[Section], where: str, path: str = "") -> None:
    for key, change in changes.items():
        if key not in values:
            close = difflib.get_close_matches(str(key), list(values), n=1)
            hint = f"did you mean {path}{close[0]}?" if close else f"allowed here: {', '.join(values)}"
            raise ConfigError(f"unknown setting {path}{key} in {where}; {hint}")
        current, inner = values[key], _section(kind, key)
        if inner is None:
            values[key] = _number(change)
        elif isinstance(change, dict):
            _merge(current, change, kind=inner, where=where, path=f"{path}{key}.")
        else:
            raise ConfigError(
                f"{path}{key} in {where} must hold settings of that section, such as `{next(iter(current))}:`"
            )


def _number(value: Any) -> Any:
    # YAML 1.1 reads 1e-4 as a string; people write rates that way.
    if isinstance(value, list):
        return [_number(item) for item in value]
    if isinstance(value, dict):
        return {key: _number(item) for key, item in value.items()}
    if not isinstance(value, str) or "e" not in value.lower() or value[0] not in "+-.0123456789":
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _explain(problem: ErrorDetails) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if not name:
        return message
    message = (message[0].lower() + message[1:]).replace("input should be", "must be")
    # Of a section the message names what is wrong; all of its settings would hide that.
    shown = "" if isinstance(problem["input"], dict | Section) else f"={_short(problem['input'])}"
    return f"{name}{shown}: {message}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."
