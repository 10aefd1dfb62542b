"""The workers of the evaluate stage without Ray: scores of scenes, refusals, and the patches drawn by baselines."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.builders import encode_png, listed, make_scenes, random_images
from tests.fixtures import TINY
from transfgu_ray.algorithms.baselines import iic, picie
from transfgu_ray.algorithms.scores.upsampling import upsample_argmax
from transfgu_ray.config.presets import get_preset
from transfgu_ray.config.run import build_config
from transfgu_ray.engine.parts import part_files
from transfgu_ray.engine.signs import Sign
from transfgu_ray.engine.stream import Photo
from transfgu_ray.errors import DataError
from transfgu_ray.images import decode_label, resize_label
from transfgu_ray.models.model import build_decoder, save_decoder
from transfgu_ray.models.names import Names
from transfgu_ray.models.weights import ENCODER, resolve_encoder
from transfgu_ray.pipeline import evaluate as evaluation
from transfgu_ray.pipeline.baselines import PatchSampler, cluster_patches
from transfgu_ray.pipeline.evaluate import Evaluator
from transfgu_ray.pipeline.labels import load_labeller
from transfgu_ray.pipeline.scoring import read_counts
from transfgu_ray.pipeline.train_loop import model_config
from transfgu_ray.reports.scores import STAGE_NAMES, metrics_json
from transfgu_ray.runs.run import Run
from transfgu_ray.runs.tables import build_table, concepts_schema, to_parquet
from transfgu_ray.storage import Folder

KINDS = ("foreground",) * 12 + ("background",) * 4
BARE = {"device": "cpu", "threads": 1}

UNSEEN = Sign("test")


@pytest.fixture
def untrained(tmp_path: Path) -> Run:
    """A run on scenes of 64 px with random concepts and decoders, one concept per class."""
    scenes = make_scenes(tmp_path / "scenes", num_train=3, num_val=2, size=(64, 64))
    named = (
        f"data.root={scenes}", "data.dataset=scenes", "concepts.num_concepts=null", "train.token_window=16"
    )  # fmt: skip
    run = Run.open(str(tmp_path / "run"), build_config(get_preset("tiny_cpu"), None, [*TINY, *named]))
    run.folder.write_bytes(ENCODER, resolve_encoder(run.config))
    concepts = {
        "concept_id": np.arange(16, dtype=np.int32),
        "kind": KINDS,
        "centroid": np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32),
        "num_crops": np.ones(16, dtype=np.int64),
    }
    run.folder.write_bytes("concepts.parquet", to_parquet(build_table(concepts, concepts_schema(24)), {}))
    config = model_config(run.config, list(KINDS), "")
    # A random decoder may separate the objects of two photographs from the ground by luck.
    torch.manual_seed(0)
    for name in ("decoder_round_0", "decoder"):
        state = build_decoder(config, 24).state_dict()
        save_decoder(Folder(run.folder.uri_of("model")), state, config=config, name=name)
    return run


@pytest.mark.parametrize("response", ["windows", "gradient"])
def test_load_labeller__windows_leave_the_background_of_eq_8_to_the_foreground(tmp_path: Path, response: str) -> None:
    named = ("data.root=unread", "data.region_mode=things_only", f"cam.response={response}")
    run = Run.open(str(tmp_path / "run"), build_config(get_preset("tiny_cpu"), None, [*TINY, *named]))
    run.folder.write_bytes(ENCODER, resolve_encoder(run.config))
    concepts = {
        "concept_id": np.arange(4, dtype=np.int32),
        "kind": ["foreground"] * 4,
        "centroid": np.random.default_rng(0).normal(size=(4, 24)).astype(np.float32),
        "num_crops": np.ones(4, dtype=np.int64),
    }
    run.folder.write_bytes("concepts.parquet", to_parquet(build_table(concepts, concepts_schema(24)), {}))
    scores, foreground = load_labeller(run.folder, run.config, "cpu")(random_images(2, 64, 64))
    # A response map is low where no concept is; among votes, some concept always has the most.
    assert (scores.amax(1)[~foreground] > 0).any() == (response == "gradient")
    assert (scores.amax(1)[foreground] > 0).any()


def read_photos(run: Run, split: str) -> list[Photo]:
    root = Path(run.config.data.root)
    return [
        Photo(ref.image_id, (root / ref.image_id).read_bytes(), (root / str(ref.label_id)).read_bytes(), None)
        for ref in listed(run.config.data, split, run.config.concepts.granularity).images
    ]


def draw(run: Run, photos: list[Photo], patches_a_photo: int) -> dict[str, list[dict]]:
    """Return the rows of the table of drawn patches, by photograph."""
    part = {"run_uri": run.folder.uri, "table": "baselines", "fingerprint": "", **BARE}
    PatchSampler(run.config, patches_per_photo=patches_a_photo, **part).process(0, photos)
    rows: dict[str, list[dict]] = {}
    for row in pq.read_table(Path(run.folder.path) / "baselines/part-000000.parquet").to_pylist():
        rows.setdefault(row["image_id"], []).append(row)
    return rows


def test_model_config__records_the_input_of_the_decoder(untrained: Run) -> None:
    assert model_config(untrained.config, list(KINDS), "").token_window == 16


def test_patch_sampler__patches_drawn_from_a_photograph_do_not_depend_on_the_others(untrained: Run) -> None:
    photos = read_photos(untrained, "train")
    drawn = draw(untrained, photos, patches_a_photo=10)
    assert [len({row["patch"] for row in rows}) for rows in drawn.values()] == [10, 10, 10]
    pixels = np.asarray(Image.open(io.BytesIO(photos[2].data or b"")), dtype=np.float64) / 255
    for row in drawn[photos[2].image_id]:
        y, x = 8 * (row["patch"] // 8), 8 * (row["patch"] % 8)
        np.testing.assert_allclose(row["raw_colour"], pixels[y : y + 8, x : x + 8].mean((0, 1)), atol=1e-3)
        assert np.isfinite(row["patch_tokens"] + row["random_vit"]).all()
    damaged = Photo(photos[1].image_id, b"", None, None)
    again = draw(untrained, [photos[0], damaged, photos[2]], patches_a_photo=10)
    assert again == {name: rows for name, rows in drawn.items() if name != damaged.image_id}


def test_cluster_patches__as_many_centroids_of_each_baseline(untrained: Run) -> None:
    draw(untrained, read_photos(untrained, "train"), patches_a_photo=20)
    centroids, masks = cluster_patches(
        untrained.folder.uri, untrained.config, num_clusters=7, threads=1, use_gpu=False, sign=UNSEEN
    )
    assert masks == {}
    shapes = {name: values.shape for name, values in centroids.items()}
    assert shapes == {"patch_tokens": (7, 24), "decoder_tokens": (7, 48), "random_vit": (7, 24), "raw_colour": (7, 3)}


def evaluator(run: Run, colours: np.ndarray | None = None, *settings: str) -> Evaluator:
    """Return a worker with the clusters of the baseline raw_colour."""
    config = build_config(run.config, None, settings)
    centroids = {} if colours is None else {"raw_colour": colours}
    part = {"run_uri": run.folder.uri, "table": "confusions", "fingerprint": "", **BARE}
    return Evaluator(config, num_classes=16, samples={}, centroids=centroids, **part)


@pytest.fixture
def of_heads(untrained: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The run with the baselines that go beyond k-means on patches, and one concept for all backgrounds."""
    monkeypatch.setattr(iic, "_STEPS", 3)
    monkeypatch.setattr(picie, "_EPOCHS", 1)
    changes = ["evaluate.baselines=[iic, picie, mask_contrast]", "concepts.num_background=1"]
    return Run(untrained.folder, build_config(untrained.config, None, changes))


