import pytest

from transfgu_ray.config.base import parse_config
from transfgu_ray.config.presets import PRESETS, compare, configure, get_preset
from transfgu_ray.config.run import RunConfig
from transfgu_ray.errors import ConfigError


@pytest.mark.parametrize("name", PRESETS)
def test_get_preset__is_valid_and_knows_its_name(name):
    config = get_preset(name)
    # pydantic does not check copies made with changes.
    assert parse_config(config.model_dump(mode="json"), RunConfig) == config
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


def test_get_preset__the_supplement_for_a_dataset():
    voc, city = get_preset("paper", "voc"), get_preset("paper", "cityscapes27")
    assert (voc.train.batch_size, voc.train.learning_rate, sum(voc.train.round_epochs)) == (512, 1e-4, 100)
    assert (voc.num_concepts, voc.region_mode, voc.extract.window_fracs) == (20, "things_only", (0.5, 0.4, 0.3, 0.2))
    assert (city.data.image_size, city.train_crop_size, city.num_concepts) == ((640, 1280), (320, 640), 27)
    assert get_preset("paper", "coco_stuff27").num_background == 15


def test_get_preset__released_as_the_published_code():
    lip, voc = get_preset("released", "lip16"), get_preset("released", "voc")
    assert (lip.train.batch_size, lip.train_crop_size, lip.inference_size) == (512, (240, 120), (640, 320))
    assert (voc.train.epoch_repeats, voc.extract.window_fracs) == (20, (0.6, 0.5, 0.4, 0.3))
    assert (voc.cam.gradient_scale, voc.cam.keep_mass, voc.cam.exclusion) == (1 / 8, 0.8, False)
    assert (voc.train.alpha_schedule, voc.train.diversity) == ("restart", "upper_triangle")
    # The published code restricts the loss to the foreground only where Eq. 8 gives a background.
    for name, which in (
        ("voc", "foreground"),
        ("coco80", "foreground"),
        ("lip5", "foreground"),
        ("coco_stuff27", "all"),
    ):
        assert get_preset("released", name).train.uncertainty == which


def test_configure__the_dataset_may_be_named_anywhere(tmp_path):
    (tmp_path / "voc.yaml").write_text("data: {dataset: voc}\ntrain: {batch_size: 8}\n")
    by_file = configure("paper", str(tmp_path / "voc.yaml"), [])
    assert (by_file.train.batch_size, sum(by_file.train.round_epochs), by_file.num_concepts) == (8, 100, 20)
    assert configure("paper", None, ["data.dataset=voc", "train.batch_size=8"]) == by_file
    assert configure("tiny_cpu", None, ["data.dataset=voc"]).concepts.num_concepts == 8


def test_compare__names_values_and_sources():
    found = {name: (first, second, text) for name, first, second, text in compare("paper", "released", "voc")}
    assert found["extract.window_fracs"][:2] == ([0.5, 0.4, 0.3, 0.2], [0.6, 0.5, 0.4, 0.3])
    assert "released" in found["cam.exclusion"][2]
    assert "preset" not in found
    assert not compare("released", "released", "voc")
    assert dict([row[:2] for row in compare("demo", "paper", "voc")])["encoder.overrides.depth"] == 2
    with pytest.raises(ConfigError, match="unknown dataset 'x'"):
        compare("paper", "released", "x")
