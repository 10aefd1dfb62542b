"""Working copies are read back unchanged in any order, and the seed decides which are held out."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from transfgu_ray.engine.parts import PartStats
from transfgu_ray.engine.progress import Progress
from transfgu_ray.engine.session import Resources
from transfgu_ray.pretraining.config import PretrainDataConfig
from transfgu_ray.pretraining.copies import COPIES, INDEX, NO_LABEL, build_index, open_copies, pack, read_copies
from transfgu_ray.pretraining.copying import Copying, copy_images
from transfgu_ray.pretraining.sources import Source, Unit
from transfgu_ray.runs.tables import to_parquet
from transfgu_ray.storage import Folder


def squares(num: int, side: int = 5) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (num, 3, side, side), dtype=np.uint8))


def written(folder: Folder, splits: str, labels: list[str | None]) -> Folder:
    kinds = {"t": "train", "v": "val"}
    rows = [
        {"image_id": f"{i}.jpg", "split": kinds[split], "label": label, "file": f"images/{i % 2}.arrow", "row": i // 2}
        for i, (split, label) in enumerate(zip(splits, labels, strict=True))
    ]
    folder.write_bytes(INDEX, to_parquet(build_index(rows), {}))
    return folder


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_read_copies__any_order_of_any_files(tmp_path, scheme):
    folder, pixels = Folder(f"{scheme}{tmp_path}"), squares(7)
    folder.write_bytes("images/0.arrow", pack(pixels[:4]))
    folder.write_bytes("images/1.arrow", pack(pixels[4:]))
    places = pa.table({"file": ["images/1.arrow", "images/0.arrow", "images/1.arrow"], "row": [2, 3, 0]})
    got = read_copies(folder, places)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, np.stack([pixels[6], pixels[3], pixels[4]]))


def test_pack__any_arrow_reader_opens_it():
    pixels = squares(3)
    table = pa.ipc.open_file(pack(pixels)).read_all()
    np.testing.assert_array_equal(table["pixels"].combine_chunks().to_numpy_ndarray(), np.stack(pixels))


def test_open_copies__classes_are_numbered_in_order_of_name(tmp_path):
    copies = open_copies(written(Folder(str(tmp_path)), "ttvt", ["dog", None, "cat", "eel"]), seed=0, num_val=1)
    assert copies.classes.tolist() == [1, NO_LABEL, 0, 2]
    assert (copies.train.tolist(), copies.val.tolist()) == ([0, 1, 3], [2])
    assert copies.places(np.array([3, 0])).to_pydict() == {"file": ["images/1.arrow", "images/0.arrow"], "row": [1, 0]}


@pytest.mark.parametrize(("num_images", "num_val", "held_out"), [(40, 1000, 4), (40, 3, 3), (5, 1000, 1)])
def test_open_copies__holds_out_at_most_a_tenth(tmp_path, num_images, num_val, held_out):
    folder = written(Folder(str(tmp_path)), "t" * num_images, [None] * num_images)
    copies = open_copies(folder, seed=4, num_val=num_val)
    assert len(copies.val) == held_out
    assert sorted([*copies.train, *copies.val]) == list(range(num_images))
    np.testing.assert_array_equal(open_copies(folder, 4, num_val).val, copies.val)


def test_open_copies__another_seed_holds_out_others(tmp_path):
    folder = written(Folder(str(tmp_path)), "t" * 100, [None] * 100)
    assert open_copies(folder, 0, 10).val.tolist() != open_copies(folder, 1, 10).val.tolist()


@pytest.mark.usefixtures("failing_disk")
def test_copies__outlast_a_disk_that_fails_for_a_moment(tmp_path):
    folder, pixels = Folder(str(tmp_path)), squares(2)
    written(folder, "tt", [None, None])
    for i in range(2):
        folder.write_bytes(f"images/{i}.arrow", pack([pixels[i]]))
    places = open_copies(folder, seed=0, num_val=1).places(np.array([1, 0]))
    np.testing.assert_array_equal(read_copies(folder, places), np.stack([pixels[1], pixels[0]]))


@pytest.mark.usefixtures("failing_disk")
def test_copy_images__the_index_outlasts_a_disk_that_fails_for_a_moment(tmp_path):
    folder = written(Folder(str(tmp_path)), "tt", [None, None])
    copying = Copying(str(tmp_path), PretrainDataConfig(), "now")
    copying.write_index(f"{COPIES}/unit-000000.parquet", folder.read(INDEX, pq.read_table), PartStats(images=2))
    folder.delete(INDEX)
    sources = [Source(folder, (Unit("train", 2),), "f", 0)]
    found = copy_images(copying, sources, resources=Resources(1, 1, 1, "cpu", 1, None), progress=Progress())
    assert found.images == len(open_copies(folder, seed=0, num_val=1).index) == 2
