import io
import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.ndimage import binary_dilation, binary_erosion

from transfgu_ray.cli import main
from transfgu_ray.errors import DataError
from transfgu_ray.scenes import (
    CLASSES,
    STUFF_IDS,
    SUPER_IDS,
    SUPER_NAMES,
    THING_IDS,
    compose,
    render_object,
    render_scene,
    write,
    write_objects,
    write_scenes,
)
from transfgu_ray.scenes.builders import BUILDERS
from transfgu_ray.scenes.shapes import Material
from transfgu_ray.scenes.textures import STUFF, SURFACES


class _Killed(Exception):
    pass


def _rng(number):
    return np.random.default_rng([7, 0, number])


def _files(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def _pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def test_classes__things_first_with_four_and_two_supers():
    assert tuple(range(12)) == THING_IDS
    assert tuple(range(12, 16)) == STUFF_IDS
    assert len({each.name for each in CLASSES}) == 16
    assert [SUPER_NAMES[i] for i in SUPER_IDS] == [each.super_name for each in CLASSES]
    assert np.bincount(SUPER_IDS).tolist() == [3, 3, 3, 3, 2, 2]
    assert len(BUILDERS) == len(THING_IDS)
    assert sorted(surface for _, surface, _ in BUILDERS) == sorted(SURFACES)
    assert tuple(texture.__name__ for texture in STUFF) == tuple(CLASSES[i].name for i in STUFF_IDS)


def test_classes__need_nothing_heavy():
    code = "import sys, transfgu_ray.scenes.classes; sys.exit(bool({'numpy', 'PIL', 'pyarrow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("render", [lambda rng: render_object(rng, 4, 48), lambda rng: render_scene(rng, 64)])
def test_render__same_stream_same_picture(render):
    one, again, other = render(_rng(1)), render(_rng(1)), render(_rng(2))
    for first, second, third in zip(one, again, other, strict=True):
        assert first.dtype == np.uint8
        np.testing.assert_array_equal(first, second)
        assert (first != third).any()


@pytest.mark.parametrize("class_id", THING_IDS, ids=lambda i: CLASSES[i].name)
def test_render_object__fills_a_quarter_of_the_frame(class_id):
    for number in range(20):
        image, mask = render_object(_rng(number), class_id, 32)
        assert image.shape == (32, 32, 3)
        assert mask.shape == (32, 32)
        assert set(np.unique(mask)) == {0, 1}
        assert mask.mean() >= 0.25


@pytest.mark.parametrize("class_id", THING_IDS, ids=lambda i: CLASSES[i].name)
def test_builders__fat_shapes_with_several_parts(class_id):
    for number in range(8):
        parts = BUILDERS[class_id][0](_rng(number))
        materials = {material for material, _ in parts} - {Material.HOLE}
        assert Material.BODY in materials
        assert len(materials) >= 4
    # Solid: on average over poses, which are random, a thing fills half of its box.
    fills = []
    for number in range(16):
        cover = compose.draw_thing(_rng(number), class_id, side_px=60, centre_px=(40, 40)).cover >= 0.5
        rows, columns = np.flatnonzero(cover.any(1)), np.flatnonzero(cover.any(0))
        assert max(np.ptp(rows), np.ptp(columns)) + 1 == pytest.approx(60, abs=3)
        fills.append(cover.sum() / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1)))
    assert np.mean(fills) >= 0.5


def test_render_object__mask_is_where_the_picture_differs_without_the_object(monkeypatch):
    lay = compose.lay
    for number in range(12):
        class_id = number % 12
        monkeypatch.setattr(compose, "lay", lambda *a, **named: lay(*a, **named | {"shadow": 0}))
        image, mask = render_object(_rng(number), class_id, 64)
        monkeypatch.setattr(
            compose, "lay", lambda *a, **named: None if named["value"] else lay(*a, **named | {"shadow": 0})
        )
        without, _ = render_object(_rng(number), class_id, 64)
        differs = (image != without).any(-1)
        # Pixels at the rim are mixed.
        assert not differs[~binary_dilation(mask, np.ones((3, 3)))].any()
        assert differs[binary_erosion(mask, np.ones((3, 3)))].mean() > 0.97


def test_neighbour__hides_at_most_a_quarter():
    hidden = []
    for number in range(40):
        rng, label = _rng(number), np.zeros((48, 48), dtype=np.uint8)
        thing = compose._main_thing(rng, number % 12, 48)
        canvas = np.zeros((48, 48, 3), dtype=np.float32)
        compose.lay(canvas, label, layer=thing, value=1, shadow=0)
        before = (label == 1).sum()
        compose.lay(
            canvas, label, layer=compose._neighbour(rng, thing, size_px=48, class_id=number % 12), value=2, shadow=0
        )
        hidden.append(1 - (label == 1).sum() / before)
    assert 0.1 < max(hidden) <= 0.25


