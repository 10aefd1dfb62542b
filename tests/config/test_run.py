import pytest
import yaml

from transfgu_ray.config.base import difference, dump_yaml, flatten, parse_config
from transfgu_ray.config.presets import get_preset
from transfgu_ray.config.run import RunConfig, build_config
from transfgu_ray.errors import ConfigError
from transfgu_ray.pretraining.config import PretrainConfig
from transfgu_ray.pretraining.presets import get_pretrain_preset


def _set(*assignments):
    return build_config(RunConfig(), None, assignments)


def test_build_config__file_then_assignments_in_order(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("concepts: {num_concepts: 9}\ntrain:\n  omega_1: 0.5\n  omega_2: 0.1\n")
    config = build_config(RunConfig(), str(file), ["train.omega_1=2", "train.omega_1=3", "seed=4"])
    assert (config.concepts.num_concepts, config.train.omega_1, config.train.omega_2, config.seed) == (9, 3.0, 0.1, 4)
    # Other settings keep their values.
    assert config.train.learning_rate == RunConfig().train.learning_rate


def test_build_config__rates_as_people_write_them():
    # YAML 1.1 reads 1e-4 as a string, alone and in a list.
    config = _set("train.learning_rate=1e-4", "train.alpha=[3e-2, 1e-1]")
    assert config.train.learning_rate == 1e-4
    assert config.train.alpha == (0.03, 0.1)


def test_build_config__null_and_overrides():
    config = _set("extract.crop_size=64", "extract.crop_size=null", "encoder.overrides={depth: 2}")
    assert config.extract.crop_size is None
    assert _set("encoder.overrides.depth=3").encoder.overrides == {"depth": 3}
    assert config.encoder.overrides == {"depth": 2}


def test_dump_yaml__reads_back_equal(tmp_path):
    config = _set("train.round_epochs=[2,1]", "data.image_size=[128,256]", "encoder.overrides.depth=2", "seed=7")
    assert parse_config(yaml.safe_load(dump_yaml(config)), RunConfig) == config
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert build_config(RunConfig(), str(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.learning_rat=1", r"unknown setting train\.learning_rat .*did you mean train\.learning_rate\?"),
        ("trian.omega_1=1", r"unknown setting trian .*did you mean train\?"),
        ("concepts.zzz=1", r"unknown setting concepts\.zzz .*allowed here: num_concepts"),
        ("encoder.overrides.zzz=1", r"encoder\.overrides\.zzz.*must be 'embed_dim'"),
        ("concepts.num_concepts=0", r"concepts\.num_concepts=0: must be greater than or equal to 1"),
        ("concepts.num_concepts=2.5", r"concepts\.num_concepts=2\.5: must be a valid integer"),
        ("concepts.num_concepts=true", r"concepts\.num_concepts=True: must be a valid integer"),
        ("concepts.num_concepts='9'", r"concepts\.num_concepts='9': must be a valid integer"),
        ("data.image_size=[128,'128']", r"data\.image_size\.1='128': must be a valid integer"),
        ("data.image_size=128", r"data\.image_size=128: must be a valid tuple"),
        ("data.image_size=[128]", r"data\.image_size\.1.*field required"),
        ("extract.window_fracs=[0.5,1.5]", r"extract\.window_fracs\.1=1\.5: must be less than or equal to 1"),
        ("extract.window_fracs=[]", r"extract\.window_fracs=\[\].*at least 1 item"),
        ("train.learning_rate=.nan", r"train\.learning_rate=nan: must be a finite number"),
        ("train.augment=3", r"train\.augment in --set train\.augment=3 must hold settings of that section, such as"),
        ("train.dropout=1", r"train\.dropout=1: must be less than 1"),
        ("train=3", "train in --set train=3 must hold settings of that section, such as `image_size:`"),
        ("seed=-1", "seed=-1: must be greater than or equal to 0"),
        ("data.region_mode=everything", r"data\.region_mode='everything': must be 'things_and_stuff', 'things_only'"),
        ("evaluate.protocol=cause", r"evaluate\.protocol='cause': must be 'transfgu', 'picie' or 'stego'"),
        ("evaluate.unmatched=drop", r"evaluate\.unmatched='drop': must be 'discard', 'count' or 'many_to_one'"),
        ("evaluate.refinement=crf", r"evaluate\.refinement='crf': must be 'none' or 'pamr'"),
        ("data.dataset=imagenet", r"data\.dataset='imagenet': unknown dataset; allowed: folder, paired, .*, scenes"),
        ("train.omega_1", r"--set train\.omega_1 must look like section\.field=value"),
        ("train.omega_1=[", r"--set train\.omega_1=\[: the value is not valid YAML"),
    ],
)
def test_build_config__refuses_and_names_the_setting(assignment, message):
    with pytest.raises(ConfigError, match=message):
        _set(assignment)


def test_build_config__reports_every_problem_at_once():
    with pytest.raises(ConfigError, match=r"seed=-1.*train\.omega_1=-2"):
        _set("seed=-1", "train.omega_1=-2")


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["concepts.num_concepts=1", "data.region_mode=things_and_stuff"], "must be at least 2 .* is things_and_stuff"),
        (["concepts.num_concepts=1", "data.region_mode=no_prior"], "must be at least 2 .* is no_prior"),
        (
            ["concepts.num_background=27", "data.region_mode=things_and_stuff"],
            "num_background must be below concepts.num_concepts",
        ),
        (["concepts.num_background=3", "data.dataset=voc"], "no use when data.region_mode is things_only"),
        (
            ["concepts.num_concepts=null"],
            "takes K from the dataset's classes, but dataset folder has none; give a number",
        ),
        (["concepts.granularity=super"], "dataset folder has no super-categories; use fine"),
        (["concepts.granularity=super", "data.dataset=voc"], "dataset voc has no super-categories; use fine"),
        (
            ["concepts.max_points=11", "concepts.init_points=10"],
            r"max_points=11 must be at most .*init_points=10",
        ),
        (["cam.response=windows", "cam.keep_mass=0.5"], "keep_mass, .* no use when cam.response is windows"),
        (["cam.response=windows", "cam.zeroed=map"], "cam.zeroed have no use when cam.response is windows"),
        (["train.augment.crop_scale=[0.04,1]"], "crop_scale must begin at 0.1 or more when train.augment.crop is side"),
        (["train.num_epochs=2"], "num_epochs=2 must be at least the 3 epochs of round 0"),
        (
            ["concepts.photographs=all"],
            "needs a dataset whose training photographs are a selection, and folder is none",
        ),
        (
            ["concepts.algorithm=mini_batch", "concepts.max_points=9"],
            "max_points must be null when concepts.algorithm is mini_batch",
        ),
        (
            ["concepts.method=hierarchical", "concepts.algorithm=mini_batch"],
            "method=hierarchical needs concepts.algorithm=faiss, not mini_batch, which has no levels",
        ),
        (
            ["concepts.method=hierarchical", "concepts.max_points=9"],
            "max_points must be null when concepts.method is hierarchical",
        ),
        (["concepts.num_resamples=3"], "num_resamples has no use when concepts.method is flat; set it to 10"),
        (
            ["cam.response=windows", "cam.gradient_scale=0.125"],
            "gradient_scale, .* no use when cam.response is windows",
        ),
        (
            ["evaluate.baselines=[iic,mask_contrast]"],
            "mask_contrast clusters foreground masks, but there are none when data.region_mode is no_prior",
        ),
        (
            ["evaluate.baselines=[mask_contrast]", "data.region_mode=all_foreground"],
            "there are none when data.region_mode is all_foreground; leave it out",
        ),
        (["train.augment.crop_scale=[0.9,0.4]"], r"crop_scale must be \(low, high\) with 0 < low <= high"),
        (["train.augment.crop_scale=[0,1]"], r"crop_scale must be \(low, high\)"),
        (["train.uncertainty=foreground"], r"needs the background class of Eq\. 8 .* things_only or all_foreground"),
        (
            ["train.uncertainty=foreground", "data.dataset=voc", "concepts.num_concepts=1"],
            "and at least 2 concepts; use all",
        ),
        (["train.backbone=resnet50_fpn"], "backbone_weights=null does not go with .* needs 'random' or the path"),
        (["train.backbone_weights=random"], "backbone_weights=random does not go with .* prior must have null"),
        (
            ["train.backbone=resnet50_fpn", "train.backbone_weights=random", "train.token_window=16"],
            "token_window has no use when train.backbone is resnet50_fpn",
        ),
        (
            ["train.decoder_weights=voc_decoder.pt", "train.decoder=classifier"],
            "train.decoder_weights holds a segmenter that reads the prior",
        ),
        (
            ["train.decoder_weights=voc_decoder.pt", "train.token_window=16"],
            "token_window must be null when train.decoder_weights is set",
        ),
        (["train.features=cached"], "jitter_prob, grey_prob and blur_prob must be 0 when train.features is cached"),
        (
            ["train.features=cached", "train.augment={jitter_prob: 0, grey_prob: 0, blur_prob: 0.1}"],
            "blur_prob must be 0 when train.features is cached",
        ),
        (
            ["evaluate.protocol=stego", "evaluate.image_size=[320, 640]"],
            r"image_size=\[320, 640\] must be square when evaluate.protocol is stego.*published size is \[320, 320\]",
        ),
    ],
)
def test_build_config__refuses_settings_that_contradict(assignments, message):
    with pytest.raises(ConfigError, match=message):
        _set(*assignments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"train: [", "is not valid YAML"),
        (b"\xff\xfe\x00bad", "is not valid YAML"),
        (b"- 1\n- 2\n", "must hold sections such as `train:`, not a list"),
        (b"!!python/object/apply:os.getcwd []", "is not valid YAML"),
        (b"train: {omega_3: 1}", r"unknown setting train\.omega_3 in .*mine\.yaml"),
    ],
)
def test_build_config__refuses_a_malformed_file(tmp_path, content, message):
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        build_config(RunConfig(), str(tmp_path / "mine.yaml"))


