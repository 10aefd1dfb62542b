"""A whole run and a prediction in folders whose names mean something in a URI, a glob or a shell."""

from pathlib import Path

import pytest

from tests.builders import make_folder
from tests.fixtures import make_run
from tests.serving.test_predict import run_predict
from tests.tracking.test_local_store import ODD
from transfgu_ray.models.model import load_model_config
from transfgu_ray.storage import Folder
from transfgu_ray.tracking.models import fetch_model

pytestmark = [pytest.mark.ray, pytest.mark.reports, pytest.mark.long]


def test_run__in_a_folder_of_any_name_leaves_everything_there(tmp_path: Path, local_ray: None) -> None:
    here = tmp_path / "work" / ODD
    data = make_folder(here / "photos #1?", num_images=4)
    run = make_run(here / "run", data, "train.round_epochs=[1]", "evaluate.baselines=[]")
    assert {path.name for path in here.iterdir()} == {"photos #1?", "run", "mlflow.db", "mlartifacts"}
    assert [path.name for path in (tmp_path / "work").iterdir()] == [ODD.partition("/")[0]]
    registered = run.require("register")
    logged = {path.name for path in (here / "mlartifacts").rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.json", "report.html", "decoder.safetensors"} <= logged
    fetched = fetch_model(f"models:/{registered['model_name']}/1", registered["tracking_uri"])
    assert Path(fetched).is_relative_to(here / "mlartifacts")
    assert load_model_config(Folder(fetched)) == load_model_config(Folder(run.folder.uri_of("model")))

    out = here / "out%20?"
    assert run_predict(run, data, out)["rows_out"] == 4
    assert sorted(path.stem for path in (out / "masks").iterdir()) == sorted(path.stem for path in data.iterdir())
    assert {path.name for path in here.iterdir()} == {"photos #1?", "run", "mlflow.db", "mlartifacts", "out%20?"}
