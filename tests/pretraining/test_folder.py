"""What is continued in the folder of a pretraining, and what is refused."""

import errno
import shutil

import pytest

from transfgu_ray.config.run import build_config
from transfgu_ray.errors import ArtifactError
from transfgu_ray.pretraining.config import PretrainConfig
from transfgu_ray.pretraining.folder import PretrainFolder, training_name


def config(*assignments: str) -> PretrainConfig:
    return build_config(PretrainConfig(), None, assignments)


def opened(folder, *assignments: str, overwrite: bool = False) -> PretrainFolder:
    return PretrainFolder.open(str(folder), config(*assignments), overwrite)


def test_open__writes_the_configuration_first(tmp_path):
    first = opened(tmp_path / "out", "seed=3")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["pretrain.yaml"]
    assert PretrainFolder.open(str(tmp_path / "out"), None, False).config == first.config
    # Nothing was computed yet, so the settings may still change.
    assert opened(tmp_path / "out", "seed=4").config.seed == 4


def test_open__refuses_other_settings_once_something_was_computed(tmp_path):
    folder = opened(tmp_path, "data.root=/a").folder
    folder.write_bytes("train/dino-1/checkpoint", b"")
    with pytest.raises(ArtifactError, match=r"seed: 0 -> 1; dino\.clip_norm: 3\.0 -> 1\.0\); .*--overwrite"):
        opened(tmp_path, "seed=1", "dino.clip_norm=1.0")
    # Where it runs and where the images lie do not count as settings.
    opened(tmp_path, "data.root=/b", "runtime.train_workers=2")
    assert opened(tmp_path, "seed=1", overwrite=True).config.seed == 1


def test_open__refuses_a_folder_without_a_pretraining(tmp_path):
    with pytest.raises(ArtifactError, match=r"holds no pretraining .*--data DIR"):
        PretrainFolder.open(str(tmp_path), None, False)
    (tmp_path / "pretrain.yaml").write_text("seed: [")
    with pytest.raises(ArtifactError, match=r"pretrain\.yaml is damaged"):
        PretrainFolder.open(str(tmp_path), None, False)


def test_finished__only_with_the_same_settings_and_images(tmp_path):
    out = opened(tmp_path)
    ours, theirs = out.fingerprint("images"), out.fingerprint("other images")
    assert out.finished(ours, False) is None
    out.folder.write_bytes(f"train/{training_name(ours)}/checkpoint", b"")
    assert out.finished(ours, False) is None, "a begun training of the same name is continued"
    with pytest.raises(ArtifactError, match=r"other settings or images; .*--overwrite"):
        out.finished(theirs, False)
    written = out.write_manifest(ours, {"loss": 1.0})
    assert out.finished(ours, False) == written
    assert {"stage", "fingerprint", "versions"} <= set(written)
    with pytest.raises(ArtifactError, match="other settings or images"):
        out.finished(theirs, False)
    assert out.finished(theirs, True) is None
    assert [path.name for path in tmp_path.iterdir()] == ["pretrain.yaml"]


def test_require_space__refuses_more_than_the_disk_holds(tmp_path):
    out = opened(tmp_path)
    out.require_space(1000)
    with pytest.raises(ArtifactError, match=r"needs 1000000000\.0 GB .*lower data\.source_size"):
        out.require_space(10**18)


def test_require_space__outlasts_a_disk_that_fails_for_a_moment(tmp_path, monkeypatch):
    out, attempts = opened(tmp_path), []

    def disk_usage(path):
        attempts.append(path)
        if len(attempts) == 1:
            raise OSError(errno.ESTALE, "Stale file handle")
        return ask(path)

    ask = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    out.require_space(1000)
    assert attempts == [str(tmp_path)] * 2
