import json
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torchvision.models.resnet import Bottleneck

from tests.builders import TINY_OVERRIDES, TINY_VIT, random_images, scene, small_resnet, tiny_encoder
from transfgu_ray.algorithms.encoder.checkpoints import dump_encoder
from transfgu_ray.algorithms.encoder.resnet import Backbone, PyramidDecoder, dump_resnet, random_resnet
from transfgu_ray.algorithms.rounds.segmenter import Classifier
from transfgu_ray.algorithms.scores.upsampling import upsample_argmax
from transfgu_ray.errors import ArtifactError, WeightsError
from transfgu_ray.images import to_working
from transfgu_ray.models.model import (
    ModelConfig,
    SegmentationModel,
    build_decoder,
    load_model,
    load_model_config,
    save_decoder,
)
from transfgu_ray.storage import Folder

KINDS = ("foreground", "foreground", "background", "none")
CONFIG = ModelConfig((32, 48), KINDS, decoder_layers=1, decoder_heads=3, precision="float32", weights_sha256="ab")


def _segmenter(config=CONFIG):
    torch.manual_seed(0)
    return SegmentationModel(tiny_encoder(), build_decoder(config, 24, dropout=0.1), config=config)


def _saved(path, config=CONFIG):
    model, folder = _segmenter(config), Folder(str(path))
    folder.write_bytes("encoder.safetensors", dump_encoder(model.encoder.vit, TINY_VIT, overrides=TINY_OVERRIDES))
    save_decoder(folder, model.decoder.state_dict(), config=config)
    return model, folder


def test_load_model__same_maps_without_the_run(tmp_path):
    model, folder = _saved(tmp_path)
    loaded = load_model(folder)
    assert loaded.config == CONFIG
    images = random_images(2, 32, 48)
    assert torch.equal(loaded.class_maps(images), model.class_maps(images))
    # Dropout is for training only.
    assert torch.equal(loaded.class_maps(images), loaded.class_maps(images))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "decoder.safetensors", "encoder.safetensors"]


def test_load_model__a_decoder_of_windows(tmp_path):
    config = replace(CONFIG, token_window=16)
    model, folder = _saved(tmp_path, config)
    loaded, images = load_model(folder), random_images(2, 32, 48)
    assert loaded.config.token_window == 16
    assert loaded.decoder.proj_dec.in_features == 48
    assert torch.equal(loaded.class_maps(images), model.class_maps(images))


def test_load_model__a_classifier(tmp_path):
    config = replace(CONFIG, decoder="classifier")
    model, folder = _saved(tmp_path, config)
    loaded, images = load_model(folder), random_images(2, 32, 48)
    assert isinstance(loaded.decoder, Classifier)
    assert torch.equal(loaded.class_maps(images), model.class_maps(images))


def test_load_model__a_student_with_a_backbone_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("transfgu_ray.algorithms.encoder.resnet._build", lambda: small_resnet(Bottleneck))
    config = replace(CONFIG, backbone="resnet50_fpn")
    model, folder = _saved(tmp_path, config)
    with pytest.raises(ArtifactError, match=r"it has no backbone\.safetensors"):
        load_model(folder)
    resnet, images = random_resnet(seed=0), random_images(1, 32, 48)
    folder.write_bytes("backbone.safetensors", dump_resnet(resnet))
    loaded = load_model(folder)
    assert isinstance(loaded.decoder, PyramidDecoder)
    want = model.decoder(Backbone(resnet).read(images, (4, 6)), (4, 6))[0]
    assert torch.equal(loaded.class_maps(images), want)


