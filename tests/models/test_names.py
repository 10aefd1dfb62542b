"""Names of concepts: their effect on masks and counts, worked by hand, and what is refused."""

import numpy as np
import pytest

from transfgu_ray.algorithms.scores import intervals
from transfgu_ray.algorithms.scores.intervals import merge_concepts, photo_counts
from transfgu_ray.config.run import RunConfig, build_config
from transfgu_ray.errors import ConfigError
from transfgu_ray.models.names import FILE, Names, load_names, parse_names
from transfgu_ray.reports.score_tables import score_table
from transfgu_ray.reports.scores import STAGE_NAMES, metrics_json, photo_mious
from transfgu_ray.storage import Folder

FOUR = ("foreground",) * 4
WITH_BACKGROUND = (*FOUR, "none")


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 5)


def test_names__several_of_one_name_are_the_first_of_them():
    names = parse_names(b"1: sky\n3: sky\n2: tree\n", "names.yaml", FOUR)
    assert names.class_of.tolist() == [0, 1, 2, 1]
    assert (names.members(1), names.num_classes, names.background_id) == ([1, 3], 4, None)
    assert [names.label(c) for c in range(4)] == ["concept 0", "sky", "tree", "sky"]
    mask = names.apply(np.array([[0, 1], [2, 3]], dtype=np.uint8))
    assert (mask.dtype, mask.tolist()) == (np.uint8, [[0, 1], [2, 1]])


def test_names__hidden_concepts_become_the_models_background_or_one_class_more():
    names = parse_names(b"0: null\n2:\n", "names.yaml", WITH_BACKGROUND)
    assert names.class_of.tolist() == [4, 1, 4, 3, 4]
    assert (names.num_classes, names.background_id, names.label(4)) == (5, 4, "background")
    names = parse_names(b"0: null\n2:\n", "names.yaml", FOUR)
    assert names.class_of.tolist() == [4, 1, 4, 3]
    assert (names.num_classes, names.background_id, names.label(4)) == (5, 4, "background")


def test_names__what_has_the_backgrounds_name_becomes_background():
    names = parse_names(b"1: street\n4: street\n0: null", "names.yaml", WITH_BACKGROUND)
    assert names.class_of.tolist() == [4, 4, 2, 3, 4]
    assert names.label(4) == "street"


def test_names__beyond_256_classes_masks_have_16_bits():
    kinds = ("any",) * 256
    assert Names(kinds, {3: "sky"}).apply(np.array([3], np.uint8)).dtype == np.uint8
    hidden = Names(kinds, {3: None}).apply(np.array([3, 4], np.uint8))
    assert (hidden.dtype, hidden.tolist()) == (np.uint16, [256, 4])


def test_load_names__reads_what_was_written(tmp_path):
    folder = Folder(str(tmp_path))
    assert load_names(folder, FOUR).of_concept == {}
    folder.write_bytes(FILE, parse_names("2: été\n0: null\n".encode(), "names.yaml", FOUR).dump())
    assert load_names(folder, FOUR).of_concept == {0: None, 2: "été"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4: sky", r"4 is not a concept of this model; its ids are 0 to 3"),
        ("-1: sky", "-1 is not a concept"),
        ("true: sky", "True is not a concept"),
        ("sky: 1", "'sky' is not a concept"),
        ("1.0: sky", "1.0 is not a concept"),
        ("1: 2", r"the name of 1, 2, must be printable text of 1 to 60"),
        ("1: yes", "in quotes"),
        ('1: " "', "must be printable"),
        ('1: "a\\nb"', "must be printable"),
        ('1: "\\u202e"', "must be printable"),
        (f"1: {'x' * 61}", "1 to 60 characters"),
        ("1: [sky]", "must be printable"),
        ("[sky]", "must map concept ids to names"),
        ("sky", "must map concept ids to names"),
        ("1: sky\n1: tree", "has an id twice"),
        ("1: {", "is not YAML"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
        ("0:\n1:\n2:\n3:\n", "hides every concept"),
    ],
)
def test_parse_names__what_cannot_be_names_is_refused_in_one_sentence(text, message):
    with pytest.raises(ConfigError, match=message) as error:
        parse_names(text.encode(), "names.yaml", FOUR)
    assert "\n" not in str(error.value)


def test_parse_names__the_background_cannot_be_hidden():
    with pytest.raises(ConfigError, match="4 is already the background"):
        parse_names(b"4: null", "names.yaml", WITH_BACKGROUND)
    assert parse_names(b"{}", "names.yaml", FOUR).of_concept == {}
    assert parse_names(b"", "names.yaml", FOUR).of_concept == {}


def _counts(*photos):
    """Return counts of photographs, from a matrix (classes, concepts) each."""
    matrices = np.array(photos)
    photo, classes, concepts = matrices.nonzero()
    return photo_counts(
        photo, classes, concept_id=concepts, pixels=matrices[photo, classes, concepts], shape=matrices.shape
    )


