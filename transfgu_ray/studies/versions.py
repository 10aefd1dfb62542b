"""Checks of which registered versions can be compared on which photographs, and their configurations."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transfgu_ray.config.base import flatten
from transfgu_ray.config.run import NOT_RESULT, RunConfig, build_config
from transfgu_ray.datasets import DATASETS
from transfgu_ray.datasets.listing import Listing
from transfgu_ray.errors import ConfigError
from transfgu_ray.pipeline.inputs import list_scored, list_training
from transfgu_ray.storage import Folder
from transfgu_ray.tracking.registry import Registry, Version

# Settings in which versions must agree, or their scores measure different things.
_PROTOCOL = (
    "data.min_side_px", "data.max_pixels", "concepts.granularity", "evaluate.split", "evaluate.protocol",
    "evaluate.unmatched",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A version to compare.

    Attributes:
        version: as registered.
        config: its configuration, with the photographs of the comparison.
        folder: of its work; named by the fingerprint.
        fingerprint: of everything that its work depends on.
    """

    version: Version
    config: RunConfig
    folder: Folder
    fingerprint: str

    @property
    def number(self) -> int:
        """Number of the version."""
        return self.version.number

    @property
    def model(self) -> Folder:
        """Folder of the model that workers can read."""
        return Folder(self.folder.uri_of("model"))


def enter(
    registry: Registry, versions: Sequence[Version], *, dataset: str | None, data: str, out: Folder
) -> tuple[list[Entry], Listing, bool]:
    """Return the versions on these photographs, the photographs, and whether they have labels.

    Args:
        registry: of the versions.
        versions: at least one.
        dataset: layout of the photographs; None for the dataset that the versions were made on.
        data: folder or URI of the photographs.
        out: folder of the work.

    Raises:
        ConfigError: the versions cannot be scored on this dataset, or are scored in different ways.
        DataError: the photographs or their labels are missing.
    """
    configs = _configs_on(versions, dataset, data)
    scored = list_scored(configs[0])
    if scored is not None:
        _check_protocol(versions, configs)
    listing = scored or list_training(configs[0])
    entries = []
    for version, config in zip(versions, configs, strict=True):
        identity = config.model_dump(mode="json", exclude=NOT_RESULT)
        text = json.dumps([registry.uri, registry.name, version.number, version.run_id, identity, listing.fingerprint])
        fingerprint = hashlib.sha256(text.encode()).hexdigest()
        entries.append(Entry(version, config, Folder(out.uri_of(f"versions/{fingerprint[:16]}")), fingerprint))
    return entries, listing, scored is not None


def _configs_on(versions: Sequence[Version], dataset: str | None, data: str) -> list[RunConfig]:
    """Return the configuration of each version with these photographs in place of its own."""
    own = {version.config.data.dataset: version.number for version in versions}
    if dataset is None and len(own) > 1:
        made = ", ".join(f"{number} on {name}" for name, number in own.items())
        raise ConfigError(
            f"the versions were made on several datasets ({made}); name the dataset of --data with --dataset"
        )
    configs = []
    for version in versions:
        config, name = version.config, dataset or version.config.data.dataset
        changes: dict[str, Any] = {
            "data.dataset": name,
            "data.root": data,
            "data.names": [],
            # As the model was made; the default of the dataset may differ.
            "data.region_mode": config.region_mode,
            "concepts.num_concepts": config.num_concepts,
        }
        if name != config.data.dataset:
            changes["evaluate.split"] = None
        if name in DATASETS and DATASETS[name].evaluate_split is None:
            # Neither has a meaning without labels.
            changes |= {"concepts.granularity": "fine", "extract.windows": "sliding"}
        try:
            configs.append(build_config(config, None, [f"{key}={json.dumps(value)}" for key, value in changes.items()]))
        except ConfigError as error:
            raise ConfigError(f"version {version.number} cannot be scored on dataset {name}: {error}") from None
    return configs


def _check_protocol(versions: Sequence[Version], configs: Sequence[RunConfig]) -> None:
    first = _rules(configs[0])
    for version, config in zip(versions, configs, strict=True):
        rules = _rules(config)
        different = [f"{name}: {first[name]} and {rules[name]}" for name in first if rules[name] != first[name]]
        if different:
            raise ConfigError(
                f"versions {versions[0].number} and {version.number} are scored in different ways "
                f"({'; '.join(different)}); name versions of one protocol with --versions"
            )


def _rules(config: RunConfig) -> dict[str, Any]:
    values = flatten(config.model_dump(mode="json"))
    return {name: values[name] for name in _PROTOCOL} | {"evaluate.image_size": list(config.evaluate_image_size)}