def test_lay__by_hand():
    canvas, label = np.full((2, 3, 3), 0.5, dtype=np.float32), np.full((2, 3), 12, dtype=np.uint8)
    cover = np.array([[1, 0.25], [0.5, 0]], dtype=np.float32)
    colour = cover[..., None] * np.array([1, 0, 0], dtype=np.float32)
    compose.lay(canvas, label, layer=compose.Layer(1, 0, colour, cover), value=3, shadow=0)
    np.testing.assert_array_equal(label, [[12, 3, 12], [12, 3, 12]])
    np.testing.assert_allclose(canvas[:, 1], [[1, 0, 0], [0.75, 0.25, 0.25]])
    np.testing.assert_allclose(canvas[:, 2], [[0.625, 0.375, 0.375], [0.5, 0.5, 0.5]])
    np.testing.assert_array_equal(canvas[:, 0], 0.5)


@pytest.mark.parametrize("corner", [(-9, 0), (9, 0), (0, -9), (0, 9), (2, 2)])
def test_lay__beside_the_picture_changes_nothing(corner):
    canvas, label = np.full((2, 2, 3), 0.5, dtype=np.float32), np.zeros((2, 2), dtype=np.uint8)
    whole = np.ones((3, 3), dtype=np.float32)
    compose.lay(canvas, label, layer=compose.Layer(*corner, whole[..., None], whole), value=3, shadow=0)
    assert (canvas == 0.5).all()
    assert not label.any()


def test_render_scene__two_or_three_things_on_one_to_three_surfaces():
    counts = []
    for number in range(16):
        _, label = render_scene(_rng(number), 96)
        ids = np.unique(label)
        things, stuff = ids[ids < 12], ids[ids >= 12]
        assert ids.max() < len(CLASSES)
        assert 2 <= len(things) <= 3
        assert 1 <= len(stuff) <= 3
        counts.append(len(things))
    assert set(counts) == {2, 3}


def test_place__each_thing_is_seen_and_of_the_promised_size():
    for number in range(6):
        layers = compose._place(_rng(number), [0, 4, 8], 128)
        label, canvas = np.zeros((128, 128), dtype=np.uint8), np.zeros((128, 128, 3), dtype=np.float32)
        for i, layer in enumerate(layers):
            compose.lay(canvas, label, layer=layer, value=i + 1, shadow=0)
        for i, layer in enumerate(layers):
            assert (label == i + 1).sum() >= 0.7 * (layer.cover >= 0.5).sum()
            # A rim of a pixel or two around the box.
            assert 0.42 * 128 <= max(layer.cover.shape) <= 0.6 * 128 + 4


def test_render_object__colour_does_not_tell_the_class():
    colours, labels = [], np.arange(600) % 12
    for number, label in enumerate(labels):
        image, mask = render_object(_rng(number), int(label), 32)
        colours.append(image[mask == 1].mean(0))
    # The overall luminance of a class follows from its parts; hue and saturation are tested here.
    colours = np.stack(colours)
    colours = colours - (colours @ (0.299, 0.587, 0.114))[:, None]
    centroids = np.stack([colours[:300][labels[:300] == i].mean(0) for i in range(12)])
    guess = np.square(colours[300:, None] - centroids).sum(-1).argmin(1)
    # Chance is 0.083, with a deviation of 0.016 over 300 pictures.
    assert (guess == labels[300:]).mean() < 0.14


def test_write_objects__balanced_shards_that_do_not_depend_on_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_IMAGES_PER_SHARD", 10)
    monkeypatch.setattr(write, "_CHUNK", 3)
    write_objects(str(tmp_path / "one"), 24, seed=3, split="train", size_px=32, num_processes=1)
    write_objects(str(tmp_path / "two"), 24, seed=3, split="train", size_px=32, num_processes=2)
    write_objects(str(tmp_path / "val"), 12, seed=3, split="val", size_px=32, num_processes=1)
    assert _files(tmp_path / "one") == _files(tmp_path / "two")
    shards = [f"train-0000{i}-of-00003.parquet" for i in range(3)]
    assert sorted(_files(tmp_path / "one")) == ["render-train.json", *shards]

    rows = [row for name in shards for row in pq.read_table(tmp_path / "one" / name).to_pylist()]
    assert np.bincount([row["label"] for row in rows]).tolist() == [2] * 12
    assert rows[13]["path"] == "turtle/000013.png"
    assert [row["name"] for row in rows] == [CLASSES[row["label"]].name for row in rows]
    image, mask = render_object(np.random.default_rng([3, 0, 13]), 1, 32)
    np.testing.assert_array_equal(_pixels(rows[13]["bytes"]), image)
    np.testing.assert_array_equal(_pixels(rows[13]["mask"]), mask * 255)
    val = pq.read_table(tmp_path / "val" / "val-00000-of-00002.parquet").to_pylist()
    assert val[0]["bytes"] != rows[0]["bytes"]


