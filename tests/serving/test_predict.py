"""Output of `transfgu predict`, read as other programs read it."""

import json
import os
import shutil
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from typer.testing import CliRunner

from tests.builders import contents, make_hub_table, make_tar
from tests.fixtures import transfgu
from transfgu_ray.cli import app
from transfgu_ray.config.sections import RuntimeConfig
from transfgu_ray.engine.inprocess import own_resources
from transfgu_ray.engine.progress import Progress
from transfgu_ray.engine.session import ray_session
from transfgu_ray.errors import ArtifactError, DataError
from transfgu_ray.models.model import load_model
from transfgu_ray.runs.run import Run
from transfgu_ray.serving import predict as prediction
from transfgu_ray.serving.photographs import find_photographs
from transfgu_ray.storage import Folder

pytestmark = pytest.mark.ray

SIZES = {
    "a.jpg": (97, 61), "a.png": (40, 80), "deep er/é.webp": (120, 33), "f/f_2.png": (64, 70), "f/f_10.png": (64, 70)
}  # fmt: skip
STEMS = {
    "a.jpg": "a.jpg", "a.png": "a.png", "deep er/é.webp": "deep er/é", "f/f_2.png": "f/f_2", "f/f_10.png": "f/f_10",
    "turned.jpg": "turned",
}  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of several sizes, kinds and folders, one of them rotated, and a file that is not a photograph."""
    root = tmp_path_factory.mktemp("new")
    for name, (width, height) in SIZES.items():
        (root / name).parent.mkdir(exist_ok=True)
        noise = Image.effect_noise((9, 9), 300).resize((width, height), Image.Resampling.BICUBIC)
        Image.merge("RGB", [noise.rotate(angle) for angle in (0, 90, 180)]).save(root / name)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((50, 70), 80).convert("RGB").save(root / "turned.jpg", exif=exif)
    (root / "b.jpg").write_text("no picture")
    return root


def run_predict(
    finished: Run, images: Path, out: Path, *wanted: Any, in_process: bool = False, **runtime: Any
) -> dict[str, Any]:
    model = prediction.model_folder(finished.folder.uri)
    root, listing = find_photographs(str(images))
    done = []

    class Noted(Progress):
        def __call__(self, more: int = 0, words: str = "", *, refused: int = 0) -> None:
            done.append((more, refused))

    already = len(listing.refused)
    config = RuntimeConfig(**runtime)
    with nullcontext(own_resources(config)) if in_process else ray_session(None, config) as resources:
        manifest = prediction.predict(
            model,
            Folder(str(out)),
            root=root,
            photos=listing,
            wanted=prediction.Wanted(*wanted),
            resources=resources,
            progress=Noted(),
        )
    assert np.sum(done, axis=0).tolist() == [len(listing.images), len(manifest["refused"]) - already]
    return manifest


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory, finished: Run, photos: Path) -> tuple[Path, dict[str, Any]]:
    """All possible outputs for `photos`, and the manifest."""
    out = tmp_path_factory.mktemp("out")
    return out, run_predict(finished, photos, out, False, True, True)


def test_output_stems__no_two_photographs_write_the_same_file() -> None:
    image_ids = ["a.jpg", "a.png", "a.jpg.png", "b.jpg", "b.jpg.webp", "d/c.tif"]
    stems = prediction.output_stems(image_ids)
    assert [stems[image_id] for image_id in image_ids] == ["a.jpg", "a.png", "a.jpg.png", "b", "b.jpg.webp", "d/c"]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_predict__photographs_in_a_shard_get_the_masks_of_those_in_files(
    finished: Run, photos: Path, everything: tuple[Path, dict[str, Any]], tmp_path: Path, kind: str
) -> None:
    members, (out, expected) = contents(photos), everything
    pack = make_tar if kind == "tar" else make_hub_table
    manifest = run_predict(finished, pack(tmp_path / f"a.{kind}", members), tmp_path / "out", in_process=True)
    assert manifest["refused"] == expected["refused"]
    for folder in ("masks", "overlays"):
        assert contents(tmp_path / "out" / folder) == contents(out / folder)


def mask_of(out: Path, stem: str) -> np.ndarray:
    return np.asarray(Image.open(out / f"masks/{stem}.png"))


def test_predict__masks_and_overlays_of_the_photographs_own_size(everything: tuple[Path, dict[str, Any]]) -> None:
    out, _ = everything
    for image_id, stem in STEMS.items():
        mask = Image.open(out / f"masks/{stem}.png")
        size = SIZES.get(image_id, (70, 50))
        assert (mask.mode, mask.size) == ("P", size)
        assert np.asarray(mask).max() <= 4
        assert Image.open(out / f"overlays/{stem}.jpg").size == size


def test_predict__manifest_and_legend(everything: tuple[Path, dict[str, Any]], photos: Path) -> None:
    out, manifest = everything
    assert json.loads((out / "predict.json").read_text()) == manifest
    assert (manifest["rows_in"], manifest["rows_out"]) == (7, 6)
    assert manifest["refused"] == [{"image_id": "b.jpg", "reason": "not an image"}]
    assert (manifest["units"], manifest["units_resumed"]) == (2, 0)
    assert not (out / ".units").exists()
    assert manifest["images_per_second"] == pytest.approx(6 / manifest["seconds"])
    legend = json.loads((out / "legend.json").read_text())
    assert [(entry["id"], entry["name"]) for entry in legend[::4]] == [(0, "concept 0"), (4, "background")]
    palette = Image.open(out / "masks/a.png.png").getpalette()[: 3 * len(legend)]
    assert [f"#{bytes(palette[i : i + 3]).hex()}" for i in range(0, len(palette), 3)] == [e["colour"] for e in legend]
    assert Image.open(out / "legend.png").height > 5 * 20


def test_predict__probabilities_are_those_of_the_mask(everything: tuple[Path, dict[str, Any]]) -> None:
    out, _ = everything
    for stem in STEMS.values():
        classes = np.stack([np.asarray(Image.open(out / f"probabilities/{stem}/{i}.png")) for i in range(5)])
        assert classes.dtype == np.uint8
        assert np.abs(classes.sum(axis=0, dtype=int) - 255).max() <= 3
        chosen = np.take_along_axis(classes, mask_of(out, stem)[None].astype(int), axis=0)[0]
        np.testing.assert_array_equal(chosen, classes.max(axis=0))


def test_predict__coco_labels_read_by_its_own_tools_are_the_masks(everything: tuple[Path, dict[str, Any]]) -> None:
    out, _ = everything
    coco = COCO(str(out / "coco/labels.json"))
    images = coco.loadImgs(coco.getImgIds())
    assert {image["file_name"]: (image["width"], image["height"]) for image in images} == {
        **SIZES,
        "turned.jpg": (70, 50),
    }
    for image in images:
        expected = mask_of(out, STEMS[image["file_name"]])
        found = np.full(expected.shape, 4)
        for annotation in coco.loadAnns(coco.getAnnIds(image["id"])):
            piece = coco.annToMask(annotation).astype(bool)
            assert annotation["area"] == piece.sum()
            found[piece] = annotation["category_id"] - 1
        np.testing.assert_array_equal(found, expected)
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == [f"concept {i}" for i in range(4)]


def test_predict__coco_panoptic_pngs_say_what_their_json_says(everything: tuple[Path, dict[str, Any]]) -> None:
    out, _ = everything
    panoptic = json.loads((out / "coco/panoptic.json").read_text())
    assert len(panoptic["annotations"]) == len(panoptic["images"]) == 6
    for annotation in panoptic["annotations"]:
        rgb = np.asarray(Image.open(out / "coco/panoptic" / annotation["file_name"])).astype(int)
        ids = rgb @ (1, 256, 65536)
        areas = {int(each): int((ids == each).sum()) for each in np.unique(ids) if each}
        assert areas == {info["id"]: info["area"] for info in annotation["segments_info"]}
        # The background is unlabelled; other class ids are one less than their segment's.
        mask = mask_of(out, annotation["file_name"].removesuffix(".png"))
        np.testing.assert_array_equal(ids, np.where(mask == 4, 0, mask + 1))


def test_predict__frames_keep_their_order(everything: tuple[Path, dict[str, Any]]) -> None:
    out, _ = everything
    names = [image["file_name"] for image in json.loads((out / "coco/labels.json").read_text())["images"]]
    assert names == ["a.jpg", "a.png", "deep er/é.webp", "f/f_2.png", "f/f_10.png", "turned.jpg"]


@pytest.mark.slow
def test_predict__the_same_bytes_with_more_workers(
    everything: tuple[Path, dict[str, Any]], finished: Run, photos: Path, tmp_path: Path
) -> None:
    out, _ = everything
    run_predict(finished, photos, tmp_path, False, True, True, num_workers=2, num_blocks=1)
    files = [path.relative_to(out) for path in out.rglob("*") if path.is_file() and path.name != "predict.json"]
    assert len(files) == 2 + 2 + 1 + 6 * 3 + 6 * 5
    assert [name for name in files if (out / name).read_bytes() != (tmp_path / name).read_bytes()] == []


@pytest.mark.reports
@pytest.mark.parametrize("num_workers", [1, 3])
def test_predict__the_same_bytes_without_ray(
    everything: tuple[Path, dict[str, Any]], finished: Run, photos: Path, tmp_path: Path, num_workers: int
) -> None:
    out, _ = everything
    run_predict(finished, photos, tmp_path, False, True, True, in_process=True, num_workers=num_workers)
    assert files_of(tmp_path) == files_of(out)


@pytest.mark.reports
def test_predict__few_photographs_start_no_ray(
    finished: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("transfgu_ray.engine.session.ray_session", started)
    command = ["predict", finished.folder.uri, "--images", str(photos / "a.jpg"), "--out", str(tmp_path)]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    assert mask_of(tmp_path, "a").shape == (61, 97)
    with pytest.raises(AssertionError, match="Ray was started"):
        CliRunner().invoke(app, [*command, "--ray-address", "auto"], catch_exceptions=False)


def test_predict__sliding(finished: Run, photos: Path, tmp_path: Path) -> None:
    assert run_predict(finished, photos / "a.jpg", tmp_path, True)["sliding"]
    model = load_model(Folder(finished.folder.uri_of("model")))
    photo = Image.open(photos / "a.jpg")
    expected = model.to_mask(model.photo_maps(photo, sliding=True), photo)
    np.testing.assert_array_equal(mask_of(tmp_path, "a"), expected)
    assert not np.array_equal(expected, model.segment([photo])[0])


def test_predict__no_manifest_where_nothing_could_be_read(finished: Run, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "predict.json").write_text("{}")
    with pytest.raises(DataError, match=r"none of 1 photographs can be used; the first, b\.jpg: not an image"):
        run_predict(finished, photos / "b.jpg", tmp_path)
    assert not (tmp_path / "predict.json").exists()


def files_of(out: Path) -> dict[str, bytes]:
    """Return what a prediction wrote, by name, without its timings and logs."""
    files = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    manifest = json.loads(files["predict.json"])
    for name in ("units_resumed", "seconds", "images_per_second", "peak_memory_mb"):
        del manifest[name]
    kept = {name: data for name, data in files.items() if not name.startswith("logs/")}
    return kept | {"predict.json": json.dumps(manifest).encode()}


@pytest.mark.slow
def test_predict__killed_goes_on_at_the_next_unit_to_the_same_bytes(
    finished: Run, photos: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    for copy in range(30):
        shutil.copytree(photos, images / f"{copy:02}")
    command = ("predict", finished.folder.uri, "--images", str(images), "--probabilities", "--coco", "--quiet")
    process = transfgu(*command, "--out", str(tmp_path / "whole"))
    assert process.wait(timeout=300) == 0, process.communicate()[0]

    out = tmp_path / "out"
    process = transfgu(*command, "--out", str(out))
    end = time.monotonic() + 300
    while len(list(out.glob(".units/*/[0-9]*.json"))) < 3:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "no unit was finished"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "predict.json").exists()
    assert len(list(out.glob(".units/*/[0-9]*.json"))) < 53
    process = transfgu(*command, "--out", str(out))
    assert process.wait(timeout=300) == 0, process.communicate()[0]
    # Workers may finish a unit after their command has been killed.
    assert 3 <= json.loads((out / "predict.json").read_bytes())["units_resumed"] < 53
    assert files_of(out) == files_of(tmp_path / "whole")


def test_predict__records_serve_the_same_model_and_wishes_alone(
    finished: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, wanted = tmp_path / "out", (False, False, True)
    renamed = Run.open(str(shutil.copytree(finished.folder.path, tmp_path / "renamed")), None)
    renamed.folder.write_bytes("model/names.yaml", b"0: sky")

    def resumed(run: Run, *wanted: bool) -> int:
        """Finish all units of a call that fails after them, then give another call; return what it resumed."""

        def fail(*_: object) -> None:
            raise ArtifactError("cannot write legend.json")

        with monkeypatch.context() as patch:
            patch.setattr(prediction, "_write_shared", fail)
            with pytest.raises(ArtifactError, match=r"legend\.json"):
                run_predict(finished, photos, out, False, False, True, in_process=True)
        manifest = run_predict(run, photos, out, *wanted, in_process=True)
        assert not (out / ".units").exists()
        return manifest["units_resumed"]

    assert resumed(finished, *wanted) == 2
    assert resumed(renamed, *wanted) == 0
    assert resumed(finished, False, True, True) == 0


@pytest.mark.reports
def test_predict__long_names_are_kept_or_refused_alone(finished: Run, photos: Path, tmp_path: Path) -> None:
    images, longest, twins = tmp_path / "images", "a" * 251, "b" * 251
    images.mkdir()
    for name in (f"{longest}.jpg", f"{twins}.jpg", f"{twins}.png"):
        shutil.copy(photos / "a.jpg", images / name)
    manifest = run_predict(finished, images, tmp_path / "out", in_process=True)
    assert [path.name for path in (tmp_path / "out/masks").iterdir()] == [f"{longest}.png"]
    assert {refusal["image_id"] for refusal in manifest["refused"]} == {f"{twins}.jpg", f"{twins}.png"}
    assert (manifest["rows_in"], manifest["rows_out"]) == (3, 1)


@pytest.mark.reports
def test_predict__masks_within_the_photographs_are_not_segmented_in_turn(
    finished: Run, photos: Path, tmp_path: Path
) -> None:
    images = tmp_path / "photos"
    shutil.copytree(photos, images)
    for out in (images, images / "out", images):
        command = ["predict", finished.folder.uri, "--images", str(images), "--out", str(out)]
        result = CliRunner().invoke(app, command, catch_exceptions=False)
        assert result.exit_code == 0
        assert json.loads((out / "predict.json").read_text())["rows_in"] == 7
    assert "passed over: 26 output of transfgu" in result.output
