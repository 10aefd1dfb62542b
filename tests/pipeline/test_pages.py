"""Names and pages of a finished run: rebuilt from its counts, with nothing segmented or trained again."""

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.fixtures import Silent, transfgu
from transfgu_ray.engine.stream import Photo
from transfgu_ray.errors import ArtifactError
from transfgu_ray.models.model import load_model
from transfgu_ray.models.names import load_names, parse_names
from transfgu_ray.pipeline.pages import read_names, rebuild_pages, rename
from transfgu_ray.pipeline.run import run_stages
from transfgu_ray.reports.legend import legend
from transfgu_ray.runs.run import Run
from transfgu_ray.runs.stages import NAMES, STAGES
from transfgu_ray.serving.predict import Predictor, Wanted
from transfgu_ray.storage import Folder
from transfgu_ray.tracking.models import fetch_model

pytestmark = pytest.mark.ray
STAGES_AFTER = ("evaluate", "report")


@pytest.fixture
def run(finished: Run, tmp_path: Path) -> Run:
    """A copy of the finished run: VOC, four foreground concepts and the background of Eq. 8."""
    return Run.open(str(shutil.copytree(finished.folder.path, tmp_path / "run")), None)


def times(run: Run) -> dict[Path, int]:
    """Return the time of writing of each file that does not depend on names."""
    files = (path for path in Path(run.folder.path).rglob("*") if path.is_file())
    renamed = {"metrics.json", "report.html", "atlas.html", "names.yaml"}
    renamed |= {f"{stage}.{ending}" for stage in ("evaluate", "report") for ending in ("json", "files.json")}
    return {path: path.stat().st_mtime_ns for path in files if path.name not in renamed and "strip_" not in path.name}


def test_rename__rebuilds_scores_and_pages_and_segments_nothing(run: Run) -> None:
    before, metrics = times(run), run.folder.read_json("metrics.json")
    kinds = read_names(run).kinds
    rename(run, parse_names(b"0: animal\n1: animal\n2: null", "names.yaml", kinds))
    assert times(run) == before
    named = run.folder.read_json("metrics.json")
    assert named["concept_names"] == {"0": "animal", "1": "animal", "2": None}
    # Chance has the sizes of the named concepts; the others have clusters of their own.
    of_names, own = named["baselines"], metrics["baselines"]
    assert {name for name in own if of_names[name] != own[name]} == {"chance"}
    assert named["stages"] != metrics["stages"]
    assert "animal" in run.folder.read_bytes("report.html").decode()
    assert "0 · animal" in run.folder.read_bytes("atlas.html").decode()
    # All is up to date, with the new names.
    reporter = Silent()
    run_stages(run, STAGES_AFTER, address=None, reporter=reporter)
    assert reporter.done == {}
    assert run.manifest("evaluate")["names_sha256"] == run.manifest("report")["names_sha256"] is not None
    assert "names_sha256" not in run.manifest("train")
    # Without names, everything is as it was.
    rename(run, parse_names(b"{}", "names.yaml", kinds))
    assert run.folder.read_json("metrics.json") == metrics
    assert not run.folder.exists(NAMES)
    assert times(run) == before


def test_rename__before_evaluation_is_followed_by_evaluate(run: Run) -> None:
    metrics = run.folder.read_json("metrics.json")
    run.clear("report")
    run.folder.delete("evaluate.json")
    before = times(run)
    rename(run, parse_names(b"0: animal\n1: animal\n", "names.yaml", read_names(run).kinds))
    assert run.folder.read_json("metrics.json") == metrics
    run_stages(run, STAGES_AFTER, address=None, reporter=Silent())
    assert run.folder.read_json("metrics.json")["concept_names"] == {"0": "animal", "1": "animal"}
    after = times(run)
    assert all(after[path] == before[path] for path in before if path.parent.name in ("confusions", "extremes"))


def test_run_stages__names_that_were_changed_by_hand_are_followed(run: Run) -> None:
    run.folder.write_bytes(NAMES, b"1: cat\n")
    with pytest.raises(ArtifactError, match="evaluated with other names"):
        rebuild_pages(run)
    with pytest.raises(ArtifactError, match="other settings, photographs or names"):
        run_stages(run, ("report",), address=None, reporter=Silent())
    before, reporter = times(run), Silent()
    run_stages(run, STAGES_AFTER, address=None, reporter=reporter)
    assert list(reporter.done) == list(STAGES_AFTER)
    after = times(run)
    assert all(after[path] == before[path] for path in before if path.parent.name == "confusions")
    assert run.folder.read_json("metrics.json")["concept_names"] == {"1": "cat"}


