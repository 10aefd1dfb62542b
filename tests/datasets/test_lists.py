"""Text files as people write them: with the marks and line ends of other systems, and names that hold blanks."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import listed, make_coco, make_lip, make_paired, make_voc
from transfgu_ray.config.presets import get_preset
from transfgu_ray.config.run import build_config
from transfgu_ray.config.sections import DataConfig
from transfgu_ray.datasets.check import Check
from transfgu_ray.datasets.listing import read_list
from transfgu_ray.datasets.paired import read_names
from transfgu_ray.errors import ConfigError
from transfgu_ray.models.names import parse_names
from transfgu_ray.storage import Folder
from transfgu_ray.studies.spaces import read_space

pytestmark = pytest.mark.reports

# What editors on Windows write, what old Macs wrote, and blanks around.
STYLES = {
    "BOM": lambda lines: b"\xef\xbb\xbf" + "\n".join(lines).encode(),
    "CRLF": lambda lines: "\r\n".join([*lines, ""]).encode(),
    "BOM, CRLF, blank lines": lambda lines: b"\xef\xbb\xbf" + "\r\n\r\n".join([*lines, "  "]).encode(),
    "CR": lambda lines: "\r".join(lines).encode(),
    "blanks around": lambda lines: "\n".join(f"  {line}\t " for line in lines).encode(),
}
style = pytest.mark.parametrize("written", STYLES.values(), ids=STYLES)


@style
def test_names_file__as_editors_write_it(tmp_path, written):
    lines = make_paired(tmp_path)
    (tmp_path / "names.txt").write_bytes(written(["# what the ids are", *lines]))
    assert read_names(str(tmp_path)) == lines
    assert not Check("paired", str(tmp_path), DataConfig()).run(lambda done: None).refused


def test_names_file__that_is_not_utf8_is_refused_with_what_to_do(tmp_path):
    make_paired(tmp_path)
    (tmp_path / "names.txt").write_bytes("0: background".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"names\.txt in data\.root=.* is not UTF-8; save it as UTF-8"):
        read_names(str(tmp_path))


def test_messages__of_a_section_name_what_is_wrong_alone():
    base = get_preset("tiny_cpu")
    for name, value, want in (
        ("data.names", '["cat"]', r"data: names\.txt: 'cat' must be `id: name`"),
        ("data.bands", "[3, 2]", r"data\.bands\.2=\[3, 2\]: field required"),
        ("data.bands", "red", r"data\.bands='red': must be a valid tuple"),
        ("data.bands", "[0, 1, 2]", r"data\.bands\.0=0: must be greater than or equal to 1"),
        ("data.min_side_px", str([*range(900)]), r"data\.min_side_px=\[0, 1, 2.*\.\.\.: must be a valid integer"),
        ("train.augment.crop", str({"a": "b" * 900}), r"train\.augment\.crop: must be "),
    ):
        with pytest.raises(ConfigError, match=want) as refused:
            build_config(base, None, ["data.dataset=paired", "data.names=['0: a']", f"{name}={value}"])
        assert len(str(refused.value)) < 250
        assert "image_size" not in str(refused.value)


@style
@pytest.mark.parametrize("blank", [" ", "  ", " - ", "\u3000"])
def test_lists__hold_one_name_a_line(tmp_path, written, blank):
    make_voc(tmp_path, num_train=2, num_val=1)
    ids = [f"my{blank}cat{i}" for i in range(2)]
    for i, name in enumerate(ids):
        (tmp_path / f"JPEGImages/2007_{i:06}.jpg").rename(tmp_path / f"JPEGImages/{name}.jpg")
    (tmp_path / "ImageSets/Segmentation/train.txt").write_bytes(written(ids))
    images = listed(DataConfig(dataset="voc", root=str(tmp_path)), "train").images
    assert [(image.image_id, image.num_bytes > 0) for image in images] == [
        (f"JPEGImages/{name}.jpg", True) for name in ids
    ]


@style
@pytest.mark.parametrize("dataset", ["lip5", "coco_stuff27_curated"])
def test_lists__of_other_datasets_are_read_alike(tmp_path, written, dataset):
    make, file = {
        "lip5": (make_lip, "train_id.txt"),
        "coco_stuff27_curated": (make_coco, "curated/train2017/Coco164kFull_Stuff_Coarse_7.txt"),
    }[dataset]
    make(tmp_path)
    if not (tmp_path / file).exists():
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("\n".join(path.stem for path in (tmp_path / "images/train2017").iterdir()))
    config = DataConfig(dataset=dataset, root=str(tmp_path))
    before = listed(config, "train").images
    (tmp_path / file).write_bytes(written((tmp_path / file).read_text().split()))
    assert listed(config, "train").images == before


_NAME = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1)


@given(st.lists(st.lists(_NAME, min_size=1, max_size=3).map(" ".join), max_size=5), st.sampled_from(["\n", "\r\n"]))
def test_read_list__gives_back_what_was_written(tmp_path_factory, names, end):
    folder = tmp_path_factory.mktemp("list")
    (folder / "list.txt").write_bytes(b"\xef\xbb\xbf" + end.join(names).encode())
    assert read_list(Folder(str(folder)), "list.txt") == {*names}


@style
def test_yaml__of_settings_spaces_and_names(tmp_path, written):
    if b"\t" in written([""]):
        pytest.skip("YAML forbids tabs there")
    base = get_preset("tiny_cpu")

    def file(*lines: str) -> Path:
        (tmp_path / "f.yaml").write_bytes(written(lines))
        return tmp_path / "f.yaml"

    assert build_config(base, str(file("train:", "  batch_size: 3", "seed: 5"))).train.batch_size == 3
    assert read_space(str(file("train.omega_1: [0.5, 2]", "train.omega_2: [1, 2]")), base)
    names = parse_names(file("0: sky", "1: sea").read_bytes(), "f.yaml", ("any", "any"))
    assert re.findall("s..", str(names.of_concept)) == ["sky", "sea"]
