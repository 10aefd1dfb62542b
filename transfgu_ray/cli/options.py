"""Options that several commands share, and the settings they stand for."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from transfgu_ray.errors import ConfigError

if TYPE_CHECKING:
    from transfgu_ray.storage import Folder

RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="Run folder: a path or a URI such as s3://bucket/run.")]
Preset = Annotated[
    str | None,
    typer.Option(help="Recipe to start from; see `transfgu presets`. Default: the run's own settings, else paper."),
]
Dataset = Annotated[
    str | None,
    typer.Option(help="Layout of --data; see `transfgu datasets`. Default: the preset's (demo: scenes), else folder."),
]
Data = Annotated[str | None, typer.Option(help="Folder or URI of the photographs.")]
Config = Annotated[str | None, typer.Option(help="YAML file that changes the preset.")]
Set = Annotated[
    list[str], typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Change one setting; can be repeated.")
]
Weights = Annotated[str | None, typer.Option(help="Encoder weights: a checkpoint file, 'hub', 'bundled' or 'random'.")]
Address = Annotated[
    str | None,
    typer.Option(
        "--ray-address", envvar="RAY_ADDRESS", help="Ray to use: host:port or auto. Default: start a local Ray."
    ),
]
TrackingUri = Annotated[str | None, typer.Option(help="MLflow tracking URI. Default: sqlite beside the run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Recompute what another configuration changes.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress, only errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the log too; it is kept in logs/ either way.")]


def named_settings(dataset: str | None, data: str | None, weights: str | None) -> list[str]:
    """Return the `section.field=value` assignments that these options stand for."""
    from transfgu_ray.config.sections import NAMED_WEIGHTS

    shorthand = {
        "data.dataset": dataset,
        "data.root": absolute(data),
        "encoder.weights": weights if weights in NAMED_WEIGHTS else absolute(weights),
    }
    return [f"{key}={json.dumps(value)}" for key, value in shorthand.items() if value is not None]


def finite(param: typer.CallbackParam, value: float | None) -> float | None:
    """Return the value of an option that is a number; for `callback=`, since typer's limits let infinity pass.

    Raises:
        ConfigError: it is NaN or infinite.
    """
    if value is not None and not math.isfinite(value):
        raise ConfigError(f"{param.opts[0]} {value} must be a finite number")
    return value


def absolute(path: str | None) -> str | None:
    """Return a path that is valid in the folders of workers and jobs: local paths made absolute, URIs as they are."""
    return path if path is None or "://" in path else os.path.abspath(os.path.expanduser(path))


@contextmanager
def at_work(folder: Folder, command: str) -> Iterator[None]:
    """Keep a folder to this command, and its log in it.

    Raises:
        ArtifactError: another process works there, or the folder cannot be written.
    """
    from transfgu_ray.runs.lock import locked
    from transfgu_ray.runs.logs import kept_log

    with locked(folder), kept_log(folder, command):
        yield


def write_json(file: str | None, content: dict[str, Any]) -> None:
    """Write the file named by --json, if there is one."""
    from transfgu_ray.storage import Folder

    if file is not None:
        folder, _, name = file.rpartition("/")
        Folder(folder or ".").write_json(name, content)
