"""`transfgu probe` against the same measures computed by hand."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.builders import TINY_OVERRIDES, TINY_VIT, make_folder, make_table, shake
from transfgu_ray.algorithms.dino.probe import knn_accuracy, rank_me
from transfgu_ray.algorithms.encoder.checkpoints import dump_encoder, load_encoder, random_vit
from transfgu_ray.algorithms.encoder.vit import above_mean
from transfgu_ray.errors import ConfigError, DataError
from transfgu_ray.pretraining.probe import Probe
from transfgu_ray.pretraining.sources import open_source, read_unit


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    overrides = TINY_OVERRIDES | {"img_size": 32}
    file = tmp_path_factory.mktemp("weights") / "encoder.safetensors"
    file.write_bytes(dump_encoder(shake(random_vit(TINY_VIT, overrides, 0)), TINY_VIT, overrides=overrides))
    return str(file)


def test_probe__tables_with_masks_by_hand(tmp_path, weights):
    make_table(tmp_path / "train-0.parquet", 40, size=(32, 32))
    make_table(tmp_path / "val-0.parquet", 7, size=(32, 32), seed=1)
    done = []
    prepared = Probe(weights, str(tmp_path))
    result = prepared.run(done.append)
    assert sum(done) == prepared.num_images == 47
    assert (result.image_size, result.num_bank, result.num_queries, result.refused) == (32, 40, 7, [])
    encoder = load_encoder(open(weights, "rb").read(), weights)  # noqa: SIM115
    source = open_source(str(tmp_path), "data", "--data")
    images = {split: [] for split in ("train", "val")}
    for unit in source.units:
        images[unit.split] += read_unit(source.root, unit)
    pixels = {
        split: torch.stack([torch.from_numpy(np.array(picture(image.data))).permute(2, 0, 1) for image in found])
        for split, found in images.items()
    }
    bank, queries = (encoder.cls_tokens(pixels[split]) for split in ("train", "val"))
    labels = {split: torch.tensor([int(image.label) for image in found]) for split, found in images.items()}
    assert result.knn_top1 == knn_accuracy(bank, labels["train"], queries=queries, query_labels=labels["val"])
    assert result.knn_chance == 4 / 7
    assert result.rank_me == pytest.approx(rank_me(queries), rel=1e-4)
    ious = []
    tokens = encoder.prefix(pixels["val"])
    for i, found in enumerate(
        above_mean(encoder.saliency(tokens, encoder.class_row(tokens, (4, 4)), grid_hw=(4, 4), prior="attention"))
    ):
        truth = np.array(picture(images["val"][i].mask)) == 255
        large = np.kron(found.numpy(), np.ones((8, 8), dtype=bool))
        ious.append((truth & large).sum() / (truth | large).sum())
    assert result.object_iou["attention"] == pytest.approx(np.mean(ious), abs=1e-6)
    assert 0 < result.object_iou["patch_contrast"] < 1


def picture(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def test_probe__holds_out_a_tenth_of_class_folders(tmp_path, weights):
    for name in ("a", "b"):
        make_folder(tmp_path / name, num_images=10, size=(70, 50), seed=ord(name))
    (tmp_path / "a" / "broken.jpg").write_bytes(b"no picture")
    result = Probe(weights, str(tmp_path), image_size=24).run()
    assert (result.image_size, result.num_bank + result.num_queries, len(result.refused)) == (24, 20, 1)
    assert result.num_queries in (1, 2)
    assert 0 <= result.knn_top1 <= 1
    assert result.object_iou == {}


def test_probe__without_labels_measures_rank_alone(tmp_path, weights):
    make_folder(tmp_path, num_images=12)
    result = Probe(weights, str(tmp_path)).run()
    assert (result.knn_top1, result.knn_chance, result.num_bank) == (None, None, 0)
    assert result.rank_me == pytest.approx(1)


def test_probe__refusals(tmp_path, weights):
    make_folder(tmp_path / "good", num_images=2)
    with pytest.raises(ConfigError, match=r"--image-size 33 must be a multiple of the encoder's patch of 8 px"):
        Probe(weights, str(tmp_path / "good"), image_size=33)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"no image to measure on; the first, a\.jpg: empty file"):
        Probe(weights, str(tmp_path / "bad")).run()


@pytest.mark.reports
def test_probe__refuses_masks_that_do_not_fit_or_are_lossy(tmp_path, weights):
    make_table(tmp_path / "val-0.parquet", 4, size=(40, 32))
    table = pq.read_table(tmp_path / "val-0.parquet")
    masks = [Image.open(io.BytesIO(mask)) for mask in table["mask"].to_pylist()]
    masks[0] = masks[0].transpose(Image.Transpose.ROTATE_90)
    files = [io.BytesIO() for _ in masks]
    for mask, file, kind in zip(masks, files, ("PNG", "JPEG", "PNG", "PNG"), strict=True):
        mask.save(file, kind)
    column = pa.array([file.getvalue() for file in files], pa.binary())
    pq.write_table(table.set_column(table.schema.get_field_index("mask"), "mask", column), tmp_path / "val-0.parquet")
    make_table(tmp_path / "train-0.parquet", 2, size=(40, 32))
    result = Probe(weights, str(tmp_path)).run()
    assert result.num_queries == 2
    reasons = [refusal["reason"] for refusal in result.refused]
    assert reasons[0] == "its label is of another size: 32 x 40 px, the upright photograph 40 x 32 px"
    assert reasons[1].startswith("its label is a JPEG inside, which changes ids")
