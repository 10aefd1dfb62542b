import hashlib

import pytest
import torch

from tests.builders import small_resnet
from transfgu_ray.algorithms.encoder.resnet import dump_resnet, random_resnet
from transfgu_ray.config.run import RunConfig, build_config
from transfgu_ray.datasets.listing import Listing
from transfgu_ray.datasets.photographs import ImageRef
from transfgu_ray.errors import WeightsError
from transfgu_ray.models.weights import BACKBONE, backbone_file_sha256, load_run_backbone, resolve_backbone
from transfgu_ray.pipeline.inputs import stage_inputs
from transfgu_ray.runs.run import Run
from transfgu_ray.runs.stages import STAGES
from transfgu_ray.storage import Folder


def _config(weights):
    return build_config(RunConfig(), None, ["train.backbone=resnet50_fpn", f"train.backbone_weights={weights}"])


def test_resolve_backbone__the_prior_needs_none(tmp_path):
    assert resolve_backbone(RunConfig()) is None
    assert load_run_backbone(Folder(str(tmp_path)), RunConfig(), "cpu") is None
    assert backbone_file_sha256(RunConfig().train) is None


def test_resolve_backbone__what_a_run_keeps_is_what_its_file_or_seed_gives(tmp_path, monkeypatch):
    monkeypatch.setattr("transfgu_ray.algorithms.encoder.resnet._build", small_resnet)
    data = resolve_backbone(_config("random"))
    assert data == dump_resnet(random_resnet(seed=0))
    (tmp_path / "resnet.safetensors").write_bytes(data)
    config = _config(tmp_path / "resnet.safetensors")
    assert resolve_backbone(config) == data
    folder = Folder(str(tmp_path / "run"))
    folder.write_bytes(BACKBONE, data)
    kept = load_run_backbone(folder, config, "cpu").resnet
    assert torch.equal(kept.layer4[0].conv2.weight, random_resnet(seed=0).layer4[0].conv2.weight)
    assert not kept.training


def test_resolve_backbone__refuses_what_cannot_be_read(tmp_path):
    with pytest.raises(WeightsError, match=r"train\.backbone_weights=.*gone\.pth cannot be read; give 'random' or"):
        resolve_backbone(_config(tmp_path / "gone.pth"))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(WeightsError, match=r"text\.pth is not a checkpoint of plain tensors"):
        resolve_backbone(_config(tmp_path / "text.pth"))


def test_backbone_file_sha256__of_files_that_are_there(tmp_path):
    (tmp_path / "resnet.pth").write_bytes(b"some weights")
    assert backbone_file_sha256(_config(tmp_path / "resnet.pth").train) == hashlib.sha256(b"some weights").hexdigest()
    assert backbone_file_sha256(_config(tmp_path / "gone.pth").train) is None
    assert backbone_file_sha256(_config("random").train) is None


def teststage_inputs__another_file_of_the_backbone_changes_training_and_what_follows(tmp_path):
    config, listing = _config(tmp_path / "resnet.pth"), Listing((ImageRef("a.jpg", None, 3),))
    run = Run(Folder(str(tmp_path / "run")), config)
    (tmp_path / "resnet.pth").write_bytes(b"some weights")
    one = stage_inputs(run, listing)
    (tmp_path / "resnet.pth").write_bytes(b"other weights")
    two = stage_inputs(run, listing)
    changed = [
        stage for stage in STAGES.lasting if run.fingerprint(stage, one[stage]) != run.fingerprint(stage, two[stage])
    ]
    assert changed == ["train", "evaluate", "report", "register"]
    # Labels are the same as on the prior: only later stages are computed again.
    assert stage_inputs(Run(run.folder, RunConfig()), listing)["labels"] == two["labels"]
    # Where the file is gone, the run keeps the one it was trained with.
    run.write_manifest("train", "", {"backbone_file_sha256": backbone_file_sha256(config.train)})
    (tmp_path / "resnet.pth").unlink()
    assert stage_inputs(run, listing) == two
