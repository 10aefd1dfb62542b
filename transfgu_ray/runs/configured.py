"""A folder that begins with the configuration it was made with."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import yaml

from transfgu_ray.config.base import Section, difference, dump_yaml, parse_config
from transfgu_ray.errors import ArtifactError
from transfgu_ray.storage import Folder

C = TypeVar("C", bound=Section)


@dataclass(frozen=True, kw_only=True)
class ConfiguredFolder(Generic[C]):
    """A kind of folder that stores its configuration, and the words of its refusals.

    Attributes:
        file: name of the configuration in the folder.
        kind: model of the configuration.
        noun: what such a folder is called.
        missing: refusal of a folder without a configuration; `{uri}` stands for the folder.
        again: what --overwrite does.
        identity: the settings that results depend on, as plain values.
        has_results: whether anything was computed in the folder yet.
    """

    file: str
    kind: type[C]
    noun: str
    missing: str
    again: str
    identity: Callable[[C], dict[str, Any]]
    has_results: Callable[[Folder], bool]

    def open(self, uri: str, config: C | None, *, overwrite: bool) -> tuple[Folder, C]:
        """Open or make a folder and write its configuration before anything else; return both.

        Args:
            uri: local path or URI.
            config: the configuration asked for; None to take the folder's own.
            overwrite: accept another configuration although there are results.

        Raises:
            ArtifactError: there is no configuration, results were made with another one, or it cannot be written.
        """
        folder, stored = Folder(uri), self.stored(uri)
        if config is None:
            if stored is None:
                raise ArtifactError(self.missing.format(uri=uri, quoted=shlex.quote(uri)))
            return folder, stored
        changes = [] if stored is None else difference(self.identity(stored), self.identity(config))
        # A call that was refused before it computed anything leaves only the configuration.
        if changes and not overwrite and self.has_results(folder):
            raise ArtifactError(
                f"{uri} was made with another configuration ({'; '.join(changes)}); use another {self.noun}, or "
                f"--overwrite to {self.again}"
            )
        if stored != config:
            folder.write_bytes(self.file, dump_yaml(config).encode())
        return folder, config

    def stored(self, uri: str) -> C | None:
        """Return the configuration of a folder; None where there is none.

        Raises:
            ArtifactError: the folder cannot be opened or its configuration is damaged.
        """
        folder = Folder(uri)
        try:
            if not folder.exists(self.file):
                return None
            return parse_config(yaml.safe_load(folder.read_bytes(self.file)), self.kind)
        except OSError as error:
            raise ArtifactError(f"cannot open the {self.noun} {uri}: {error.strerror or error}") from None
        except yaml.YAMLError:
            raise ArtifactError(f"{uri}/{self.file} is damaged; use another {self.noun}") from None
