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
    assert (config.extract_crop_size, config.train_crop_size) == (320, (160, 160))
    assert config.cam_image_size == config.train_image_size == config.inference_size == (320, 320)
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
    assert (voc.train.batch_size, voc.train.learning_rate, voc.train.num_epochs) == (512, 1e-4, 100)
    assert (voc.num_concepts, voc.region_mode, voc.extract.window_fracs) == (20, "things_only", (0.5, 0.4, 0.3, 0.2))
    assert (city.data.image_size, city.train_crop_size, city.num_concepts) == ((640, 1280), (160, 320), 27)
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


# The supplement's Training Details, and the published configuration files and commands, row by row: batch, rate,
# epochs, rounds, K of things and of stuff, sizes in px of windows' photographs, labels, training and scores, repeats.
_LONG = (*[3] * 10, *[2] * 85)
_SQUARE = ((640, 640), (320, 320), (320, 320), (320, 320))
_WIDE = ((640, 1280), (320, 640), (320, 640), (320, 640))
PUBLISHED = {
    "coco_stuff27": (256, 1e-4, 200, (2,) * 100, 12, 15, *_SQUARE, 1),
    "coco_stuff27_curated": (256, 2.2e-4, 200, (1,) * 200, 12, 15, *_SQUARE, 1),
    "coco_stuff171": (256, 1e-4, 200, _LONG, 80, 91, *_SQUARE, 1),
    "coco80": (256, 1e-4, 200, _LONG, 80, 0, *_SQUARE, 1),
    "cityscapes27": (256, 5e-5, 50, (1,) * 50, 27, 0, *_WIDE, 20),
    "voc": (512, 1e-4, 100, (*[5] * 8, *[4] * 12, 2, *[3] * 3), 20, 0, *_SQUARE, 20),
    "lip5": (512, 1e-4, 100, (2,) * 50, 5, 0, (1280, 640), (640, 320), (480, 240), (640, 320), 1),
    "lip16": (512, 2e-5, 100, (2,) * 50, 16, 0, (1280, 640), (640, 320), (480, 240), (640, 320), 1),
    "lip19": (256, 2e-5, 100, _LONG[:45], 19, 0, (1280, 640), (640, 320), (640, 320), (640, 320), 1),
}


@pytest.mark.parametrize("dataset", PUBLISHED)
def test_get_preset__released_is_complete_for_every_published_row(dataset):
    config = get_preset("released", dataset)
    train = config.train
    assert (
        train.batch_size,
        train.learning_rate,
        train.num_epochs,
        config.whole_rounds,
        config.num_concepts - config.num_background,
        config.num_background,
        config.data.image_size,
        config.cam_image_size,
        config.train_image_size,
        config.evaluate_image_size,
        train.epoch_repeats,
    ) == PUBLISHED[dataset]
    height, width = config.train_image_size
    assert config.train_crop_size == (height // 2, width // 2)
    # As in the names of their scripts: things_bootstrap_loss for Eq. 8, thingstuff_bootstrap_loss for the others.
    assert (train.uncertainty == "foreground") == (dataset[:3] in ("voc", "lip") or dataset == "coco80")
    assert config.cam.gradient_scale == (1 / 2 if dataset[:3] in ("cit", "lip") else 1 / 8)
    kmeans = ("mini_batch", 0, 3) if dataset[:3] in ("cit", "lip") else ("faiss", 1, 1)
    assert (config.concepts.algorithm, config.concepts.seed, config.concepts.num_redos) == kmeans
    resampled = "nearest" if dataset.startswith("coco") else "bilinear"
    assert {config.extract_resample, config.cam_resample} == {resampled}
    assert (config.evaluate.protocol, config.evaluate.unmatched) == ("transfgu", "discard")
    # The supplement has one row for all of COCO and one for all of LIP.
    supplement = {"coco": (256, 1e-4, 200), "voc": (512, 1e-4, 100), "city": (256, 5e-5, 50), "lip": (256, 2e-5, 100)}
    paper = get_preset("paper", dataset).train
    row = next(values for name, values in supplement.items() if dataset.startswith(name))
    assert (paper.batch_size, paper.learning_rate, paper.num_epochs) == row


# What the text decides otherwise than the published code does.
TEXT = {
    "extract.window_layout",
    "cam.gradient_scale",
    "cam.zeroed",
    "cam.keep_mass",
    "cam.exclusion",
    "train.round_0",
    "train.alpha_schedule",
    "train.diversity",
}
OF_DATASETS = {
    "voc": {"extract.window_fracs", "train.uncertainty"},
    "coco80": {"train.uncertainty"},
    "coco_stuff27_curated": {"train.learning_rate"},
    "lip5": {"train.uncertainty", "train.batch_size", "train.learning_rate"},
    "lip16": {"train.uncertainty", "train.batch_size"},
    "lip19": {"train.uncertainty"},
}


@pytest.mark.parametrize("dataset", ["folder", *PUBLISHED])
def test_compare__paper_and_released_differ_where_the_text_speaks(dataset):
    found = {name: text for name, _, _, text in compare("paper", "released", dataset)}
    assert found.keys() == TEXT | OF_DATASETS.get(dataset, set())
    for name, text in found.items():
        assert "released" in text, name
        assert any(source in text for source in ("paper", "suppl.", "Eq.", "4.2")), name


def test_configure__the_dataset_may_be_named_anywhere(tmp_path):
    (tmp_path / "voc.yaml").write_text("data: {dataset: voc}\ntrain: {batch_size: 8}\n")
    by_file = configure("paper", str(tmp_path / "voc.yaml"), [])
    assert (by_file.train.batch_size, by_file.train.num_epochs, by_file.num_concepts) == (8, 100, 20)
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
