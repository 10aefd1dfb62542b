"""Versions in a real MLflow registry, and which of them can be compared. No Ray."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.builders import TINY_OVERRIDES, TINY_VIT, make_folder, make_scenes, tiny_encoder
from tests.fixtures import TINY
from transfgu_ray.algorithms.encoder.checkpoints import dump_encoder
from transfgu_ray.config.presets import get_preset
from transfgu_ray.config.run import RunConfig, build_config
from transfgu_ray.errors import ArtifactError, ConfigError
from transfgu_ray.models.model import build_decoder, load_model, save_decoder
from transfgu_ray.pipeline.train_loop import model_config
from transfgu_ray.runs.provenance import git_commit
from transfgu_ray.runs.run import Run
from transfgu_ray.storage import Folder
from transfgu_ray.studies.versions import Entry, enter
from transfgu_ray.tracking import runs as tracking
from transfgu_ray.tracking.client import connect
from transfgu_ray.tracking.models import register
from transfgu_ray.tracking.registry import Registry, Version


def registered(folder: Path, *settings: str) -> Run:
    """A run that has only a model, registered in a store beside it."""
    run = Run.open(str(folder), build_config(get_preset("tiny_cpu"), None, [*TINY, "data.root=unread", *settings]))
    model = Folder(run.folder.uri_of("model"))
    model.write_bytes("encoder.safetensors", dump_encoder(tiny_encoder().vit, TINY_VIT, overrides=TINY_OVERRIDES))
    config = model_config(run.config, ["any"] * run.config.num_concepts, "ab")
    save_decoder(model, build_decoder(config, 24).state_dict(), config=config)
    metrics = {"stages": None, "refined": None, "baselines": None, "weights_sha256": "ab"}
    tracked = tracking.begin(run.folder, run.config)
    register(tracked, run, metrics=metrics, artifacts=["config.yaml"], more_tags={"score": "0.25"})
    return run


def test_registry__versions_can_be_scored_again_and_the_alias_moves(tmp_path: Path) -> None:
    runs = [registered(tmp_path / name, setting) for name, setting in (("one", "seed=0"), ("other", "seed=1"))]
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    registry = Registry("transfgu", uri)
    versions = registry.versions([])
    assert [version.number for version in versions] == [1, 2]
    for version, run in zip(versions, runs, strict=True):
        assert version.config == run.config
        assert load_model(version.model).config == load_model(Folder(run.folder.uri_of("model"))).config
        assert version.num_bytes == sum(size for _, size in run.folder.files("model"))
        assert version.aliases == ()
        want = {"recipe": "tiny_cpu", "num_concepts": "4", "weights_sha256": "ab", "score": "0.25"}
        assert version.tags.items() >= want.items()

    left = {"MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"} & set(os.environ)
    assert not left, "the next run of this process would take it for the user's choice"
    assert registry.champion is None
    for number in (1, 2):
        registry.promote(number)
    again = Registry("transfgu", uri)
    assert again.champion == 2
    assert [version.aliases for version in again.versions([])] == [("previous-champion",), ("champion",)]
    assert [version.number for version in again.versions([1])] == [1, 2], "the champion is always compared too"
    with pytest.raises(ArtifactError, match=r"no version 3, 7 .*it has: 1, 2"):
        again.versions([1, 3, 7])
    with pytest.raises(ArtifactError, match=r"no model 'other' .*it has: transfgu"):
        Registry("other", uri)

    run_id = again.log_comparison(
        versions[0].run_id,
        {"model": "transfgu", "versions": [{"version": 1, "miou": 0.5, "difference": {"miou": 0.25}, "per_class": []}]},
        {"comparison.json": b"{}"},
    )
    client, _ = connect(uri)
    logged = client.get_run(run_id)
    assert logged.info.status == "FINISHED"
    assert logged.data.metrics == {"version_1/miou": 0.5, "version_1/difference/miou": 0.25}
    assert [item.path for item in client.list_artifacts(run_id)] == ["comparison.json"]


def entered(
    out: Path, settings: list[tuple[str, ...]], data: Path, dataset: str | None = None
) -> tuple[list[Entry], int, bool]:
    """Enter versions 1, 2, ...; return them, the number of photographs, and whether these have labels."""
    base = build_config(RunConfig(), None, ["data.dataset=voc", "data.root=elsewhere"])
    configs = [build_config(base, None, each) for each in settings]
    versions = [Version(i, (), {}, "", config, Folder(str(out))) for i, config in enumerate(configs, start=1)]
    registry = Registry.__new__(Registry)
    registry.name, registry.uri = "transfgu", ""
    entries, listing, has_labels = enter(registry, versions, dataset=dataset, data=str(data), out=Folder(str(out)))
    return entries, len(listing.images), has_labels


def test_enter__changes_only_the_root_of_the_photographs(voc: Path, tmp_path: Path) -> None:
    (one, other), num_images, has_labels = entered(tmp_path, [("seed=1",), ("train.omega_1=2",)], voc)
    assert (num_images, has_labels) == (3, True)
    assert one.config.data.root == str(voc)
    for entry in (one, other):
        values, own = (config.model_dump(exclude={"data"}) for config in (entry.config, entry.version.config))
        # K is stored as a number, for datasets with other classes.
        assert values == own
        assert entry.config.evaluate_image_size == entry.version.config.evaluate_image_size
    assert one.folder.uri != other.folder.uri
    ((same,), *_), ((changed,), *_) = (entered(tmp_path, [(f"seed={seed}",)], voc) for seed in (1, 2))
    assert same.fingerprint == one.fingerprint != changed.fingerprint


def test_enter__another_dataset_keeps_the_settings_of_the_model(tmp_path: Path) -> None:
    settings = [("concepts.num_concepts=null", "evaluate.split=train")]
    scenes = make_scenes(tmp_path / "scenes", num_train=1, num_val=2, size=(40, 40))
    ((entry,), num_images, has_labels) = entered(tmp_path, settings, scenes, "scenes")
    assert (num_images, has_labels) == (2, True)
    assert (entry.config.region_mode, entry.config.num_concepts) == ("things_only", 20)
    assert len(entry.config.class_names) == 16
    ((entry,), num_images, has_labels) = entered(
        tmp_path, settings, make_folder(tmp_path / "folder", num_images=4), "folder"
    )
    assert (num_images, has_labels) == (4, False)


@pytest.mark.parametrize(
    ("settings", "dataset", "words"),
    [
        (("evaluate.unmatched=count",), None, "versions 1 and 2 .*evaluate.unmatched: discard and count.*--versions"),
        (("train.inference_size=[64, 64]",), None, r"evaluate.image_size: \[320, 320\] and \[64, 64\]"),
        (("data.dataset=folder",), None, r"several datasets \(1 on voc, 2 on folder\); .*--dataset"),
        ((), "scene", "version 1 cannot be scored on dataset scene: .*unknown dataset"),
    ],
)
def test_enter__refuses_versions_that_cannot_be_compared(
    voc: Path, tmp_path: Path, settings: tuple[str, ...], dataset: str | None, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        entered(tmp_path, [(), settings], voc, dataset)


def test_enter__without_labels_any_protocols_are_compared(tmp_path: Path) -> None:
    data = make_folder(tmp_path / "folder", num_images=1)
    entries, _, has_labels = entered(tmp_path, [(), ("evaluate.unmatched=count",)], data, "folder")
    assert (len(entries), has_labels) == (2, False)


def test_git_commit__of_a_checkout_alone(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert git_commit(tmp_path) is None
    (tmp_path / "file").write_text("one")
    for arguments in (("init",), ("add", "file"), ("commit", "-m", "one"), ("tag", "-a", "v1", "-m", "one")):
        git(*arguments)
    assert git_commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("two")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD") + "-dirty"