def test_merge_concepts__columns_of_one_class_are_summed_in_each_photograph():
    counts = _counts([[1, 2, 4], [8, 0, 16]], [[0, 0, 32], [0, 64, 0]])
    merged = merge_concepts(counts, np.array([0, 3, 0]), 4).toarray().reshape(2, 2, 4)
    assert merged.tolist() == [[[5, 0, 0, 2], [24, 0, 0, 0]], [[32, 0, 0, 0], [0, 0, 0, 64]]]


def _metrics(matrix, names, *settings):
    """Return scores of a photograph of `scenes` that shows the first two of 16 classes, with four concepts."""
    config = build_config(
        RunConfig(), None, ["data.dataset=scenes", "data.region_mode=no_prior", "concepts.num_concepts=4", *settings]
    )
    whole = np.zeros((16, 4), dtype=np.int64)
    whole[:2] = matrix
    counts = dict.fromkeys((*STAGE_NAMES, "raw_colour"), _counts(whole))
    return metrics_json(config, "val", num_images=1, counts=counts, names=names, weights_sha256=""), photo_mious(
        config, counts["trained"], names
    )


# Concepts 0 and 1 cover class 0 (100 pixels), 2 covers class 1 (60 pixels), 3 a bit of both.
SPLIT = [[50, 40, 0, 10], [0, 0, 50, 10]]


def test_metrics_json__merged_concepts_are_matched_as_one():
    plain, _ = _metrics(SPLIT, Names(FOUR, {}), "evaluate.unmatched=count")
    # Class 0 has one of its two concepts; the other one and concept 3 are taken for two classes that are absent.
    assert plain["stages"]["bootstrapped"]["miou"] == pytest.approx((50 / 100 + 50 / 60 + 0 + 0) / 4)
    assert plain["concept_names"] is None
    merged, of_photo = _metrics(SPLIT, Names(FOUR, {0: "cat", 1: "cat", 2: "dog"}), "evaluate.unmatched=count")
    for stage in STAGE_NAMES:
        assert merged["stages"][stage]["miou"] == pytest.approx((90 / 100 + 50 / 60 + 0) / 3)
        assert merged["stages"][stage]["pixel_accuracy"] == pytest.approx(140 / 160)
    assert of_photo == pytest.approx([(90 / 100 + 50 / 60 + 0) / 3])
    assert [row["concepts"] for row in merged["per_class"][:2]] == [[0, 1], [2]]
    assert merged["concept_names"] == {"0": "cat", "1": "cat", "2": "dog"}
    # Clusters of baselines have no names; chance has the sizes of what is scored.
    for name in ("raw_colour", "majority"):
        assert merged["baselines"][name] == plain["baselines"][name]
    # The cat's 90 pixels of 160 take 90 * 100 / 160 pixels of class 0, the dog's 50 of class 1.
    assert merged["baselines"]["chance"]["pixel_accuracy"] == pytest.approx((90 * 100 + 50 * 60) / 160**2)
    assert merged["num_concepts"] == plain["num_concepts"] == 4
    assert score_table(merged)[0] == score_table(plain)[0]


@pytest.mark.parametrize(
    ("unmatched", "miou", "accuracy"),
    # The 20 pixels of the hidden concept are not scored, or are errors; many_to_one gives it no class either.
    [
        ("discard", (90 / 90 + 50 / 50) / 2, 1.0),
        ("count", (90 / 100 + 50 / 60) / 2, 140 / 160),
        ("many_to_one", (90 / 90 + 50 / 50) / 2, 1.0),
    ],
)
def test_metrics_json__hidden_concepts_are_matched_to_nothing(unmatched, miou, accuracy):
    names = Names(FOUR, {0: "cat", 1: "cat", 3: None})
    got, _ = _metrics(SPLIT, names, f"evaluate.unmatched={unmatched}")
    last = got["stages"]["bootstrapped"]
    assert last["miou"] == pytest.approx(miou)
    assert last["pixel_accuracy"] == pytest.approx(accuracy)
    assert last["coverage"] == pytest.approx(140 / 160)
    assert [row["concepts"] for row in got["per_class"][:2]] == [[0, 1], [2]]
    # A hidden concept is never matched, even where it would be the best match.
    alone, _ = _metrics([[100, 0, 0, 0], [0, 60, 0, 0]], Names(FOUR, {1: None}), f"evaluate.unmatched={unmatched}")
    assert alone["stages"]["bootstrapped"]["coverage"] == pytest.approx(100 / 160)
    assert alone["per_class"][1]["concepts"] == []
    # Nor does it take a class from another.
    other, _ = _metrics([[100, 0, 0, 0], [0, 60, 10, 0]], Names(FOUR, {1: None}), f"evaluate.unmatched={unmatched}")
    assert other["per_class"][1]["concepts"] == [2]
