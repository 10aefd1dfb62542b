"""Photographs of many bands, from features to masks: as if their red, green and blue had been cut out beforehand."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tifffile
from PIL import Image

from tests.builders import TINY_OVERRIDES, TINY_VIT, scene, shake
from tests.fixtures import make_run
from tests.models.test_model import CONFIG, _saved
from transfgu_ray.algorithms.encoder.checkpoints import dump_encoder, random_vit
from transfgu_ray.engine.progress import Progress
from transfgu_ray.engine.session import Resources
from transfgu_ray.engine.signs import Sign
from transfgu_ray.engine.stream import Photo
from transfgu_ray.images import to_tones
from transfgu_ray.models.model import load_model_config
from transfgu_ray.pretraining.config import PretrainDataConfig
from transfgu_ray.pretraining.copies import open_copies, read_copies
from transfgu_ray.pretraining.copying import Copying, _copy_unit, copy_images
from transfgu_ray.pretraining.probe import Probe
from transfgu_ray.pretraining.sources import open_source
from transfgu_ray.serving import serve
from transfgu_ray.serving.predict import Predictor, Wanted
from transfgu_ray.storage import Folder

pytestmark = pytest.mark.reports
BANDS = (4, 3, 2)


def satellite(path: Path, number: int) -> tuple[Path, Path]:
    """A photograph of five bands of 12 bits, and the same with its red, green and blue alone."""
    rng = np.random.default_rng(number)
    colour = np.asarray(scene((96, 72), rng)[0]).astype(np.uint16) * 16
    bands = np.concatenate([rng.integers(0, 4096, (72, 96, 1), np.uint16), colour[..., ::-1], colour[..., :1]], axis=2)
    many, plain = (path / name / f"{number}.tif" for name in ("many", "plain"))
    for file in (many, plain):
        file.parent.mkdir(exist_ok=True, parents=True)
    tifffile.imwrite(many, bands, photometric="minisblack", planarconfig="contig", compression="zlib")
    Image.fromarray(to_tones(bands[..., [band - 1 for band in BANDS]])).save(plain)
    return many, plain


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.usefixtures("local_ray")
def test_run__learns_from_the_chosen_bands(tmp_path):
    for number in range(5):
        satellite(tmp_path, number)
    many = make_run(tmp_path / "m", tmp_path / "many", f"data.bands={list(BANDS)}")
    plain = make_run(tmp_path / "p", tmp_path / "plain")
    for name in ("encoder", "decoder"):
        assert many.folder.read_bytes(f"model/{name}.safetensors") == plain.folder.read_bytes(
            f"model/{name}.safetensors"
        )
    assert load_model_config(Folder(many.folder.uri_of("model"))).bands == BANDS
    assert load_model_config(Folder(plain.folder.uri_of("model"))).bands is None


def test_copies_and_probe__take_the_chosen_bands(tmp_path):
    for number in range(4):
        satellite(tmp_path / "data", number)
    seen = []
    for name, bands in (("many", BANDS), ("plain", None)):
        source = open_source(str(tmp_path / "data" / name), "data.root", "--data")
        out = tmp_path / name
        copying = Copying(str(out), PretrainDataConfig(source_size=32, bands=bands), "now")
        for i, unit in enumerate(source.units):
            what = json.dumps([source.root.uri, asdict(unit)])
            _copy_unit(pa.table({"unit": [i], "what": [what]}), copying, Sign("copies"))
        resources = Resources(1, 1, 1, "cpu", 1, None)
        stats = copy_images(copying, [source], resources=resources, progress=Progress())
        assert (stats.images, stats.refused) == (4, [])
        copies = open_copies(Folder(str(out)), seed=0, num_val=1)
        seen.append(read_copies(Folder(str(out)), copies.places(np.arange(4))))
    assert np.array_equal(*seen)
    weights = tmp_path / "encoder.safetensors"
    overrides = TINY_OVERRIDES | {"img_size": 32}
    weights.write_bytes(dump_encoder(shake(random_vit(TINY_VIT, overrides, 0)), TINY_VIT, overrides=overrides))
    ranks = [
        Probe(str(weights), str(tmp_path / "data" / name), bands=bands).run().rank_me
        for name, bands in (("many", BANDS), ("plain", None))
    ]
    assert ranks[0] == ranks[1]


def test_predict_and_serve__take_the_bands_of_the_model(tmp_path, monkeypatch):
    many, plain = satellite(tmp_path, 0)
    masks, answers = [], []
    monkeypatch.setattr(serve, "_keep_to_loopback", lambda: None)
    for file, bands in ((many, BANDS), (plain, None)):
        model = tmp_path / f"model {bands}"
        _saved(model, replace(CONFIG, bands=bands))
        assert load_model_config(Folder(str(model))).bands == bands
        out, data = tmp_path / f"out {bands}", file.read_bytes()
        predictor = Predictor(
            str(model), str(out), records=".units", stems={"a.tif": "a"}, wanted=Wanted(), device="cpu", threads=1
        )
        predictor.process(0, [Photo("a.tif", data, None, None)])
        masks.append((out / "masks/a.png").read_bytes())
        server = serve.PhotoServer(str(model), "m", limits=serve.Limits(), device="cpu", threads=1)
        answers.append(server._segment(data))
    assert masks[0] == masks[1]
    assert answers[0] == answers[1]
    with pytest.raises(serve._Refusal, match="The photograph cannot be read: a TIFF of 5 bands") as refused:
        server._segment(many.read_bytes())
    assert refused.value.status == 422
