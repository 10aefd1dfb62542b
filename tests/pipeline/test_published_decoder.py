"""A run with a published decoder: nothing is trained, and all later stages work."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.algorithms.rounds.test_published import published_state, saved
from tests.builders import TINY_OVERRIDES, TINY_VIT, random_images, tiny_encoder
from tests.fixtures import Silent
from transfgu_ray.algorithms.encoder.checkpoints import dump_encoder
from transfgu_ray.config.presets import get_preset
from transfgu_ray.config.run import build_config
from transfgu_ray.errors import ConfigError, WeightsError
from transfgu_ray.models.model import load_model
from transfgu_ray.models.weights import ENCODER
from transfgu_ray.pipeline.published_decoder import import_decoder
from transfgu_ray.pipeline.run import run_stages
from transfgu_ray.runs.run import Run
from transfgu_ray.runs.tables import build_table, concepts_schema, to_parquet
from transfgu_ray.storage import Folder


def with_decoder(labelled: Run, folder: Path, file: Path) -> Run:
    """A copy of the run, to be completed with a decoder from a file."""
    copy = str(shutil.copytree(labelled.folder.path, folder))
    return Run.open(copy, build_config(labelled.config, None, [f"train.decoder_weights={file}"]), overwrite=True)


@pytest.mark.ray
def test_run__takes_a_published_decoder(labelled: Run, tmp_path: Path) -> None:
    file = tmp_path / "coco_decoder.pt"
    file.write_bytes(saved(published_state(num_classes=4)))
    run, reporter = with_decoder(labelled, tmp_path / "run", file), Silent()
    run_stages(run, ("train", "evaluate", "report"), address=None, reporter=reporter)
    assert reporter.done["train"] == 0, "no epoch"
    manifest = run.require("train")
    assert manifest["imported"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (manifest["epochs"], manifest["rows_in"]) == (0, 0)
    assert "Nothing was trained" in run.folder.read_bytes("report.html").decode()
    model = Folder(run.folder.uri_of("model"))
    round_0, last = (load_model(model, decoder=name) for name in ("decoder_round_0", "decoder"))
    assert last.config.norm_eps == 1e-5
    images = random_images(1, 32, 32)
    assert torch.equal(round_0.class_maps(images), last.class_maps(images))
    assert torch.equal(last.decoder.cls_emb, published_state(num_classes=4)["cls_emb"])
    # Without the file nothing is run again; another file makes another model.
    file.unlink()
    run_stages(run, ("train",), address=None, reporter=Silent())
    file.write_bytes(saved(published_state(num_classes=4, seed=1)))
    run_stages(run, ("train",), address=None, reporter=Silent(), overwrite=True)
    assert run.require("train")["imported"] != manifest["imported"]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"num_classes": 5}, r"with 5 classes \(concepts\.num_concepts\), but this run has 4"),
        ({"num_classes": 4, "layers": 1}, r"with 1 layers \(train\.decoder_layers\), but this run has 2"),
        ({"num_classes": 4, "d": 48}, r"with 48 dimensions of a token \(encoder\.name\), but this run has 24"),
        (None, r"train\.decoder_weights=.*d\.pt cannot be read; give a published"),
    ],
)
@pytest.mark.ray
def test_run__refuses_a_decoder_that_does_not_fit(
    labelled: Run, tmp_path: Path, made: dict[str, int] | None, message: str
) -> None:
    file = tmp_path / "d.pt"
    if made is not None:
        file.write_bytes(saved(published_state(**made)))
    run = with_decoder(labelled, tmp_path / "run", file)
    with pytest.raises((ConfigError, WeightsError), match=message):
        run_stages(run, ("train",), address=None, reporter=Silent())
    assert run.manifest("train") is None


def test_import_decoder__puts_the_background_last(tmp_path: Path) -> None:
    state = published_state(num_classes=5)
    (tmp_path / "voc_decoder.pt").write_bytes(saved(state))
    settings = (f"train.decoder_weights={tmp_path}/voc_decoder.pt", "data.region_mode=things_only")
    config = build_config(get_preset("tiny_cpu"), None, ["concepts.num_concepts=4", *settings])
    run = Folder(str(tmp_path / "run"))
    run.write_bytes(ENCODER, dump_encoder(tiny_encoder().vit, TINY_VIT, overrides=TINY_OVERRIDES))
    columns = {"concept_id": range(4), "kind": ["foreground"] * 4, "centroid": np.zeros((4, 24), "f4")}
    table = build_table(columns | {"num_crops": [1] * 4}, concepts_schema(24))
    run.write_bytes("concepts.parquet", to_parquet(table, {}))
    import_decoder(run, config, "")
    model = load_model(Folder(run.uri_of("model")))
    assert model.config.kinds == ("foreground",) * 4 + ("none",)
    # The published code puts it first.
    order = [1, 2, 3, 4, 0]
    assert torch.equal(model.decoder.cls_emb, state["cls_emb"][:, order])
    assert torch.equal(model.decoder.mask_norm.bias, state["mask_norm.bias"][order])
