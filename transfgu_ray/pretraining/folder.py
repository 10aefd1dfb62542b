"""The folder of a pretraining: configuration first, manifest last, and what may be continued in it."""

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
# The teacher's backbone: the result, and the same as of the last checkpoint.
RESULT = "encoder.safetensors"
LATEST = "train/encoder.safetensors"


class PretrainFolder:
    """A folder and the configuration it was made with."""

    def __init__(self, folder: Folder, config: PretrainConfig) -> None:
        self.folder = folder
        self.config = config

    @classmethod
    def open(cls, uri: str, config: PretrainConfig | None, overwrite: bool) -> "PretrainFolder":
        """Opens a folder, or makes one; its configuration is written before anything else.

        Args:
            uri: local path or URI.
            config: the configuration asked for; None to take the folder's own.
            overwrite: accept another configuration and begin anew.

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
        """Hash of every setting and of the images' own fingerprint."""
        return hashlib.sha256(json.dumps([identity(self.config), images], sort_keys=True).encode()).hexdigest()

    def finished(self, fingerprint: str, overwrite: bool) -> dict[str, Any] | None:
        """The manifest of a finished pretraining; None where there is something to do.

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
        """Refuses before anything is computed what a local disk cannot hold.

        Raises:
            ArtifactError: there is too little space.
        """
        if not isinstance(self.folder.fs, pafs.LocalFileSystem):
            return
        free = shutil.disk_usage(self.folder.path).free
        if num_bytes > free:
            raise ArtifactError(
                f"{self.folder.uri} needs {num_bytes / 1e9:.1f} GB for working copies of the images but has "
                f"{free / 1e9:.1f} GB; choose a larger disk or lower data.source_size"
            )

    def write_manifest(self, fingerprint: str, content: dict[str, Any]) -> dict[str, Any]:
        """Marks the pretraining as complete; call it last."""
        manifest = {"stage": "pretrain", "fingerprint": fingerprint, **content, "versions": library_versions()}
        self.folder.write_json(MANIFEST, manifest)
        return manifest


def training_name(fingerprint: str) -> str:
    """Ray Train's name of a training: it continues whatever it finds under a name, so the name says what is trained."""
    return f"dino-{fingerprint[:16]}"


def identity(config: PretrainConfig) -> dict[str, Any]:
    """Every setting that the result depends on, as plain values."""
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
