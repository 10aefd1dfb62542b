import hashlib

import pytest

from tests.builders import TINY_OVERRIDES, TINY_VIT, tiny_encoder
from transfgu_ray.algorithms.weights import dump_encoder
from transfgu_ray.config import RunConfig, build_config
from transfgu_ray.errors import WeightsError
from transfgu_ray.prior import resolve_encoder, weights_file_sha256

BUNDLED = build_config(RunConfig(), None, ["encoder.weights=bundled"])


def test_resolve_encoder__bundled_weights_lie_in_the_package(tmp_path, monkeypatch):
    data = dump_encoder(tiny_encoder().vit, TINY_VIT, TINY_OVERRIDES)
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
