import pytest

from transfgu_ray.config import RunConfig, parse_config
from transfgu_ray.errors import ConfigError
from transfgu_ray.presets import PRESETS, get_preset


@pytest.mark.parametrize("name", PRESETS)
def test_get_preset__is_valid_and_knows_its_name(name):
    config = get_preset(name)
    # Copies made with changes are not checked by themselves.
    assert parse_config(config.model_dump(mode="json")) == config
    assert config.preset == name


def test_get_preset__paper_has_the_numbers_of_the_paper():
    config = get_preset("paper")
    assert config.encoder.name == "vit_small_patch8_224.dino"
    assert config.extract.window_fracs == (0.5, 0.4, 0.3, 0.2)
    assert (config.extract.foreground_min_frac, config.extract.background_min_frac) == (0.5, 0.8)
    assert (config.cam.background_threshold, config.cam.exclusion, config.cam.gradient_scale) == (0.1, True, 1.0)
    assert (config.train.omega_1, config.train.omega_2, config.train.alpha) == (1.0, 0.3, (0.03, 0.1))
    assert (config.extract_crop_size, config.train_crop_size) == (320, (320, 320))
    assert config == RunConfig()


@pytest.mark.parametrize("name", ["tiny_cpu", "demo"])
def test_get_preset__small_recipes_need_no_download(name):
    config = get_preset(name)
    assert config.encoder.weights != "hub"
    assert config.extract_crop_size % config.encoder.overrides["patch_size"] == 0


def test_get_preset__refuses_an_unknown_name():
    with pytest.raises(ConfigError, match=r"unknown preset 'huge'; allowed: .*tiny_cpu"):
        get_preset("huge")
