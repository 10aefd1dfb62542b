"""Masks of one model alone lie beside a legend."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.builders import TINY_OVERRIDES, TINY_VIT, make_folder, tiny_encoder
from transfgu_ray.algorithms.encoder.checkpoints import dump_encoder
from transfgu_ray.datasets.photographs import ImageRef
from transfgu_ray.engine.progress import Progress
from transfgu_ray.engine.session import Resources
from transfgu_ray.engine.stream import Photo, UnitResult
from transfgu_ray.models.model import ModelConfig, build_decoder, save_decoder
from transfgu_ray.serving import predict as prediction
from transfgu_ray.serving.outputs import OUTPUTS, claim
from transfgu_ray.serving.photographs import find_photographs
from transfgu_ray.storage import Folder

pytestmark = pytest.mark.reports


def small_model(folder: Path, num_classes: int) -> Folder:
    model = Folder(str(folder))
    model.write_bytes("encoder.safetensors", dump_encoder(tiny_encoder().vit, TINY_VIT, overrides=TINY_OVERRIDES))
    config = ModelConfig((64, 64), ("any",) * num_classes, 1, 3, "float32", "ab")
    save_decoder(model, build_decoder(config, 24).state_dict(), config=config)
    return model


def in_this_process(
    root: Folder, units: Mapping[int, Sequence[ImageRef]], *, worker: Any, arguments: Mapping[str, Any], **_: Any
) -> Iterator[UnitResult]:
    """What `stream_units` yields, without Ray."""
    made = worker(device="cpu", threads=1, **arguments)
    for unit, images in units.items():
        photos = [Photo(image.image_id, root.read_bytes(image.image_id), None, None) for image in images]
        yield UnitResult(unit, made.process(unit, photos), 0)


def run_predict(model: Folder, images: Path, out: Path, **wanted: bool) -> dict[str, Any]:
    root, photos = find_photographs(str(images))
    return prediction.predict(
        model,
        Folder(str(out)),
        root=root,
        photos=photos,
        wanted=prediction.Wanted(**wanted),
        resources=Resources(2, 1, 1, "cpu", 1, None),
        progress=Progress(),
    )


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_predict__another_model_removes_the_masks_of_the_first_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "stream_units", in_this_process)
    first, second = (small_model(tmp_path / name, classes) for name, classes in (("first", 3), ("second", 5)))
    monday, tuesday = (make_folder(tmp_path / name, num_images=2) for name in ("monday", "tuesday"))
    for photo in list(tuesday.iterdir()):
        photo.rename(photo.with_stem(f"new_{photo.stem}"))
    out = tmp_path / "out"
    own = {"masks/of_mine.png", "overlays/deep/of_mine.jpg", "probabilities/photo_000/notes.txt", "readme.md"}
    for name in own:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("")
    manifest = run_predict(first, monday, out, probabilities=True, coco=True)
    assert manifest["masks_of_another_model_removed"] == 0
    # Further photographs join those of the same model.
    assert run_predict(first, tuesday, out)["masks_of_another_model_removed"] == 0
    assert {"masks/photo_000.png", "masks/new_photo_000.png", "coco/labels.json"} <= names_in(out)

    manifest = run_predict(second, tuesday, out)
    assert manifest["masks_of_another_model_removed"] == 4
    assert json.loads((out / "predict.json").read_text()) == manifest
    of_each = {f"{kind}/new_photo_00{i}.{end}" for i in (0, 1) for kind, end in (("masks", "png"), ("overlays", "jpg"))}
    assert names_in(out) == own | of_each | {"legend.json", "legend.png", "predict.json", OUTPUTS}
    assert len(json.loads((out / "legend.json").read_text())) == 5

    # Other names make another legend.
    second.write_bytes("names.yaml", b"0: sky")
    assert run_predict(second, monday, out)["masks_of_another_model_removed"] == 2
    assert not (out / "masks/new_photo_000.png").exists()


@pytest.mark.parametrize("note", ["", "[]", "{", '{"stems": ["a"]}'])
def test_claim__a_note_that_cannot_be_read_removes_nothing(tmp_path: Path, note: str) -> None:
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/a.png").write_text("")
    (tmp_path / OUTPUTS).write_text(note)
    assert claim(Folder(str(tmp_path)), "ab", ["b"]) == 0
    assert (tmp_path / "masks/a.png").exists()


def test_claim__a_note_of_a_stranger_leads_nowhere_else(tmp_path: Path) -> None:
    out, mine = tmp_path / "out", tmp_path / "mine.png"
    mine.write_text("")
    (out / "masks").mkdir(parents=True)
    (out / OUTPUTS).write_text(json.dumps({"model_sha256": "", "stems": ["../../mine", "../mine", str(mine)[:-4]]}))
    assert claim(Folder(str(out)), "ab", []) == 0
    assert mine.exists()
