"""The run folder: configuration first, manifests last, and what may be reused on a rerun."""

import contextlib
import hashlib
import json
import posixpath
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transfgu_ray.config.run import NOT_IDENTITY, RunConfig
from transfgu_ray.errors import ArtifactError
from transfgu_ray.runs.checksums import (
    Mending,
    checksum_files,
    dump_record,
    find_damaged,
    read_mending,
    record_name,
    write_mending,
)
from transfgu_ray.runs.configured import ConfiguredFolder
from transfgu_ray.runs.index import indexed_checksums, is_of_index
from transfgu_ray.runs.provenance import library_versions
from transfgu_ray.runs.references import TABLES, RunFiles, drop_references, refer, table_folder
from transfgu_ray.runs.stages import NAMES, STAGES
from transfgu_ray.storage import Folder

# In a manifest: when the last file of the stage was written; files to read although nobody has written them since.
_NEWEST, _SUSPECTED = "newest_file_ns", "suspected"


class Run:
    """A run folder and the configuration it was made with."""

    def __init__(self, folder: Folder, config: RunConfig) -> None:
        self.folder = folder
        self.config = config

    @classmethod
    def open(cls, uri: str, config: RunConfig | None, overwrite: bool = False) -> "Run":
        """Open a run folder, or make one; its configuration is written before anything else.

        Args:
            uri: local path or URI.
            config: the configuration asked for; None to take the run's own.
            overwrite: accept another configuration; stages that it touches are computed again.

        Raises:
            ArtifactError: there is no run, it was made with another configuration, or it cannot be written.
        """
        return cls(*_KIND.open(uri, config, overwrite=overwrite))

    @staticmethod
    def stored_config(uri: str) -> RunConfig | None:
        """Return the configuration of a run folder; None where there is no run.

        Raises:
            ArtifactError: the folder cannot be opened or its configuration is damaged.
        """
        return _KIND.stored(uri)

    def fingerprint(self, stage: str, inputs: str) -> str:
        """Return the hash of every setting and input that the output of a stage depends on."""
        return _hash([self._sections(stage), inputs])

    def settings_key(self, stage: str) -> str:
        """Return sixteen hex digits that identify every setting the output of a stage depends on."""
        return _hash([self._sections(stage)])[:16]

    def _sections(self, stage: str) -> dict[str, Any]:
        values, flat = _identity(self.config), {}
        names = STAGES.sections(stage)
        for name in names:
            section, _, field = name.partition(".")
            flat[name] = values[section][field] if field else values[section]
        # Random weights follow from the seed; nothing else of these stages does.
        is_random = self.config.encoder.weights == "random" or (
            "train.backbone_weights" in names and self.config.train.backbone_weights == "random"
        )
        return flat | ({"seed": self.config.seed} if is_random else {})

    def names_sha256(self, stage: str) -> str | None:
        """Return the hash of the concept names; None if there are none, or the stage does not depend on them."""
        if not STAGES[stage].reads_names or not self.folder.exists(NAMES):
            return None
        return hashlib.sha256(self.folder.read_bytes(NAMES)).hexdigest()

    def copy_stage(self, source: "Run", stage: str) -> None:
        """Copy a finished stage of another run, its manifest last."""
        for output in STAGES[stage].outputs:
            self.copy_output(source, output)
        self._copy_manifest(source, stage)

    def refer_stage(self, source: "Run", stage: str) -> None:
        """Take over a finished stage of another run: refer to its tables, copy all else, its manifest last."""
        for output in STAGES[stage].outputs:
            if output in TABLES:
                self.folder.delete(output)
                refer(self.folder, output, table_folder(source.folder, output))
            else:
                self.copy_output(source, output)
        self._copy_manifest(source, stage)

    def _copy_manifest(self, source: "Run", stage: str) -> None:
        if source.folder.exists(record_name(stage)):
            self.folder.copy_from(source.folder, record_name(stage))
        self.folder.copy_from(source.folder, f"{stage}.json")

    def copy_output(self, source: "Run", output: str) -> None:
        """Copy a file, or the files of a table, of another run."""
        for name, _ in source.folder.files(output):
            self.folder.copy_from(source.folder, name)

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """Return the manifest of a finished stage; None if there is none, or it is damaged."""
        try:
            manifest = self.folder.read_json(f"{stage}.json")
        except ValueError:
            return None
        return manifest if isinstance(manifest, dict) and isinstance(manifest.get("fingerprint"), str) else None

    def require(self, stage: str) -> dict[str, Any]:
        """Return the manifest of a stage that another one needs.

        Raises:
            ArtifactError: the stage has not finished.
        """
        manifest = self.manifest(stage)
        if manifest is None:
            raise ArtifactError(f"{self.folder.uri} has no finished stage {stage}; run `{self._command(stage)}` first")
        return manifest

    def _command(self, stage: str) -> str:
        return shlex.join(["transfgu", stage, self.folder.uri])

    def clear(self, stage: str) -> None:
        """Delete the manifest of a stage first, then its outputs; of shared tables only the reference."""
        for name in (f"{stage}.json", record_name(stage), *STAGES[stage].outputs):
            self.folder.delete(name)
        drop_references(self.folder, STAGES[stage].outputs)

    def write_manifest(self, stage: str, fingerprint: str, content: dict[str, Any]) -> dict[str, Any]:
        """Write the checksums of the stage's files, then the manifest that marks it as complete; call it last.

        It records the checksums of the stages before, which this one was made of. Where `discard` had removed damaged
        files, it names them.
        """
        there = self._files(stage)
        record = dump_record(checksum_files(self.folder, _sizes(there), self._known_checksums(stage, there)))
        checksum = hashlib.sha256(record).hexdigest()
        mended = {}
        if (note := read_mending(self.folder, stage)) is not None:
            mended = {"damaged": note.damaged, "same_again": checksum == note.checksum}
            if not mended["same_again"]:
                self._clear_unfinished(STAGES.after(stage))
        names = {"names_sha256": self.names_sha256(stage)} if STAGES[stage].reads_names else {}
        manifest = {"stage": stage, "fingerprint": fingerprint, **names, "made_of": self._made_of(stage), **content}
        manifest |= {**mended, "files_sha256": checksum, _NEWEST: _newest(there), "versions": library_versions()}
        self.folder.write_bytes(record_name(stage), record)
        self.folder.write_json(f"{stage}.json", manifest)
        return manifest

    def changed_before(self, stage: str) -> str | None:
        """Return the first stage whose files are others than those that this finished stage was made of.

        None if there is none, or this stage is unfinished or was made by a version that kept no record of that.
        """
        recorded, now = (self.manifest(stage) or {}).get("made_of", {}), self._made_of(stage)
        return next((each for each, checksum in now.items() if recorded.get(each, checksum) != checksum), None)

    def _made_of(self, stage: str) -> dict[str, str]:
        """Return the checksum of the files of each finished stage that a stage is made of, in order."""
        earlier = [each for each in STAGES.before(stage) if each in STAGES.lasting and not STAGES[each].only_shows]
        manifests = {each: self.manifest(each) or {} for each in earlier}
        return {each: found["files_sha256"] for each, found in manifests.items() if "files_sha256" in found}

    def _clear_unfinished(self, stages: Sequence[str]) -> None:
        """Delete what unfinished stages left, but for a training.

        Parts made of other files must not be mixed in one table. A training of many days goes on: its labels differ by
        no more than rounding, or the stages between would be unfinished too.
        """
        for stage in stages:
            if stage != "train" and self.manifest(stage) is None:
                self.clear(stage)

    def damaged_files(self, stage: str) -> list[str]:
        """Return the files of a finished stage that are missing or changed; none if it has no checksums.

        Files that nobody has written since the stage ended, or since all were last found whole, are compared by size;
        others are read. If the record of checksums is damaged but all files are as the manifest says, it is rewritten;
        else all count.
        """
        manifest = self.manifest(stage)
        if manifest is None or "files_sha256" not in manifest:
            return []
        there, checksum, files = self._files(stage), manifest["files_sha256"], RunFiles(self.folder)
        recorded, newest = self._recorded(stage, checksum), manifest.get(_NEWEST) or 0
        # Clocks of storages tick in milliseconds to seconds.
        untouched = {name for name, (_, written_at) in there.items() if written_at is not None and written_at < newest}
        untouched -= set(manifest.get(_SUSPECTED, ()))
        if recorded is not None:
            damaged = find_damaged(files, recorded, _sizes(there), untouched)
            if not damaged and (_newest(there) > newest or _SUSPECTED in manifest):
                # Copied, touched or suspected: not to be read the next time too, wherever the folder can be written.
                whole = {name: value for name, value in manifest.items() if name != _SUSPECTED}
                with contextlib.suppress(ArtifactError):
                    self.folder.write_json(f"{stage}.json", whole | {_NEWEST: _newest(there)})
            return damaged
        record = dump_record(checksum_files(files, _sizes(there)))
        if hashlib.sha256(record).hexdigest() != checksum:
            return [record_name(stage), *sorted(there)]
        self.folder.write_bytes(record_name(stage), record)
        return []

    def recorded_files(self, stage: str) -> dict[str, dict[str, Any]] | None:
        """Return what `checksum_files` said of a finished stage's files; None where the record itself is damaged."""
        return self._recorded(stage, self.require(stage).get("files_sha256"))

    def _recorded(self, stage: str, checksum: str | None) -> dict[str, dict[str, Any]] | None:
        record = self.folder.find_bytes(record_name(stage)) or b""
        if hashlib.sha256(record).hexdigest() != checksum:
            return None
        recorded: dict[str, dict[str, Any]] = json.loads(record)
        return recorded

    def suspect(self, stage: str, names: Sequence[str]) -> None:
        """Let the next call read some files of a finished stage, although nobody has written them since."""
        self.folder.write_json(f"{stage}.json", self.require(stage) | {_SUSPECTED: list(names)})

    def require_whole(self, stage: str) -> None:
        """Refuse a finished stage whose files have changed since.

        Raises:
            ArtifactError: some are not; the message names the first, and what makes it again.
        """
        if damaged := self.damaged_files(stage):
            first = RunFiles(self.folder).folder_of(damaged[0]).uri_of(damaged[0])
            raise ArtifactError(
                f"{first}{and_more(damaged)}: not what stage {stage} wrote, damaged or deleted since; run "
                f"`{self._command(stage)}` to make it again"
            )

    def discard(self, stage: str, damaged: list[str]) -> None:
        """Delete the damaged files of a finished stage and then its manifest, so that they are made again.

        Shared tables are left alone, since the stage then makes tables of its own.
        In this order a kill in between leaves a stage that lacks files, not one that would go on with damaged ones.
        """
        checksum = self.require(stage)["files_sha256"]
        for name in damaged:
            self.folder.delete(name)
        if any(name.startswith("samples/") for name in damaged):
            # Samples are written with the part that counts their photograph.
            self.folder.delete("confusions")
            self.folder.delete("extremes")
        write_mending(self.folder, stage, Mending(damaged, checksum))
        self.folder.delete(f"{stage}.json")

    def _known_checksums(self, stage: str, there: Iterable[str]) -> dict[str, str]:
        """Return the checksums that the writers of a stage's parts have taken, of the files that are there."""
        known: dict[str, str] = {}
        for table in {name.partition("/")[0] for name in there if is_of_index(name)}:
            known |= indexed_checksums(self.folder, table)
        return {name: known[name] for name in there if name in known}

    def _files(self, stage: str) -> dict[str, tuple[int, int | None]]:
        """Return the bytes of each file of a stage that checksums are kept of, and when it was written."""
        found: dict[str, tuple[int, int | None]] = {}
        files = RunFiles(self.folder)
        for output in STAGES[stage].outputs:
            # The stage train itself leaves nothing deeper.
            for name, num_bytes, written_at in files.dated_files(output, recursive=output != "train"):
                found[name] = num_bytes, written_at
        return {
            name: of_file
            for name, of_file in found.items()
            if not name.startswith(STAGES[stage].unchecked) and not posixpath.basename(name).startswith(".")
        }


