"""Tests of report.html, on a run made without a network."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from tests.reports.evaluated import HOSTILE, make_evaluated
from tests.reports.html_page import Page
from transfgu_ray.errors import ArtifactError
from transfgu_ray.models.model import load_model_config
from transfgu_ray.models.names import Names
from transfgu_ray.pipeline.pages import rebuild_pages
from transfgu_ray.reports import run_page as report
from transfgu_ray.reports.run_figures import class_confusion, largest_confusions
from transfgu_ray.reports.run_page import matched_colours
from transfgu_ray.storage import Folder

PANELS = ["photograph", "prior attention", "pseudo-label", "initial", "trained", "bootstrapped", "truth"]


def read_report(run):
    rebuild_pages(run)
    return Page(run.folder.read_bytes("report.html"))


def test_report__shows_scores_photographs_classes_losses_and_stages(tmp_path):
    run = make_evaluated(tmp_path / "run")
    page = read_report(run)
    titles = re.findall(r"<h[123][^>]*>([^<]*)", page.source)
    assert titles == [
        "run", "Scores", "Photographs", "Chosen by the seed", "Best scored", "Worst scored", "Classes", "Confusion",
        "Losses", "Stages", "Refused photographs (1)", "Configuration",
    ]  # fmt: skip
    # Concept i has 70 of 130 pixels of class i; 60 are of the next concept, which is another class.
    assert "bootstrapped 38.97 [" in page.text
    assert "majority class" in page.text
    # The two photographs are the halves, and by their own matches most concepts are of other classes.
    assert "unused concepts initial 38.97" in page.text
    assert re.search(r"bootstrapped 38\.97 \d+\.\d\d 33\.33 21\.67 0 ", page.text)
    # Each photograph by the match of both: 60 of 100 pixels, and 10 of 30.
    assert f"{HOSTILE} · mIoU 45.0 %" in page.text.replace("&quot;", '"')
    assert "b.jpg · mIoU 21.7 %" in page.text
    images = page.all("img")
    assert [image["alt"] for image in images[:7]] == [f"{panel} of {HOSTILE}" for panel in PANELS]
    photographs, figures = images[: 4 * 7], images[4 * 7 :]
    assert {(image["width"], image["height"]) for image in photographs} == {("270", "180")}
    assert len(figures) == 4
    assert figures[0]["alt"].startswith("Confusion matrix of 16 classes;")
    assert figures[1]["alt"] == "loss: 3 in the first epoch, 2.7 in the last"
    assert "zebra turtle 46.2 60" in page.text, "the largest confusions are in a table"
    assert "all 1 6.2" in page.text, "refusals and seconds of all stages"
    assert "no <b>picture</b>" in page.text
    assert "train.omega_1 1.0 0.5" in page.text, "what differs from the preset"
    assert "None of" not in page.text


def test_report__figures_are_opaque_and_sharp_on_a_phone(tmp_path):
    figures = [
        image["src"]
        for image in read_report(make_evaluated(tmp_path / "run")).all("img")
        if "image/png" in image["src"]
    ]
    assert len(figures) == 4
    for source in figures:
        picture = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        # 360 CSS px at three device pixels each.
        assert picture.width >= 1080
        # Legible on a dark page too: nothing shines through.
        assert picture.convert("RGBA").getextrema()[3] == (255, 255)
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_report__of_a_run_without_labels_says_that_nothing_was_scored(tmp_path):
    page = read_report(make_evaluated(tmp_path / "run", labels=False))
    assert "Nothing was scored: dataset folder has no labels." in page.text
    assert [image["alt"] for image in page.all("img")[:6]] == [f"{panel} of {HOSTILE}" for panel in PANELS[:-1]]
    assert len(page.all("img")) == 2 * 6 + 3, "photographs and losses"
    assert "mIoU" not in page.text
    assert "Confusion" not in page.text
    assert "concept 15" in page.text, "colours are of concepts"


def test_report__without_samples_says_so(tmp_path):
    run = make_evaluated(tmp_path / "run", num_samples=0)
    page = read_report(run)
    assert "No samples were requested." in page.text
    assert len(page.all("img")) == 4, "figures alone"
    assert not run.folder.exists("atlas.html")
    assert "atlas.html" not in page.source


def test_report__is_the_same_each_time_and_of_whole_artifacts_only(tmp_path):
    run = make_evaluated(tmp_path / "run")
    rebuild_pages(run)
    before = run.folder.read_bytes("report.html"), run.folder.read_bytes("atlas.html")
    run.folder.delete("report.html")
    rebuild_pages(run)
    assert (run.folder.read_bytes("report.html"), run.folder.read_bytes("atlas.html")) == before
    run.folder.write_bytes("metrics.json", b"{}")
    with pytest.raises(ArtifactError, match=r"metrics.json: not what stage evaluate wrote"):
        rebuild_pages(run)


def test_report__of_a_run_that_was_not_evaluated_is_refused(tmp_path):
    run = make_evaluated(tmp_path / "run")
    run.folder.delete("evaluate.json")
    with pytest.raises(ArtifactError, match="no finished stage evaluate"):
        rebuild_pages(run)


def test_report__photographs_that_would_make_it_too_large_are_left_out_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_PHOTO_BYTES", 350_000)
    run = make_evaluated(tmp_path / "run", num_samples=30)
    page = read_report(run)
    shown = (len(page.all("img")) - 4) // 7
    assert 3 <= shown < 32
    assert f"{32 - shown} more are in the run's folder samples" in page.text
    assert "Best scored" in page.text, "every group shows its first ones"
    assert "Worst scored" in page.text


def test_matched_colours__follow_names(tmp_path):
    run = make_evaluated(tmp_path / "run")
    model, metrics = load_model_config(Folder(run.folder.uri_of("model"))), run.folder.read_json("metrics.json")
    plain = matched_colours(model, metrics)
    assert (plain["pred"] == plain["truth"]).all(), "concept i is class i"
    unscored = metrics | {"per_class": None}
    named = matched_colours(model, unscored, Names(model.kinds, {1: "a", 3: "a", 2: None}))["pred"]
    assert named[1].tolist() == named[3].tolist() != [0, 0, 0]
    assert named[2].tolist() == [0, 0, 0]
    assert len({tuple(colour) for colour in named.tolist()}) == 15
    # In a scored run, hidden concepts are black too and have no class.
    metrics["per_class"][2]["concepts"] = []
    assert matched_colours(model, metrics, Names(model.kinds, {2: None}))["pred"][2].tolist() == [0, 0, 0]


def test_class_confusion__concepts_of_one_class_and_of_none_worked_by_hand():
    confusion = np.array([[5, 3, 2, 0], [1, 0, 4, 7]])
    by_class = class_confusion(confusion, np.array([0, 0, -1, 1]))
    assert by_class.tolist() == [[8, 0, 2], [1, 7, 4]]
    assert largest_confusions(by_class, ["cat", "dog"], most=2) == [
        {"truth": "dog", "taken_for": "no class", "pixels": 4, "share": 4 / 12},
        {"truth": "cat", "taken_for": "no class", "pixels": 2, "share": 2 / 10},
    ]