def test_patch_sampler__two_views_and_masks_do_not_depend_on_the_other_photographs(of_heads: Run) -> None:
    photos = read_photos(of_heads, "train")
    drawn = draw(of_heads, photos, patches_a_photo=10)
    damaged = Photo(photos[0].image_id, b"", None, None)
    again = draw(of_heads, [damaged, *photos[1:]], patches_a_photo=10)
    for name, rows in again.items():
        assert list(rows[0]) == ["image_id", "patch", "patch_tokens", "mask_contrast", "view_1", "view_2"]
        assert rows == drawn[name]
        # One embedding per mask of the photograph.
        masks = {tuple(row["mask_contrast"]) for row in rows}
        assert sorted(mask[0] for mask in masks) == [0, 1]
    assert any(row["view_1"] != row["patch_tokens"] != row["view_2"] for row in rows)


def test_cluster_patches__heads_are_scored_as_centroids_are(of_heads: Run) -> None:
    draw(of_heads, read_photos(of_heads, "train"), patches_a_photo=20)
    again, (heads, masks) = (
        cluster_patches(of_heads.folder.uri, of_heads.config, num_clusters=4, threads=1, use_gpu=False, sign=UNSEEN)
        for _ in range(2)
    )
    assert masks == {"foreground_masks": 3, "background_masks": 3}
    assert {name: head.shape for name, head in heads.items()} == dict.fromkeys(
        ("iic", "picie", "mask_contrast"), (4, 25)
    )
    assert all(np.array_equal(head, again[0][name]) for name, head in heads.items())
    photos, part = read_photos(of_heads, "val"), {"run_uri": of_heads.folder.uri, "table": "confusions"}
    given = {"num_classes": 16, "samples": {}, "centroids": heads, "fingerprint": ""}
    Evaluator(of_heads.config, **given, **part, **BARE).process(0, photos)
    counts = read_counts(of_heads.folder, 16, 16)
    assert list(counts) == [*STAGE_NAMES, *heads]
    scored = sum((resize_label(decode_label(photo.label or b""), (32, 32)) != 255).sum() for photo in photos)
    assert [of_method.sum() for of_method in counts.values()] == [scored] * 6
    of_masks = counts["mask_contrast"].toarray().reshape(-1, 16, 16).sum((0, 1))
    # Foreground and background of each photograph, and no third mask.
    assert (of_masks > 0).sum() <= 1 + len(photos)
    assert (of_masks[4:] == 0).all()


