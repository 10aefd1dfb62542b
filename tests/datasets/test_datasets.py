"""Label maps against the publications of their owners and the paper, written down here independently."""

import numpy as np
import pytest

from transfgu_ray.config.presets import get_preset
from transfgu_ray.datasets import DATASETS, VOID, named_dataset

# IIC's and PiCIE's coarse class of each of COCO-Stuff's 182 ids, in order.
_COARSE_27 = [
    9, *[11] * 8, *[8] * 6, *[7] * 10, *[6] * 8, *[10] * 10, *[5] * 8, *[2] * 10, *[3] * 10, *[0] * 6, *[1] * 6,
    *[4] * 8, 17, 17, 22, 20, 20, 22, 15, 25, 16, 13, 12, 12, 17, 17, 23, 15, 15, 17, 15, 21, 15, 25, *[13] * 5, 22,
    26, 14, 14, 15, 22, 21, 21, 24, 20, 22, 15, 17, 16, 15, 22, 24, 21, 17, 25, 16, 21, 17, 22, 16, 21, 21, 25, 21,
    26, 21, 24, 20, 17, 14, 21, 26, 15, 23, 20, 21, 24, 15, 24, 22, 25, 15, 20, 17, 17, 22, 14, *[18] * 7, 26, 26,
    19, 19, 24,
]  # fmt: skip
# Ids of things that COCO has never used.
_UNUSED = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
# LIP's 19 parts and the background, merged as in the supplement's Table 3.
_LIP_16 = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 14, 15, 15, 16, 16]
_LIP_5 = [0, 1, 1, 3, 1, 2, 2, 2, 5, 4, 2, 2, 2, 1, 3, 3, 4, 4, 5, 5]
LABELLED = [name for name, each in DATASETS.items() if each.class_names]


def _table(name):
    return DATASETS[name].label_table("fine")


def _name(dataset, label_id):
    return DATASETS[dataset].class_names[_table(dataset)[label_id]]


@pytest.mark.parametrize("name", LABELLED)
def test_benchmarks__every_class_has_its_kind_and_coarser_class(name):
    benchmark = DATASETS[name]
    assert len({*benchmark.class_names}) == len(benchmark.class_names) == len(benchmark.class_kinds)
    assert {*benchmark.class_kinds} <= {"thing", "stuff"}
    if benchmark.super_names:
        # Merged classes are of the same kind, or the coarser class would have none.
        kinds = benchmark.kinds("super")
        assert [kinds[super_id] for super_id in benchmark.super_of] == list(benchmark.class_kinds)
        assert {*benchmark.super_of} == {*range(len(benchmark.super_names))}


@pytest.mark.parametrize("name", LABELLED)
def test_label_table__onto_every_class_and_void_is_void(name):
    table = _table(name)
    assert {*table[table >= 0]} - {VOID} == {*range(len(DATASETS[name].class_names))}
    assert table[VOID] == VOID


@pytest.mark.parametrize(
    ("name", "classes", "things"),
    [
        ("coco_stuff27", 27, 12), ("coco_stuff27_curated", 27, 12), ("coco_stuff171", 171, 80), ("coco80", 81, 80),
        ("cityscapes27", 27, 10), ("voc", 21, 20), ("lip5", 6, 5), ("lip16", 17, 16), ("lip19", 20, 19),
    ],
)  # fmt: skip
def test_benchmarks__published_numbers_of_classes(name, classes, things):
    benchmark = DATASETS[name]
    assert (len(benchmark.class_names), benchmark.class_kinds.count("thing")) == (classes, things)


@pytest.mark.parametrize(
    ("name", "train", "val"),
    [
        ("coco_stuff27", 117_266, 4_952), ("coco_stuff27_curated", 49_629, 2_175), ("coco80", 117_266, 4_952),
        ("cityscapes27", 2_975, 500), ("voc", 1_464, 1_449), ("lip16", 30_462, 10_000),
    ],
)  # fmt: skip
def test_benchmarks__published_numbers_of_photographs(name, train, val):
    assert DATASETS[name].num_images == {"train": train, "val": val}


def test_coco_stuff27__merges_as_published():
    assert len(_COARSE_27) == 182
    assert _table("coco_stuff27")[:182].tolist() == _COARSE_27
    assert (_table("coco_stuff27")[182:VOID] == -1).all()
    names = DATASETS["coco_stuff27"].class_names
    assert [names[i] for i in (0, 9, 11, 12, 23, 26)] == ["electronic", "person", "vehicle", "ceiling", "sky", "water"]


