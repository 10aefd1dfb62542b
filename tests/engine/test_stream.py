"""Errors that workers raise before their first unit, as the driver tells them."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.builders import TINY_OVERRIDES, TINY_VIT, make_folder, tiny_encoder
from tests.faults.storage import truncate
from transfgu_ray.algorithms.encoder.checkpoints import dump_encoder
from transfgu_ray.datasets.photographs import ImageRef
from transfgu_ray.engine.progress import Progress
from transfgu_ray.engine.session import Resources
from transfgu_ray.engine.stream import UnitWorker, stream_units
from transfgu_ray.errors import ArtifactError, TransfguError, WeightsError
from transfgu_ray.models.model import ModelConfig, build_decoder, save_decoder
from transfgu_ray.serving.predict import Predictor, Wanted
from transfgu_ray.storage import Folder

pytestmark = [pytest.mark.ray, pytest.mark.reports]


def run_worker(folder: Path, worker: type[UnitWorker], **arguments: Any) -> None:
    """Send one photograph through a worker."""
    photos = make_folder(folder / "photos", num_images=1)
    units = {0: [ImageRef("photo_000.jpg", None, -1)]}
    resources = Resources(2, 1, 1, "cpu", 1, None)
    done = stream_units(
        Folder(str(photos)), units, worker=worker, arguments=arguments, resources=resources, progress=Progress()
    )
    assert [result.unit for result in done] == [0]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = Folder(str(tmp_path / "model"))
    folder.write_bytes("encoder.safetensors", dump_encoder(tiny_encoder().vit, TINY_VIT, overrides=TINY_OVERRIDES))
    config = ModelConfig((64, 64), ("any", "any"), 1, 3, "float32", "ab")
    save_decoder(folder, build_decoder(config, 24).state_dict(), config=config)
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("file", "damage", "kind"),
    [
        ("decoder.safetensors", truncate, WeightsError),
        ("config.json", truncate, ArtifactError),
    ],
)
def test_stream_units__a_damaged_model_is_told_in_the_sentence_of_whoever_reads_it(
    local_ray: None,
    tmp_path: Path,
    model: Path,
    file: str,
    damage: Callable[[Path], Any],
    kind: type[TransfguError],
) -> None:
    arguments = {"model_uri": str(model), "out_uri": str(tmp_path / "out"), "records": ".units", "wanted": Wanted()}
    arguments["stems"] = {"photo_000.jpg": "photo_000"}
    damage(model / file)
    with pytest.raises(kind) as told:
        run_worker(tmp_path, Predictor, **arguments)
    assert "\n" not in str(told.value)
    assert str(model) in str(told.value)


class OnFullDisk(UnitWorker):
    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/scratch/file")


def test_stream_units__a_failing_storage_is_told_too(local_ray: None, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"^the storage cannot be written: .*No space left on device"):
        run_worker(tmp_path, OnFullDisk)