def test_cluster_patches__fewer_photographs_than_clusters_of_masks_are_refused(of_heads: Run) -> None:
    draw(of_heads, read_photos(of_heads, "train"), patches_a_photo=20)
    config = build_config(of_heads.config, None, ["evaluate.baselines=[mask_contrast]"])
    with pytest.raises(DataError, match="mask_contrast cannot make 4 clusters of 3 foreground masks"):
        cluster_patches(of_heads.folder.uri, config, num_clusters=5, threads=1, use_gpu=False, sign=UNSEEN)


def test_evaluator__scores_stages_and_baselines_of_scenes(untrained: Run) -> None:
    config, photos = untrained.config, read_photos(untrained, "val")
    labels = np.stack([decode_label(photo.label or b"") for photo in photos])
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(photo.data or b""))) for photo in photos]) / 255
    # The true colour of each class present; the other centroids are near nothing.
    colours = np.full((16, 3), 9.0, dtype=np.float32)
    for class_id in set(np.unique(labels)) - {255}:
        colours[class_id] = pixels[labels == class_id].mean(0)
    evaluator(untrained, colours).process(0, photos)
    counts = read_counts(untrained.folder, 16, 16)
    assert list(counts) == [*STAGE_NAMES, "raw_colour"]
    small = np.stack([resize_label(label, (32, 32)) for label in labels])
    for of_method in counts.values():
        # One row per photograph; void pixels are left out.
        assert of_method.sum(1).tolist() == (small != 255).sum((1, 2)).tolist()
    metrics = metrics_json(config, "val", num_images=2, counts=counts, names=Names(KINDS, {}), weights_sha256="")
    for scores in [*metrics["stages"].values(), *metrics["baselines"].values()]:
        # A pixel of the right class is also of the right coarse class.
        assert scores["super"]["pixel_accuracy"] >= scores["pixel_accuracy"]
    assert metrics["baselines"]["raw_colour"]["pixel_accuracy"] > 0.85
    assert metrics["stages"]["trained"]["pixel_accuracy"] < 0.85


def test_evaluator__refuses_labels_that_it_cannot_score(untrained: Run) -> None:
    photo, *_ = read_photos(untrained, "val")
    png = io.BytesIO()
    Image.fromarray(np.full((64, 64), 77, dtype=np.uint8)).save(png, "PNG")
    labels = {"good": photo.label, "unknown": png.getvalue(), "absent": None, "damaged": (photo.label or b"")[:40]}
    evaluator(untrained).process(0, [Photo(name, photo.data, data, None) for name, data in labels.items()])
    (name,) = part_files(untrained.folder, "confusions")
    stats = json.loads(pq.read_schema(Path(untrained.folder.path) / name).metadata[b"stats"])
    assert stats["images"] == 1
    assert {refusal["image_id"]: refusal["reason"].split(":")[0] for refusal in stats["refused"]} == {
        "unknown": "its label holds an unknown id",
        "absent": "its label cannot be read",
        "damaged": "its label is damaged",
    }


