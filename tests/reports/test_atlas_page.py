"""Tests of atlas.html, on a run made without a network."""

import numpy as np
import pytest

from tests.reports.evaluated import HOSTILE, make_evaluated
from tests.reports.html_page import Page
from transfgu_ray.models.names import parse_names
from transfgu_ray.pipeline.pages import read_names, rebuild_pages, rename
from transfgu_ray.reports.atlas_page import _on_page, _place_labels, write_atlas
from transfgu_ray.runs.run import Run
from transfgu_ray.storage import Folder


def read_atlas(run):
    rebuild_pages(run)
    return Page(run.folder.read_bytes("atlas.html"))


def cards(page):
    return [attrs for tag, attrs in page.elements if tag == "li" and attrs.get("class") == "card"]


def test_atlas__shows_every_concept_with_its_class_size_neighbours_and_pictures(tmp_path):
    page = read_atlas(make_evaluated(tmp_path / "run"))
    assert [card["id"] for card in cards(page)] == [f"concept-{i}" for i in range(16)]
    assert [card["data-words"] for card in cards(page)][:2] == ["0 foreground zebra", "1 foreground turtle"]
    assert len(page.all("img")) == 16 * (6 + 3)
    assert page.all("img")[0]["alt"] == f"crop 1 of {HOSTILE}"
    assert "matched class zebra" in page.text
    assert "6.2 % of the patches" in page.text
    assert "confused with 1 25 %" in page.text
    links = [a for a in page.all("a") if "data-concept" in a]
    assert len(links) == len(page.all("circle")) == 16
    assert links[0]["aria-label"].startswith("concept 0 · matched to zebra · foreground · ")
    assert {option.get("value") for option in page.all("option")} == {"", None}
    assert "example pictures are shown" not in page.text
    for circle in page.all("circle"):
        x, y, radius = (float(circle[name]) for name in ("cx", "cy", "r"))
        assert radius <= x <= 560 - radius
        assert radius <= y <= 380 - radius


def test_on_page__distances_are_true():
    places = np.array([[0.0, 0.0], [3.0, 1.0], [6.0, 0.0], [2.0, 0.5]])
    x, y, radius = _on_page(places, np.array([100, 25, 1, 0]))
    for i in range(4):
        for j in range(i):
            want = np.linalg.norm(places[i] - places[j]) * (x[2] - x[0]) / 6
            assert np.hypot(x[i] - x[j], y[i] - y[j]) == pytest.approx(want)
    assert y[1] < y[0], "up is up"
    assert radius.tolist() == [15, 7.5, 5, 5]


def test_place_labels__stand_where_nothing_else_does():
    five = np.full(5, 100.0)
    labels = _place_labels(five, five, radius=np.full(5, 10.0), texts=["0", "1", "2", "3", "4"])
    # 2 px from the disc's edge, and half a letter of 9.5 px or half a line of 16 px.
    assert labels == [
        ("100.0", "80.0", "0"),
        ("100.0", "120.0", "1"),
        ("116.8", "100.0", "2"),
        ("83.2", "100.0", "3"),
        None,
    ]
    # No room above at the upper edge; another disc below; the map ends on the right.
    x, y, radius = np.array([540.0, 540.0]), np.array([10.0, 26.0]), np.array([8.0, 8.0])
    assert _place_labels(x, y, radius=radius, texts=["far", "low"]) == [
        ("515.8", "10.0", "far"),
        ("540.0", "44.0", "low"),
    ]
    # A text that does not fit leaves the number.
    assert _place_labels(x, y, radius=radius, texts=["far", "w" * 99])[1] == ("540.0", "44.0", "1")


def test_atlas__of_a_run_without_labels_has_no_classes(tmp_path):
    page = read_atlas(make_evaluated(tmp_path / "run", labels=False))
    assert "matched" not in page.text
    assert len(cards(page)) == 16


@pytest.mark.parametrize("num_concepts", [171, pytest.param(1000, marks=pytest.mark.slow)])
def test_atlas__of_many_concepts_keeps_below_8_mb_and_says_what_it_leaves_out(tmp_path, num_concepts):
    # Page asserts the size.
    page = read_atlas(make_evaluated(tmp_path / "run", num_concepts, labels=False))
    assert len(cards(page)) == num_concepts
    shown = len(page.all("img"))
    assert shown >= 2 * num_concepts
    assert (f"{shown} of {9 * num_concepts} example pictures are shown" in page.text) == (shown < 9 * num_concepts)


def test_atlas__shows_names_of_concepts(tmp_path):
    run = make_evaluated(tmp_path / "run", labels=False)
    rename(run, parse_names(b"2: <b>sky\n5: <b>sky\n7: null\n", "names.yaml", read_names(run).kinds))
    page = read_atlas(run)
    assert "Concepts have names: the model's 16 classes become 14; 1 hidden." in page.text
    assert "2 · <b>sky" in page.text
    assert "one class with 5" in page.text
    assert "7 · hidden" in page.text
    fills = [circle["fill"] for circle in page.all("circle")]
    assert fills[2] == fills[5] != fills[7] == "#000000"


def test_atlas__outlasts_a_disk_that_fails_for_a_moment(tmp_path, request):
    run = make_evaluated(tmp_path / "run")
    request.getfixturevalue("failing_disk")
    assert write_atlas(Run(Folder(run.folder.uri), run.config)) > 0