def test_coco_stuff171__ids_in_order_without_the_unused():
    used = [i for i in range(182) if i not in _UNUSED]
    table = _table("coco_stuff171")
    assert table[used].tolist() == list(range(171))
    assert (table[[*_UNUSED]] == -1).all()


def test_coco80__stuff_is_background_and_unlabelled_is_void():
    table = _table("coco80")
    things = [i for i in range(91) if i not in _UNUSED]
    assert table[things].tolist() == list(range(1, 81))
    assert (table[91:182] == 0).all()
    assert table[VOID] == VOID


def test_coco__names_are_those_of_the_label_file(shared_data):
    lines = (shared_data / "coco2017_subset/annotations/labels.txt").read_text().splitlines()[1:]
    published = dict(line.split(": ") for line in lines)
    for label_id in range(182):
        if label_id not in _UNUSED:
            # The file counts from one.
            assert _name("coco_stuff171", label_id) == published[str(label_id + 1)]


def test_cityscapes27__void_ids_and_the_rest_in_order():
    table = _table("cityscapes27")
    assert (table[:7] == VOID).all()
    assert table[7:34].tolist() == list(range(27))
    assert [_name("cityscapes27", i) for i in (7, 11, 24, 26, 33)] == ["road", "building", "person", "car", "bicycle"]


def test_lip__merges_as_in_the_supplement():
    assert _table("lip19")[:20].tolist() == list(range(20))
    assert _table("lip16")[:20].tolist() == _LIP_16
    assert _table("lip5")[:20].tolist() == _LIP_5
    assert [_name("lip5", i) for i in (2, 5, 14, 9, 19)] == ["head", "upper body", "arm", "leg", "foot"]
    assert [_name("lip16", i) for i in (13, 15, 17, 18)] == ["face", "arm", "leg", "shoe"]


@pytest.mark.parametrize("name", LABELLED)
def test_settings__rounds_add_up_to_the_supplement(name):
    epochs = {"coco": 200, "voc": 100, "city": 50, "lip": 100}
    row = {"coco": (256, 1e-4), "voc": (512, 1e-4), "city": (256, 5e-5), "lip": (256, 2e-5)}
    for kind, total in epochs.items():
        if name.startswith(kind):
            paper, released = (DATASETS[name].settings[preset] for preset in ("paper", "released"))
            assert paper["train.num_epochs"] == released["train.num_epochs"] == total
            assert paper["train.round_epochs"] == released["train.round_epochs"]
            # Only VOC's last round does not end with the training.
            assert sum(paper["train.round_epochs"]) == (102 if kind == "voc" else total)
            assert (paper["train.batch_size"], paper["train.learning_rate"]) == row[kind]


def test_settings__voc_rounds_end_where_the_epoch_is_a_multiple():
    intervals = [5, 5, 5, 5, 4, 4, 4, 4, 4, 3]
    starts = [epoch for epoch in range(5, 103) if epoch % intervals[min(epoch // 10, 9)] == 0]
    assert list(DATASETS["voc"].settings["released"]["train.round_epochs"]) == np.diff([0, *starts]).tolist()
    # The round that begins with epoch 99 would have one epoch of three.
    voc = get_preset("released", "voc")
    assert (sum(voc.whole_rounds), voc.whole_rounds[-1]) == (99, 3)


def test_named_benchmark__merges_and_leaves_out():
    found = named_dataset(["0: background", "1: cat", "2: kitten | thing", "3: cat", "7: grass | stuff", "9: void"])
    assert found.class_names == ("background", "cat", "kitten", "grass")
    assert found.class_kinds == ("stuff", "thing", "thing", "stuff")
    table = found.label_table("fine")
    assert table[[0, 1, 2, 3, 7, 9, 255]].tolist() == [0, 1, 2, 1, 3, VOID, VOID]
    assert (table[[4, 5, 6, 8]] == -1).all()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["cat"], "'cat' must be `id: name`"),
        (["1: cat | animal"], "must be `id: name`"),
        (["1: cat", "1: dog"], "id 1 must occur once"),
        (["256: cat"], "id 256 must occur once and be below 255"),
        (["255: cat"], "id 255 must occur once and be below 255"),
        (["1: cat", "2: cat | stuff"], "cat is called both thing and stuff"),
    ],
)
def test_named_benchmark__refuses(lines, message):
    with pytest.raises(ValueError, match=message):
        named_dataset(lines)