def test_evaluator__counts_do_not_depend_on_which_worker_does_which_unit(untrained: Run) -> None:
    photos, grey = read_photos(untrained, "train"), np.linspace(0, 1, 16, dtype=np.float32)[:, None].repeat(3, axis=1)
    one = evaluator(untrained, grey)
    for unit, photo in enumerate(photos):
        one.process(unit, [photo])
    want = read_counts(untrained.folder, 16, 16)
    untrained.folder.delete("confusions")
    others = evaluator(untrained, grey), evaluator(untrained, grey)
    for unit in (2, 0, 1):
        others[unit % 2].process(unit, [photos[unit]])
    got = read_counts(untrained.folder, 16, 16)
    assert list(got) == list(want) == [*STAGE_NAMES, "raw_colour"]
    for name, counts in got.items():
        assert counts.shape == (3, 256)
        assert np.array_equal(counts.toarray(), want[name].toarray())


def test_evaluator__picie_and_stego_see_the_centre_square_alone(untrained: Run) -> None:
    # A wide photograph: a red square of class 3 between two wings of noise of class 5.
    pixels = np.random.default_rng(0).integers(0, 256, (48, 144, 3), dtype=np.uint8)
    pixels[:, 48:96] = (200, 30, 30)
    label = np.full((48, 144), 5, dtype=np.uint8)
    label[:, 48:96], label[:8, 48:96] = 3, 255
    photo = Photo("wide", encode_png(Image.fromarray(pixels)), encode_png(Image.fromarray(label)), None)
    grey = np.linspace(0, 1, 16, dtype=np.float32)[:, None].repeat(3, axis=1)
    seen = {}
    for protocol in ("transfgu", "picie", "stego"):
        setting = () if protocol == "transfgu" else (f"evaluate.protocol={protocol}", "evaluate.image_size=[96, 96]")
        evaluator(untrained, grey, *setting).process(0, [photo])
        counts = read_counts(untrained.folder, 16, 16)
        seen[protocol] = {name: of_method.toarray().reshape(16, 16) for name, of_method in counts.items()}
    for of_method in seen["transfgu"].values():
        assert np.flatnonzero(of_method.sum(1)).tolist() == [3, 5]
    for protocol in ("picie", "stego"):
        for of_method in seen[protocol].values():
            assert of_method.sum() == of_method[3].sum() == 96 * 80
        # One colour, so one cluster: the baselines do not see the wings either.
        assert seen[protocol]["raw_colour"].max() == 96 * 80


def test_evaluator__refined_masks_are_counted_beside_the_plain_ones(
    untrained: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = read_photos(untrained, "val")
    evaluator(untrained).process(0, photos)
    plain = read_counts(untrained.folder, 16, 16)
    evaluator(untrained, None, "evaluate.refinement=pamr").process(0, photos)
    counts = read_counts(untrained.folder, 16, 16)
    assert list(counts) == [*STAGE_NAMES, "refined"]
    for name, of_method in plain.items():
        assert np.array_equal(counts[name].toarray(), of_method.toarray())
    assert counts["refined"].sum() == counts["bootstrapped"].sum()
    assert not np.array_equal(counts["refined"].toarray(), counts["bootstrapped"].toarray())
    # The last stage is the refined one.
    monkeypatch.setattr(evaluation, "refined_argmax", lambda maps, image: upsample_argmax(maps, tuple(image.shape[1:])))
    evaluator(untrained, None, "evaluate.refinement=pamr").process(0, photos)
    counts = read_counts(untrained.folder, 16, 16)
    assert np.array_equal(counts["refined"].toarray(), counts["bootstrapped"].toarray())


def test_read_counts__photographs_without_a_labelled_pixel_have_no_row(untrained: Run) -> None:
    photo, other = read_photos(untrained, "val")
    void = Photo("void", photo.data, encode_png(Image.fromarray(np.full((64, 64), 255, dtype=np.uint8))), None)
    worker = evaluator(untrained)
    worker.process(0, [void])
    assert read_counts(untrained.folder, 16, 16) == {}
    worker.process(1, [photo, void, other])
    assert {of_method.shape for of_method in read_counts(untrained.folder, 16, 16).values()} == {(2, 256)}
