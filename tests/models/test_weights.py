import hashlib
import re

import pytest

from tests.builders import TINY_OVERRIDES, TINY_VIT, tiny_encoder
from transfgu_ray.algorithms.encoder.checkpoints import dump_encoder, load_encoder
from transfgu_ray.config.run import RunConfig, build_config
from transfgu_ray.errors import StorageError, WeightsError
from transfgu_ray.models.weights import backbone_file_sha256, resolve_encoder, weights_file_sha256

BUNDLED = build_config(RunConfig(), None, ["encoder.weights=bundled", "encoder.pos_embed_interpolation=timm"])


def test_resolve_encoder__bundled_weights_lie_in_the_package(tmp_path, monkeypatch):
    data = dump_encoder(tiny_encoder().vit, TINY_VIT, overrides=TINY_OVERRIDES)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/rendered_vit.safetensors").write_bytes(data)
    monkeypatch.setattr("importlib.resources.files", {"transfgu_ray": tmp_path}.__getitem__)
    # The file's own architecture wins over encoder.name, and it is kept as it is.
    assert resolve_encoder(BUNDLED) == data
    # Another release with other weights makes another run.
    assert weights_file_sha256(BUNDLED.encoder) == hashlib.sha256(data).hexdigest()


def test_resolve_encoder__refuses_an_installation_without_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.resources.files", {"transfgu_ray": tmp_path}.__getitem__)
    with pytest.raises(WeightsError, match=r"has no weights/rendered_vit\.safetensors; install the package again"):
        resolve_encoder(BUNDLED)
    assert weights_file_sha256(BUNDLED.encoder) is None


@pytest.mark.parametrize("weights", ["random", "file"])
def test_resolve_encoder__carries_how_positions_are_interpolated(tmp_path, weights):
    (tmp_path / "own.safetensors").write_bytes(dump_encoder(tiny_encoder().vit, TINY_VIT, overrides=TINY_OVERRIDES))
    settings = [
        f"encoder.name={TINY_VIT}",
        f"encoder.weights={tmp_path / 'own.safetensors' if weights == 'file' else 'random'}",
        "encoder.overrides={embed_dim: 24, depth: 2, num_heads: 3, patch_size: 8}",
        "encoder.pos_embed_interpolation=dino",
    ]
    data = resolve_encoder(build_config(RunConfig(), None, settings))
    assert load_encoder(data, "e").pos_embed_interpolation == "dino"


def test_resolve_encoder__interpolation_has_no_effect_without_positions():
    settings = ["encoder.name=vit_small_patch16_dinov3", "encoder.weights=random", "encoder.overrides={depth: 1}"]
    timm, dino = (
        resolve_encoder(build_config(RunConfig(), None, [*settings, f"encoder.pos_embed_interpolation={how}"]))
        for how in ("timm", "dino")
    )
    assert timm == dino


@pytest.mark.usefixtures("dead_disk")
def test_weights_file_sha256__a_disk_that_does_not_answer_is_no_missing_file(tmp_path):
    (tmp_path / "own.safetensors").write_bytes(b"1")
    weights, file = tmp_path / "own.safetensors", re.escape(str(tmp_path / "own.safetensors"))
    settings = [f"encoder.weights={weights}", "train.backbone=resnet50_fpn", f"train.backbone_weights={weights}"]
    config = build_config(RunConfig(), None, settings)
    for ask in (
        lambda: resolve_encoder(config),
        lambda: weights_file_sha256(config.encoder),
        lambda: backbone_file_sha256(config.train),
    ):
        with pytest.raises(StorageError, match=f"^the storage does not answer: {file}: Input/output error"):
            ask()