def _sizes(files: Mapping[str, tuple[int, int | None]]) -> dict[str, int]:
    return {name: num_bytes for name, (num_bytes, _) in files.items()}


def _newest(files: Mapping[str, tuple[int, int | None]]) -> int:
    """Return when the last of these files was written, ns by the storage's clock; 0 where it does not say."""
    return max((written_at or 0 for _, written_at in files.values()), default=0)


def and_more(damaged: Sequence[str]) -> str:
    """Return the phrase that counts the damaged files after the first."""
    return f" and {len(damaged) - 1} more files" if len(damaged) > 1 else ""


def _hash(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _identity(config: RunConfig) -> dict[str, Any]:
    values = config.model_dump(mode="json", exclude=NOT_IDENTITY)
    # Where the photographs lie does not matter; the input fingerprint says which they are.
    del values["data"]["root"]
    return values


def _has_results(folder: Folder) -> bool:
    return any(folder.exists(f"{stage}.json") for stage in STAGES.names) or any(True for _ in folder.files("features"))


_KIND = ConfiguredFolder(
    file="config.yaml",
    kind=RunConfig,
    noun="run folder",
    missing="{uri} is no run folder (it has no config.yaml); start one with `transfgu run {quoted}`",
    again="compute again what this changes",
    identity=_identity,
    has_results=_has_results,
)
