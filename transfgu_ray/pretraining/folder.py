"""The folder of a pretraining: configuration written first, manifest last, and what may be continued."""

import hashlib
import json
import shutil
from typing import Any

import pyarrow.fs as pafs

from transfgu_ray.errors import ArtifactError
from transfgu_ray.pretraining.config import PretrainConfig
from transfgu_ray.runs.configured import ConfiguredFolder
from transfgu_ray.runs.provenance import library_versions
from transfgu_ray.storage import Folder

CONFIG = "pretrain.yaml"
MANIFEST = "pretrain.json"
HISTORY = "history.json"
# The backbone of the teacher: the final one, and that of the last checkpoint.
RESULT = "encoder.safetensors"
LATEST = "train/encoder.safetensors"


class PretrainFolder:
    """A folder and the configuration it was made with."""

    def __init__(self, folder: Folder, config: PretrainConfig) -> None:
        self.folder = folder
        self.config = config

    @classmethod
    def open(cls, uri: str, config: PretrainConfig | None, overwrite: bool) -> "PretrainFolder":
        """Open or make a folder; its configuration is written before anything else.

        Args:
            uri: local path or URI.
            config: the configuration asked for; None for the stored one.
            overwrite: accept another configuration and start over.

        Raises:
            ArtifactError: there is no pretraining, it was made with another configuration, or it cannot be written.
        """
        return cls(*_KIND.open(uri, config, overwrite=overwrite))

    @staticmethod
    def stored_config(uri: str) -> PretrainConfig | None:
        """Return the configuration of a folder; None where there is none.

        Raises:
            ArtifactError: the folder cannot be opened or its configuration is damaged.
        """
        return _KIND.stored(uri)

    def fingerprint(self, images: str) -> str:
        """Return a hash of every setting that the result depends on and of the fingerprint of the images."""
        return hashlib.sha256(json.dumps([identity(self.config), images], sort_keys=True).encode()).hexdigest()

    def finished(self, fingerprint: str, overwrite: bool) -> dict[str, Any] | None:
        """Return the manifest of a finished pretraining; None where there is work left.

        Raises:
            ArtifactError: the folder's results come from other images and may not be overwritten.
        """
        begun = {name.split("/")[1] for name, _ in self.folder.files("train", recursive=True) if name.count("/") > 1}
        manifest: dict[str, Any] | None = self.folder.read_json(MANIFEST)
        if manifest is not None and manifest["fingerprint"] == fingerprint:
            return manifest
        if manifest is None and begun <= {training_name(fingerprint)}:
            return None
        if not overwrite:
            raise ArtifactError(
                f"{self.folder.uri} was made with other settings or images; use another folder, or --overwrite to "
                "train anew"
            )
        for name in (MANIFEST, RESULT, HISTORY, "train"):
            self.folder.delete(name)
        return None

    def require_space(self, num_bytes: int) -> None:
        """Refuse a local disk with less free space than `num_bytes`.

        Raises:
            ArtifactError: there is too little space.
        """
        if not isinstance(self.folder.fs, pafs.LocalFileSystem):
            return
        free = self.folder.patiently("", lambda: shutil.disk_usage(self.folder.path)).free
        if num_bytes > free:
            raise ArtifactError(
                f"{self.folder.uri} needs {num_bytes / 1e9:.1f} GB for working copies of the images but has "
                f"{free / 1e9:.1f} GB; choose a larger disk or lower data.source_size"
            )

    def write_manifest(self, fingerprint: str, content: dict[str, Any]) -> dict[str, Any]:
        """Write and return the manifest, which marks the pretraining as complete; call it last."""
        manifest = {"stage": "pretrain", "fingerprint": fingerprint, **content, "versions": library_versions()}
        self.folder.write_json(MANIFEST, manifest)
        return manifest


def training_name(fingerprint: str) -> str:
    """Return Ray Train's name of a training; it continues what has the same name, so the name depends on all inputs."""
    return f"dino-{fingerprint[:16]}"


def identity(config: PretrainConfig) -> dict[str, Any]:
    """Return every setting that the result depends on, as plain values."""
    values = config.model_dump(mode="json", exclude={"preset", "runtime"})
    # Where the images lie does not matter; their fingerprint says which they are.
    del values["data"]["root"], values["data"]["val_root"]
    return values


def _has_results(folder: Folder) -> bool:
    return folder.exists(MANIFEST) or any(True for _ in folder.files("train", recursive=True))


_KIND = ConfiguredFolder(
    file=CONFIG,
    kind=PretrainConfig,
    noun="folder",
    missing=f"{{uri}} holds no pretraining (it has no {CONFIG}); start one with --data DIR",
    again="train anew",
    identity=identity,
    has_results=_has_results,
)
