import re
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.builders import make_coco, make_folder, make_paired
from transfgu_ray.config.sections import DataConfig
from transfgu_ray.datasets.check import Check
from transfgu_ray.errors import ConfigError, DataError


def _run(name, path):
    done = []
    found = Check(name, str(path), DataConfig()).run(done.append)
    return found, {(each.split, each.what): each.found for each in found.facts}, sum(done)


def test_check__says_what_a_good_copy_holds(tmp_path):
    found, facts, done = _run("coco_stuff171", make_coco(tmp_path, num_train=2, num_val=3))
    assert not found.refused
    assert done == 5
    assert facts["train", "photographs"] == "2, not the published 117266: scores cannot be compared"
    assert facts["val", "width x height"] == "96 x 72 to 96 x 72 px"
    assert facts["val", "classes"].startswith("4 of 171; not seen: person, bicycle, ")
    labels = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "annotations/val2017").glob("*.png"))]
    assert facts["val", "void"] == f"{100 * np.mean([label == 255 for label in labels]):.1f} % of the pixels"
    # The labels of the training split are never scored, so they are not read.
    assert ("train", "classes") not in facts


def test_check__a_folder_has_neither_splits_nor_labels(tmp_path):
    _, facts, _ = _run("folder", make_folder(tmp_path, num_images=2))
    assert facts == {("all", "photographs"): "2", ("all", "width x height"): "96 x 72 to 96 x 72 px"}


def test_check__names_what_is_not_listed(tmp_path):
    data = make_folder(tmp_path / 'in "quotes"', num_images=2)
    (data / "twice.jpg").symlink_to(data / "photo_000.jpg")
    found, _, _ = _run("folder", data)
    assert found.refused == [{"image_id": "twice.jpg", "reason": "link within the folder"}]


@pytest.mark.reports
def test_check__tells_what_is_passed_over(tmp_path):
    data = make_folder(tmp_path, num_images=2)
    (data / ".thumbnails").mkdir()
    shutil.copy(data / "photo_000.jpg", data / ".thumbnails")
    (data / "IMG_1.gif").write_bytes(b"GIF89a")
    _, facts, _ = _run("folder", data)
    words = facts["all", "passed over"]
    assert words == "1 .gif (save them as JPEG or PNG), 1 hidden, or in a hidden or system folder"


def test_check__reads_the_names_of_a_paired_set(tmp_path):
    make_paired(tmp_path)
    _, facts, _ = _run("paired", tmp_path)
    assert facts["val", "classes"] == "3 of 3"


def test_check__names_every_file_that_is_wrong(tmp_path):
    make_coco(tmp_path, num_val=5)
    labels = tmp_path / "annotations/val2017"
    (labels / f"{3:012}.png").unlink()
    Image.new("L", (10, 72)).save(labels / f"{4:012}.png")
    Image.new("L", (96, 72), 90).save(labels / f"{5:012}.png")
    (tmp_path / f"images/val2017/{6:012}.jpg").write_text("x")
    shutil.rmtree(tmp_path / "images/train2017")
    found, facts, _ = _run("coco80", tmp_path)
    reasons = {refusal["image_id"].removesuffix(".jpg")[-1]: refusal["reason"] for refusal in found.refused}
    assert re.match(r"its label cannot be read: .* \(annotations/val2017/0+3\.png\)", reasons["3"])
    assert reasons["4"] == "its label is of another size: 10 x 72 px, the upright photograph 96 x 72 px"
    assert reasons["5"].startswith("its label holds an unknown id: 90; known are 0 to 10, 12 to 24, 26 to 27, ")
    assert reasons["6"] == "not an image"
    assert reasons["0"].startswith("cannot be read")
    assert len(found.refused) == 4 + 3
    assert facts["val", "width x height"] == "96 x 72 to 96 x 72 px"


def test_check__refuses_what_it_cannot_list(tmp_path):
    with pytest.raises(ConfigError, match="unknown dataset 'imagenet'; allowed: folder, paired"):
        Check("imagenet", str(tmp_path), DataConfig())
    with pytest.raises(ConfigError, match=r"dataset paired needs a readable names\.txt in data\.root="):
        Check("paired", str(tmp_path), DataConfig())
    with pytest.raises(DataError, match="has no readable ImageSets"):
        Check("voc", str(tmp_path), DataConfig())
