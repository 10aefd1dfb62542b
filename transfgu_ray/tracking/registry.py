"""MLflow's registry: versions of a model that can be scored again, the alias `champion`, and comparisons."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from transfgu_ray.config.base import flatten, parse_config
from transfgu_ray.config.run import RunConfig
from transfgu_ray.errors import ArtifactError, ConfigError, foreign_words
from transfgu_ray.storage import Folder
from transfgu_ray.tracking.client import answering, connect, registry_uri
from transfgu_ray.tracking.models import fetch_model
from transfgu_ray.tracking.runs import log_files, log_params

CHAMPION = "champion"
_PREVIOUS = "previous-champion"


@dataclass(frozen=True)
class Version:
    """A registered version of a model.

    Attributes:
        number: of the version.
        aliases: of the version.
        tags: of the version.
        run_id: MLflow's id of the run that made it.
        config: the configuration of that run.
        model: local folder of its files.
    """

    number: int
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    run_id: str
    config: RunConfig
    model: Folder

    @property
    def num_bytes(self) -> int:
        """Size of all files of the model."""
        return sum(size for _, size in self.model.files())


class Registry:
    """The versions of one registered model.

    Args:
        name: of the model.
        uri: tracking URI; None = $MLFLOW_TRACKING_URI, else a sqlite store in the working directory.

    Raises:
        ArtifactError: the model does not exist, or MLflow failed.
    """

    def __init__(self, name: str, uri: str | None) -> None:
        self.name = name
        self._client, self.uri = connect(registry_uri(uri))
        with answering(self.uri):
            self._aliases = self._read_aliases()

    def _read_aliases(self) -> dict[str, int]:
        import mlflow

        try:
            found = self._client.get_registered_model(self.name).aliases
            return {alias: int(number) for alias, number in found.items()}
        except mlflow.exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            known = ", ".join(model.name for model in self._client.search_registered_models()) or "none"
            raise ArtifactError(
                f"no model {self.name!r} in the registry at {self.uri} (it has: {known}); see --model and "
                "--tracking-uri"
            ) from None

    @property
    def champion(self) -> int | None:
        """Number of the version with the alias `champion`; None where there is none."""
        return self._aliases.get(CHAMPION)

    def versions(self, numbers: Sequence[int]) -> list[Version]:
        """Return the named versions and the champion, ordered by number; all where none is named.

        Raises:
            ArtifactError: a version does not exist, or was not registered by a run of this package.
        """
        found = {int(each.version): each for each in self._client.search_model_versions(f"name='{self.name}'")}
        unknown = [str(number) for number in numbers if number not in found]
        if unknown or not found:
            raise ArtifactError(
                f"model {self.name} has no version {', '.join(unknown) or 'at all'} in the registry at {self.uri}; it "
                f"has: {', '.join(map(str, sorted(found))) or 'none'}"
            )
        wanted = {*numbers, *([] if self.champion is None else [self.champion])} if numbers else set(found)
        return [self._version(number, found[number]) for number in sorted(wanted)]

    def promote(self, number: int) -> None:
        """Move `champion` to a version, and `previous-champion` to the one that had it."""
        if self.champion is not None:
            # First, so that a kill in between loses neither.
            self._client.set_registered_model_alias(self.name, _PREVIOUS, str(self.champion))
        self._client.set_registered_model_alias(self.name, CHAMPION, str(number))
        self._aliases[CHAMPION] = number

    def log_comparison(self, run_id: str, comparison: dict[str, Any], files: Mapping[str, bytes]) -> str:
        """Log a comparison as a new run in the experiment of another run; return its id.

        Args:
            run_id: of that other run.
            comparison: content of comparison.json.
            files: artifacts, by name.
        """
        client = self._client
        experiment_id = client.get_run(run_id).info.experiment_id
        own_id: str = client.create_run(experiment_id, run_name=f"compare {self.name}").info.run_id
        try:
            numbers = [row["version"] for row in comparison["versions"]]
            params = {key: value for key, value in comparison.items() if not isinstance(value, list | dict)}
            log_params(client, own_id, params | {"versions": ", ".join(map(str, numbers))})
            for row in comparison["versions"]:
                for key, value in flatten(row, f"version_{row['version']}/").items():
                    if isinstance(value, float):
                        client.log_metric(own_id, key.replace(".", "/"), value)
            log_files(client, own_id, files.items())
        except BaseException:
            client.set_terminated(own_id, status="FAILED")
            raise
        client.set_terminated(own_id, status="FINISHED")
        return own_id

    def _version(self, number: int, found: Any) -> Version:
        return Version(
            number,
            tuple(sorted(alias for alias, of in self._aliases.items() if of == number)),
            dict(found.tags),
            found.run_id,
            self._config(number, found.run_id),
            Folder(fetch_model(f"models:/{self.name}/{number}", self.uri)),
        )

    def _config(self, number: int, run_id: str) -> RunConfig:
        import mlflow

        try:
            with tempfile.TemporaryDirectory() as directory:
                file = Path(self._client.download_artifacts(run_id, "config.yaml", directory))
                return parse_config(yaml.safe_load(file.read_bytes()), RunConfig)
        except (mlflow.exceptions.MlflowException, OSError, yaml.YAMLError, ConfigError) as error:
            raise ArtifactError(
                f"version {number} of {self.name} cannot be scored again: its MLflow run has no config.yaml that this "
                f"package can read ({foreign_words(error)}); name other versions with --versions"
            ) from None