def test_load_model_config__of_a_folder_older_than_the_choice_of_decoder(tmp_path):
    model, folder = _saved(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["decoder"], values["backbone"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    loaded, images = load_model(folder), random_images(1, 32, 48)
    assert loaded.config == CONFIG
    assert torch.equal(loaded.class_maps(images), model.class_maps(images))


def test_load_model__another_decoder_beside_the_last(tmp_path):
    _, folder = _saved(tmp_path)
    torch.manual_seed(1)
    other = build_decoder(CONFIG, 24)
    save_decoder(folder, other.state_dict(), config=CONFIG, name="decoder_round0")
    assert torch.equal(load_model(folder, decoder="decoder_round0").decoder.proj_patch, other.proj_patch)
    assert not torch.equal(load_model(folder).decoder.proj_patch, other.proj_patch)


def test_segment__each_photograph_at_its_own_size():
    model = _segmenter()
    rng = np.random.default_rng(0)
    photos = [scene(size, rng)[0] for size in ((96, 72), (50, 131), (32, 32))]
    masks = model.segment(photos)
    assert [mask.shape for mask in masks] == [(72, 96), (131, 50), (32, 32)]
    assert {mask.dtype for mask in masks} == {np.dtype(np.uint8)}
    working = torch.from_numpy(to_working(photos[1], (32, 48), model.config.resample))[None]
    assert np.array_equal(masks[1], upsample_argmax(model.class_maps(working)[0], (131, 50)).numpy())


def test_photo_maps__squashes_or_slides():
    model = _segmenter()
    photo = scene((120, 75), np.random.default_rng(0))[0]
    squashed = torch.from_numpy(to_working(photo, (32, 48), model.config.resample))[None]
    assert torch.equal(model.photo_maps(photo, sliding=False), model.class_maps(squashed)[0])
    # 75 px are 10 patches of 8 px, the last of them stretched; 120 px are 15.
    assert model.photo_maps(photo, sliding=True).shape == (4, 10, 15)
    # At the model's own size, one window covers the whole photograph.
    same = photo.resize((48, 32))
    assert torch.equal(model.photo_maps(same, sliding=True), model.photo_maps(same, sliding=False))


@pytest.mark.parametrize(
    ("size", "grid"), [((24, 16), (4, 6)), ((12, 64), (32, 6)), ((480, 20), (4, 96)), ((1, 1), (6, 6))]
)
def test_photo_maps__enlarges_what_is_smaller_than_the_window_in_proportion(size, grid):
    assert _segmenter().photo_maps(Image.new("RGB", size), sliding=True).shape == (4, *grid)


def test_segment__more_classes_than_a_byte_holds():
    config = ModelConfig((16, 16), ("any",) * 300, 1, 3, "float32", "ab")
    assert _segmenter(config).segment([Image.new("RGB", (20, 20))])[0].dtype == np.uint16


def test_model_config__background_is_the_last_class_of_kind_none():
    assert CONFIG.background_id == 3
    assert ModelConfig((8, 8), ("any", "any"), 1, 1, "float32", "").background_id is None


@pytest.mark.parametrize("name", ["config.json", "encoder.safetensors", "decoder.safetensors"])
def test_load_model__refuses_a_folder_that_lacks_a_file(tmp_path, name):
    _, folder = _saved(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ArtifactError, match=rf"is no model folder: it has no {name}; give a finished run"):
        load_model(folder)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", '{"format": "transfgu-model-0"}', '{"format": "transfgu-model-1"}']
)
def test_load_model_config__refuses_another_format(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"config\.json is not of format transfgu-model-1"):
        load_model_config(Folder(str(tmp_path)))


def test_load_model__refuses_damaged_weights(tmp_path):
    _, folder = _saved(tmp_path)
    whole = (tmp_path / "decoder.safetensors").read_bytes()
    (tmp_path / "decoder.safetensors").write_bytes(whole[:-10])
    with pytest.raises(WeightsError, match=r"decoder\.safetensors is not a readable safetensors file"):
        load_model(folder)


def test_load_model__refuses_a_decoder_of_another_run(tmp_path):
    _, folder = _saved(tmp_path)
    text = (tmp_path / "config.json").read_text()
    values = json.loads(text)
    (tmp_path / "config.json").write_text(json.dumps(values | {"kinds": ["any", "any"]}))
    with pytest.raises(WeightsError, match=r"decoder\.safetensors does not fit the config\.json beside it"):
        load_model(folder)
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "decoder.safetensors").write_bytes(safetensors.torch.save({"x": torch.zeros(1)}))
    with pytest.raises(WeightsError, match="does not fit"):
        load_model(folder)