def test_write_scenes__labels_and_supers_agree(tmp_path):
    write_scenes(str(tmp_path), 3, num_val=2, seed=0, size_px=64, num_processes=1)
    files = _files(tmp_path)
    names = [f"train/scene_0000{i}.png" for i in range(3)] + [f"val/scene_0000{i}.png" for i in range(2)]
    want = {f"{kind}/{name}" for kind in ("images", "masks/fine", "masks/super") for name in names}
    assert set(files) == want | {"classes.json", "render.json"}
    for name in names:
        fine, coarse = _pixels(files[f"masks/fine/{name}"]), _pixels(files[f"masks/super/{name}"])
        assert _pixels(files[f"images/{name}"]).shape == (64, 64, 3)
        assert fine.shape == (64, 64)
        np.testing.assert_array_equal(coarse, np.array(SUPER_IDS)[fine])
    assert files["images/train/scene_00000.png"] != files["images/val/scene_00000.png"]
    assert [each["name"] for each in json.loads(files["classes.json"])["classes"]] == [c.name for c in CLASSES]


def test_write_scenes__an_interrupted_render_is_finished(tmp_path, monkeypatch):
    rendered = []

    def render(rng, size_px):
        if len(rendered) == 3:
            raise _Killed
        rendered.append(size_px)
        return render_scene(rng, size_px)

    write_scenes(str(tmp_path / "whole"), 4, num_val=1, seed=0, size_px=64, num_processes=1)
    monkeypatch.setattr(write, "render_scene", render)
    with pytest.raises(_Killed):
        write_scenes(str(tmp_path / "torn"), 4, num_val=1, seed=0, size_px=64, num_processes=1)
    with pytest.raises(DataError, match=r"render\.json: rendered with seed=0, not 1"):
        write_scenes(str(tmp_path / "torn"), 4, num_val=1, seed=1, size_px=64, num_processes=1)
    rendered.clear()
    write_scenes(str(tmp_path / "torn"), 4, num_val=1, seed=0, size_px=64, num_processes=1)
    assert len(rendered) == 2
    assert _files(tmp_path / "torn") == _files(tmp_path / "whole")

    write_scenes(str(tmp_path / "torn"), 4, num_val=1, seed=0, size_px=64, num_processes=1)
    assert len(rendered) == 2
    with pytest.raises(DataError, match="rendered with num_train=4, not 5"):
        write_scenes(str(tmp_path / "torn"), 5, num_val=1, seed=0, size_px=64, num_processes=1)


def test_write_objects__an_interrupted_render_is_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_IMAGES_PER_SHARD", 2)
    write_objects(str(tmp_path), 4, seed=0, split="train", size_px=32, num_processes=1)
    whole = _files(tmp_path)
    record = tmp_path / "render-train.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"complete": False}, indent=1))
    (tmp_path / "train-00001-of-00002.parquet").unlink()
    kept = (tmp_path / "train-00000-of-00002.parquet").stat().st_mtime_ns
    write_objects(str(tmp_path), 4, seed=0, split="train", size_px=32, num_processes=1)
    assert _files(tmp_path) == whole
    assert (tmp_path / "train-00000-of-00002.parquet").stat().st_mtime_ns == kept


@pytest.mark.parametrize(("count", "split"), [(0, "train"), (4, "test")])
def test_write_objects__refuses(tmp_path, count, split):
    with pytest.raises(DataError, match=f"count={count} must be >= 1 and split='{split}' must be"):
        write_objects(str(tmp_path), count, seed=0, split=split)
    assert not _files(tmp_path)


@pytest.mark.parametrize("what", ["objects", "scenes"])
def test_render__writes_both_splits(what, tmp_path, capsys, monkeypatch):
    command = ["transfgu", "render", what, str(tmp_path / "out"), "--num-train", "2", "--num-val", "1", "--seed", "3"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(write, "_spread", lambda work, items, num_processes: map(work, items))
    with pytest.raises(SystemExit) as exit_code:
        main()
    assert not exit_code.value.code
    assert f"2 {what} to learn from and 1 to measure on" in capsys.readouterr().out
    if what == "objects":
        write_objects(str(tmp_path / "same"), 2, seed=3, split="train", num_processes=1)
        write_objects(str(tmp_path / "same"), 1, seed=3, split="val", num_processes=1)
    else:
        write_scenes(str(tmp_path / "same"), 2, num_val=1, seed=3, num_processes=1)
    assert _files(tmp_path / "out") == _files(tmp_path / "same")
