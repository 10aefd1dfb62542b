from dataclasses import fields

import pytest

from transfgu_ray.algorithms.dino.multicrop import MultiCrop
from transfgu_ray.algorithms.dino.schedules import DinoRecipe
from transfgu_ray.config.base import dump_yaml, parse_config
from transfgu_ray.config.presets import PRESETS
from transfgu_ray.config.run import build_config
from transfgu_ray.errors import ConfigError
from transfgu_ray.pretraining.config import CropsConfig, DinoConfig, PretrainConfig
from transfgu_ray.pretraining.presets import PRETRAIN_PRESETS, get_pretrain_preset


def _set(*assignments):
    return build_config(PretrainConfig(), None, assignments)


@pytest.mark.parametrize("name", PRETRAIN_PRESETS)
def test_get_pretrain_preset__is_valid_and_knows_its_name(name):
    config = get_pretrain_preset(name)
    assert parse_config(config.model_dump(mode="json"), PretrainConfig) == config
    assert config.preset == name
    assert name not in PRESETS, "`transfgu presets NAME` would show the other preset"


def test_get_pretrain_preset__refuses_an_unknown_name():
    with pytest.raises(ConfigError, match=r"unknown pretraining preset 'huge'; allowed: photos, small_photos"):
        get_pretrain_preset("huge")


@pytest.mark.parametrize(("section", "recipe"), [(CropsConfig, MultiCrop), (DinoConfig, DinoRecipe)])
def test_pretrain_config__sections_are_what_the_algorithms_take(section, recipe):
    assert list(section.model_fields) == [field.name for field in fields(recipe)]
    recipe(**section().model_dump())


def test_pretrain_config__every_field_says_what_it_is():
    for section in PretrainConfig.model_fields.values():
        described = getattr(section.annotation, "model_fields", {"": section})
        assert all(field.description for field in described.values()), section


def test_build_config__changes_and_reads_back(tmp_path):
    config = _set("dino.learning_rate=[1e-3, 0]", "encoder.overrides.depth=2", "schedule.checkpoint_steps=5")
    assert (config.dino.learning_rate, config.encoder.overrides) == ((0.001, 0.0), {"depth": 2})
    (tmp_path / "c.yaml").write_text(dump_yaml(config))
    assert build_config(PretrainConfig(), str(tmp_path / "c.yaml")) == config


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("dino.teacher_temp=1", r"unknown setting dino\.teacher_temp .*did you mean dino\.teacher_temperature"),
        ("dino.teacher_temperature=0.04", r"dino\.teacher_temperature=0\.04: must be a valid tuple"),
        ("dino.teacher_temperature=[0, 1]", r"dino\.teacher_temperature\.0=0.*greater than 0"),
        ("dino.teacher_momentum=[0.9, 1.1]", r"dino\.teacher_momentum\.1=1\.1: must be less than or equal to 1"),
        ("dino.mask_ratio=[0.5, 0.1]", r"dino\.mask_ratio must be \[low, high\] with low <= high"),
        ("crops.local_scale=[0.4, 0.1]", r"crops\.local_scale must be \[low, high\]"),
        ("crops.hue=0.6", r"crops\.hue=0\.6: must be less than or equal to 0\.5"),
        ("crops.global_scale=[0, 1]", r"crops\.global_scale\.0=0.*greater than 0"),
        ("schedule.epochs=0", r"schedule\.epochs=0: must be greater than or equal to 1"),
        ("encoder.overrides.width=3", r"encoder\.overrides\.width.*must be 'embed_dim'"),
    ],
)
def test_build_config__refuses_and_names_the_setting(assignment, message):
    with pytest.raises(ConfigError, match=message):
        _set(assignment)
