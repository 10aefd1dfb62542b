"""No stage but `evaluate` reads a label: whatever lies where labels belong, a run learns the same to the last bit.

The documented exception is extract.windows=ground_truth, the upper bound of the paper's supplement.
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.builders import make_voc
from tests.fixtures import make_run
from transfgu_ray.models.model import load_model
from transfgu_ray.storage import Folder

LABELS = "SegmentationClass"


def shuffle(labels: Path) -> None:
    """Give each photograph the label of the next one."""
    files = sorted(labels.iterdir())
    for file, other in zip(files, [path.read_bytes() for path in [*files[1:], files[0]]], strict=True):
        file.write_bytes(other)


def corrupt(labels: Path) -> None:
    for file in labels.iterdir():
        file.write_bytes(b"\x00\xffno label" * 100)


def learned(folder: Path, data: Path) -> dict[str, str]:
    """Digests of all that a run up to `train` leaves for others to use, and of its masks of the photographs."""
    run = make_run(folder, data, stages=("extract", "concepts", "labels", "train"), dataset="voc")
    found = {"concepts.parquet", *(f"labels/{path.name}" for path in (folder / "labels").glob("part-*"))}
    found |= {f"model/{path.name}" for path in (folder / "model").glob("*.safetensors")}
    made = {name: run.folder.read_bytes(name) for name in found}
    photos = [Image.open(path).convert("RGB") for path in sorted((data / "JPEGImages").iterdir())]
    masks = load_model(Folder(run.folder.uri_of("model"))).segment(photos)
    made |= {f"mask {i}": mask.tobytes() for i, mask in enumerate(masks)}
    return {name: hashlib.sha256(content).hexdigest() for name, content in sorted(made.items())}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_voc(tmp_path_factory.mktemp("data") / "voc", num_train=4, num_val=2)


@pytest.fixture(scope="module")
def with_labels(data: Path, tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> dict[str, str]:
    return learned(tmp_path_factory.mktemp("with_labels") / "run", data)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("spoil", [shuffle, corrupt, shutil.rmtree])
def test_run__learns_the_same_whatever_the_labels(
    data: Path, with_labels: dict[str, str], tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    assert {"concepts.parquet", "labels/part-000000.parquet", "model/decoder.safetensors", "mask 5"} <= {*with_labels}
    # In the same place, since tables name the folder of the photographs.
    labels, kept = data / LABELS, tmp_path / "kept"
    shutil.copytree(labels, kept)
    spoil(labels)
    try:
        assert learned(tmp_path / "run", data) == with_labels
    finally:
        shutil.copytree(kept, labels, dirs_exist_ok=True)