def test_predictor__masks_follow_the_names(run: Run, voc: Path, tmp_path: Path) -> None:
    model = Folder(run.folder.uri_of("model"))
    photo = next((voc / "JPEGImages").iterdir())
    (raw,) = load_model(model).segment([Image.open(photo).convert("RGB")])
    kinds = read_names(run).kinds
    first, second = (int(c) for c in np.unique(raw)[:2])
    hide = next(c for c in range(len(kinds) - 1) if c not in (first, second))
    text = f"{first}: animal\n{second}: animal\n{hide}: null\n"
    rename(run, parse_names(text.encode(), "names.yaml", kinds))
    wanted = Wanted(probabilities=True)
    out, stems = str(tmp_path / "out"), {photo.name: "mask"}
    predictor = Predictor(model.uri, out, records="records", stems=stems, wanted=wanted, device="cpu", threads=1)
    predictor.process(0, [Photo(photo.name, photo.read_bytes(), None, None)])
    mask = np.asarray(Image.open(io.BytesIO((tmp_path / "out/masks/mask.png").read_bytes())))
    want = np.where(raw == second, first, np.where(raw == hide, len(kinds) - 1, raw))
    if kinds[second] == "none":
        want = np.where(np.isin(raw, (first, second)), second, raw)
    assert (mask == want).all()
    # A class that others were merged into has their shares, and the others have none.
    shares = {path.stem: np.asarray(Image.open(path)) for path in (tmp_path / "out/probabilities/mask").iterdir()}
    assert set(map(int, shares)) == set(predictor._names.class_of.tolist())
    assert np.abs(sum(share.astype(int) for share in shares.values()) - 255).max() <= len(shares)
    assert [entry["id"] for entry in legend(predictor._names)] == sorted(map(int, shares))


def test_evaluate__shows_the_best_and_the_worst_photographs(finished: Run) -> None:
    folder = finished.folder
    shown = {
        name: json.loads(folder.read_bytes(f"samples/{name}/sample.json"))["image_id"]
        for name in ("00", "01", "best_0", "worst_0")
    }
    # Of three photographs one is best and one is worst.
    assert not folder.exists("samples/best_1")
    assert shown["best_0"] != shown["worst_0"]
    for name in shown:
        for file in ("photo.jpg", "truth.png", "initial.png", "trained.png", "bootstrapped.png"):
            assert folder.exists(f"samples/{name}/{file}")
        prior, patches = (
            np.asarray(Image.open(io.BytesIO(folder.read_bytes(f"samples/{name}/{file}.png"))))
            for file in ("prior", "pseudo_label")
        )
        assert prior.shape == patches.shape == (8, 8)
        assert (prior.min(), prior.max()) == (0, 255)
    page = folder.read_bytes("report.html").decode()
    scores = [float(score) for score in re.findall(r"mIoU (\d+\.\d+) %", page)]
    # The two that the seed chose, then the best and the worst.
    assert len(scores) == 4
    assert scores[2] == max(scores) > scores[3] == min(scores)


@pytest.mark.slow
def test_names__names_merges_and_refuses(run: Run, tmp_path: Path) -> None:
    (tmp_path / "names.yaml").write_text("0: animal\n1: animal\n")
    (tmp_path / "wrong.yaml").write_text("77: animal\n")
    shutil.copytree(run.folder.path, tmp_path / "name")
    calls = {
        ("names", "name", "wrong.yaml"): (2, "77 is not a concept of this model"),
        ("names", "name", "names.yaml"): (0, "animal"),
        ("names", "nowhere", "names.yaml"): (2, "nowhere is no run folder"),
        ("names", "name", "no.yaml"): (2, "no.yaml cannot be read"),
        ("report", "name"): (0, "atlas.html"),
        ("concepts", "name", "name", "names.yaml"): (2, "is now `transfgu names RUN FILE`"),
    }
    for arguments, (code, words) in calls.items():
        process = transfgu(*arguments, cwd=tmp_path)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == code, out
        assert words in out
        assert "Traceback" not in out


def test_concepts__of_a_run_folder_called_name_is_the_stage(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.folder.path, tmp_path / "name")
    process = transfgu("concepts", "name", cwd=tmp_path)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    # Nothing to do: a run called name has its concepts.
    assert "next: transfgu labels " in out


@pytest.mark.slow
def test_report__of_a_whole_run_leads_on_to_its_use(run: Run) -> None:
    for following in ("next: look at report.html, then transfgu predict ", "next: transfgu run "):
        process = transfgu("report", run.folder.path)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, out
        assert following in out
        run.clear("register")


def test_run_stages__a_model_is_registered_once_by_its_names(run: Run) -> None:
    kinds, versions = read_names(run).kinds, {}
    for text in ("{0: animal, 1: animal}", "{}", "{0: animal, 1: animal}"):
        rename(run, parse_names(text.encode(), "names.yaml", kinds))
        reporter = Silent()
        registered = run_stages(run, STAGES.lasting, address=None, reporter=reporter)["register"]
        assert list(reporter.done) == ["register"]
        versions.setdefault(text, []).append(registered["model_version"])
        uri = f"models:/{registered['model_name']}/{registered['model_version']}"
        model = Folder(fetch_model(uri, registered["tracking_uri"]))
        assert load_names(model, kinds).of_concept == load_names(Folder(run.folder.uri_of("model")), kinds).of_concept
    # The same weights with the same names are the existing version.
    assert versions == {"{0: animal, 1: animal}": [1, 1], "{}": [2]}