def test_build_config__refuses_a_missing_file_and_accepts_an_empty_one(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the configuration file .*gone\.yaml.*check --config"):
        build_config(RunConfig(), str(tmp_path / "gone.yaml"))
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert build_config(RunConfig(), str(tmp_path / "empty.yaml")) == RunConfig()


def test_run_config__sizes_that_follow_the_working_size():
    config = _set("data.image_size=[320,640]")
    assert config.extract_crop_size == 160
    # The published code labels, trains and scores at half the size that it cuts windows at.
    assert config.cam_image_size == config.train_image_size == config.evaluate_image_size == (160, 320)
    assert config.train_crop_size == (80, 160)
    config = _set("train.image_size=[64,96]", "cam.image_size=[480,480]", "extract.crop_size=224")
    assert (config.train_crop_size, config.evaluate_image_size) == ((32, 48), (64, 96))
    assert config.cam_image_size == (480, 480)
    assert config.extract_crop_size == 224
    for protocol in ("picie", "stego"):
        config = _set("data.image_size=[320,640]", f"evaluate.protocol={protocol}")
        assert config.evaluate_image_size == (320, 320)
        assert _set(f"evaluate.protocol={protocol}", "evaluate.image_size=[96,96]").evaluate_image_size == (96, 96)


@pytest.mark.parametrize(
    ("num_epochs", "want"), [(None, (3, 2, 2)), (7, (3, 2, 2)), (6, (3, 2)), (5, (3, 2)), (4, (3,)), (99, (3, 2, 2))]
)
def test_run_config__only_rounds_that_fit_whole_are_trained(num_epochs, want):
    settings = ["train.round_epochs=[3,2,2]"] + ([f"train.num_epochs={num_epochs}"] if num_epochs else [])
    assert _set(*settings).whole_rounds == want


def test_run_config__background_concepts_of_each_region_mode():
    apart = "data.region_mode=things_and_stuff"
    assert _set("concepts.num_concepts=27", apart).num_background == 13
    assert _set("concepts.num_background=5", apart).num_background == 5
    assert _set("concepts.num_concepts=27").region_mode == "no_prior"
    assert _set("data.dataset=voc").region_mode == "things_only"
    assert _set("data.dataset=voc").num_background == 0
    assert _set("data.dataset=voc", "data.region_mode=no_prior").region_mode == "no_prior"


@pytest.mark.parametrize(
    ("assignments", "num_concepts", "num_background"),
    [
        ((), 16, 4),
        (("concepts.granularity=super",), 6, 2),
        (("concepts.num_background=5",), 16, 5),
        (("concepts.num_concepts=9",), 9, 4),
        (("data.region_mode=no_prior",), 16, 0),
        # The background comes from Eq. 8 and does not count towards K.
        (("data.region_mode=things_only",), 12, 0),
        (("data.dataset=voc",), 20, 0),
        (("data.dataset=voc", "data.region_mode=things_and_stuff"), 21, 1),
    ],
)
def test_run_config__concepts_follow_the_classes(assignments, num_concepts, num_background):
    config = _set("data.dataset=scenes", "concepts.num_concepts=null", *assignments)
    assert (config.num_concepts, config.num_background) == (num_concepts, num_background)


def test_run_config__classes_follow_the_granularity():
    fine, coarse = (_set("data.dataset=scenes", f"concepts.granularity={name}") for name in ("fine", "super"))
    assert (len(fine.class_names), fine.class_kinds.count("thing")) == (16, 12)
    assert (len(coarse.class_names), coarse.class_kinds.count("thing")) == (6, 4)
    assert (fine.region_mode, fine.num_concepts) == ("things_and_stuff", 27)


def test_difference__names_what_changed():
    old, new = RunConfig().model_dump(mode="json"), _set("train.omega_1=2").model_dump(mode="json")
    assert difference(old, new) == ["train.omega_1: 1.0 -> 2.0"]
    assert difference(old, old) == []
    assert difference({"a": {"b": 1}}, {"a": {"c": 2}}) == ["a.b: 1 -> None", "a.c: None -> 2"]


def test_flatten__dotted_names():
    assert flatten({"a": {"b": {"c": 1}, "d": {}}, "e": [1]}) == {"a.b.c": 1, "a.d": {}, "e": [1]}


@pytest.mark.reports
@pytest.mark.parametrize("kind", [RunConfig, PretrainConfig])
@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan", "1e400"])
def test_build_config__no_setting_takes_a_number_that_is_not_finite(kind, number):
    for name, value in flatten(kind().model_dump(mode="json")).items():
        for text in (number, *([f"[{number}, {value[1]}]"] if isinstance(value, list) and len(value) == 2 else [])):
            with pytest.raises(ConfigError, match=rf"^{name}"):
                build_config(kind(), None, [f"{name}={text}"])


@pytest.mark.reports
def test_build_config__a_mapping_is_replaced_as_a_whole_and_its_entries_one_by_one(tmp_path):
    base = get_preset("tiny_cpu")
    had = base.encoder.overrides
    assert had

    def overrides(*assignments, file=None):
        return build_config(base, file, assignments).encoder.overrides

    assert overrides("encoder.overrides={}") == {}
    assert overrides("encoder.overrides={depth: 2}") == {"depth": 2}
    assert overrides("encoder.overrides.depth=2") == {**had, "depth": 2}
    assert overrides("encoder.overrides={}", "encoder.overrides.depth=2") == {"depth": 2}
    file = tmp_path / "mine.yaml"
    file.write_text("encoder: {overrides: {}}\n")
    assert overrides(file=str(file)) == {}
    assert overrides("encoder.overrides.depth=2", file=str(file)) == {"depth": 2}
    pretraining = get_pretrain_preset("small_photos")
    assert pretraining.encoder.overrides
    assert build_config(pretraining, None, ["encoder.overrides={}"]).encoder.overrides == {}
