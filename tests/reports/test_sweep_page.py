import json
import re
from html.parser import HTMLParser
from itertools import product

import numpy as np
import pytest
from PIL import Image

from tests.builders import make_sweep, make_trial
from transfgu_ray.errors import StorageError
from transfgu_ray.models.model import FORMAT
from transfgu_ray.reports import sweep_page as sweep_report
from transfgu_ray.reports.sweep_figures import setting_axes
from transfgu_ray.reports.sweep_page import write_sweep_report
from transfgu_ray.reports.sweep_tables import evidence
from transfgu_ray.storage import Folder

HOSTILE = "<script>alert('$x$')</script>"
SPACE = {"train.omega_1": [0.0, 0.3, 1.0], "train.alpha": [[0.03, 0.1], [0.0, 0.0]]}
POINTS = [{"train.omega_1": omega, "train.alpha": alpha} for omega, alpha in product(*SPACE.values())]


class _Page(HTMLParser):
    """Text and images of a page, and whether every element is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.words, self.images, self.open = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in ("img", "link", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))

    def alts(self, start):
        return [image["alt"] for image in self.images if image["alt"].startswith(start)]


def _render(tmp_path, sweep):
    write_sweep_report(Folder(str(tmp_path)), sweep)
    raw = (tmp_path / "sweep.html").read_bytes()
    assert len(raw) < 8e6
    page = _Page(raw.decode())
    assert all(image["alt"] and image["src"].startswith("data:image/") for image in page.images)
    assert not re.search(r"\b(None|nan|Undefined)\b", page.text)
    return page


def _make_run(path, concepts, names=("cat", "dog"), photos=2, seed=0):
    """Write the parts of a run folder that the page reads, with photographs of noise."""
    (path / "model").mkdir(parents=True)
    model = {"format": FORMAT, "image_size": [8, 8], "kinds": ["any"] * concepts, "background_id": None}
    model |= {"decoder_layers": 1, "decoder_heads": 1, "precision": "float32", "weights_sha256": ""}
    (path / "model/config.json").write_text(json.dumps(model))
    rows = [{"name": name, "kind": "thing", "iou": 0.5, "concepts": [i]} for i, name in enumerate(names)]
    (path / "metrics.json").write_text(json.dumps({"per_class": rows or None}))
    rng = np.random.default_rng(seed)
    for i in range(photos):
        sample = path / f"samples/{i:02}"
        sample.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(sample / "photo.jpg")
        for name in ("bootstrapped", *(["truth"] if names else [])):
            Image.fromarray(rng.integers(0, 2, (8, 8), dtype=np.uint8)).save(sample / f"{name}.png")
    return str(path)


@pytest.fixture
def trials(tmp_path):
    """Six trials; the best and the worst by the score have run folders."""
    trials = [make_trial(i, point, i / 10, 0.4 + i / 100) for i, point in enumerate(POINTS)]
    for i in (0, 5):
        trials[i]["run"] = _make_run(tmp_path / f"trials/{i}", concepts=3)
    return trials


@pytest.fixture
def no_pixels(monkeypatch):
    """Figures are made but not rendered, which is the slow part of a page."""
    monkeypatch.setattr(sweep_report, "figure_png", lambda figure: "")


def test_write_sweep_report__says_that_no_labels_were_used(tmp_path, trials):
    page = _render(tmp_path, make_sweep(SPACE, trials, evidence=evidence(trials)))
    assert "no labels were used" in page.text
    assert "validation labels decided" not in page.text
    assert "6 finished, 0 stopped by the scheduler, 0 failed." in page.text
    assert f"transfgu predict {trials[5]['run']} --images DIR --out DIR" in page.text
    assert "score 0.500 , mIoU 45.00 %" in page.text
    assert "train.alpha [0.0, 0.0]" in page.text
    assert "score 1.00 0.00 05050505 45.00" in page.text, "the same order as by labels, without regret"
    assert len(page.alts("Parallel coordinates: 6 trials")) == 1
    assert page.alts("score of each") == ["score of each trial against omega_1", "score of each trial against alpha"]
    assert len(page.alts("Score of each finished trial against its mIoU")) == 1
    assert page.alts("Photograph") == [
        f"Photograph {number}: {title}"
        for number in (1, 2)
        for title in ("photograph", "best trial 05050505", "worst trial 00000000", "truth")
    ]
    assert page.text.count("cat") == 1


@pytest.mark.usefixtures("no_pixels")
def test_write_sweep_report__says_that_labels_decided(tmp_path, trials):
    trials[2]["miou"] = 0.9
    page = _render(tmp_path, make_sweep(SPACE, trials, objective="miou"))
    assert "validation labels decided" in page.text
    assert "no labels were used" not in page.text
    assert f"Trial {trials[2]['id']} " in page.text
    assert page.alts("mIoU, % of each trial against omega_1")
    assert "The run folder of the best trial 02020202 has no masks to show." in page.text
    assert page.alts("Photograph 1: worst")


def test_write_sweep_report__what_others_named_is_escaped(tmp_path, trials):
    space = {f"train.{HOSTILE}": [HOSTILE, "$\\frac$"]} | SPACE
    for trial in trials:
        trial["point"] = {f"train.{HOSTILE}": HOSTILE} | trial["point"]
        trial["components"] = {HOSTILE: 0.5}
    trials[1] |= {"status": "failed", "error": HOSTILE}
    names = {"name": HOSTILE, "preset": HOSTILE, "dataset": HOSTILE, "base": {HOSTILE: HOSTILE}}
    page = _render(tmp_path, make_sweep(space, trials, evidence=evidence(trials), **names))
    assert page.text.count(HOSTILE) >= 8
    assert "<script" not in (tmp_path / "sweep.html").read_text()


@pytest.mark.usefixtures("no_pixels")
def test_write_sweep_report__missing_masks_are_reported(tmp_path, trials):
    (tmp_path / "trials/5/metrics.json").write_text("{")
    (tmp_path / "trials/0/samples/01/photo.jpg").unlink()
    page = _render(tmp_path, make_sweep(SPACE, trials))
    assert page.alts("Photograph") == []
    for name in ("best trial 05050505", "worst trial 00000000"):
        assert f"The run folder of the {name} has no masks to show." in page.text


@pytest.mark.usefixtures("no_pixels")
def test_write_sweep_report__a_disk_that_does_not_answer_has_no_missing_masks(tmp_path, trials, request):
    folder = Folder(str(tmp_path))
    request.getfixturevalue("dead_disk")
    with pytest.raises(StorageError, match=r"the storage does not answer: .*/trials/"):
        write_sweep_report(folder, make_sweep(SPACE, trials))


@pytest.mark.usefixtures("no_pixels")
def test_write_sweep_report__a_photograph_without_a_mask_keeps_the_others(tmp_path, trials):
    (tmp_path / "trials/0/samples/01/bootstrapped.png").unlink()
    page = _render(tmp_path, make_sweep(SPACE, trials))
    assert page.alts("Photograph 2") == [
        f"Photograph 2: {title}" for title in ("photograph", "best trial 05050505", "truth")
    ]


@pytest.mark.usefixtures("no_pixels")
def test_write_sweep_report__trials_that_show_other_photographs_are_not_compared(tmp_path, trials):
    trials[0]["run"] = _make_run(tmp_path / "other", concepts=3, seed=1)
    page = _render(tmp_path, make_sweep(SPACE, trials))
    assert page.alts("Photograph") == []
    assert "have no photograph in common" in page.text


@pytest.mark.usefixtures("no_pixels")
def test_write_sweep_report__nothing_scored(tmp_path, trials):
    for trial in trials:
        trial |= {"miou": None, "pixel_accuracy": None}
        trial["run"] = _make_run(tmp_path / trial["id"], concepts=3, names=())
    page = _render(tmp_path, make_sweep(SPACE, trials, split=None, dataset="folder"))
    assert "not scored: no finished trial has an mIoU" in page.text
    assert "mIoU, %" not in page.text
    assert "only show how good the choice is" not in page.text
    assert page.alts("Score of each") == []
    assert [alt.partition(": ")[2] for alt in page.alts("Photograph 1")] == [
        "photograph", "best trial 05050505", "worst trial 00000000"
    ]  # fmt: skip


@pytest.mark.usefixtures("no_pixels")
def test_write_sweep_report__one_trial(tmp_path, trials):
    page = _render(tmp_path, make_sweep(SPACE, trials[5:]))
    assert "A sweep of 1 trial over 2 settings" in page.text
    assert "not scored: finished trials with an mIoU: 1;" in page.text
    assert [image["alt"] for image in page.images] == [
        f"Photograph {number}: {title}" for number in (1, 2) for title in ("photograph", "best trial 05050505", "truth")
    ]


def test_write_sweep_report__one_setting_and_stopped_and_failed_trials(tmp_path, trials):
    space = {"train.omega_1": {"low": 0.01, "high": 1.0, "log": True}}
    for trial, omega in zip(trials, (0.01, 0.1, 1.0, 0.5, 0.2, 0.3), strict=True):
        trial["point"] = {"train.omega_1": omega}
    trials[1] |= {"status": "stopped", "miou": None}
    trials[2] |= {"status": "failed", "score": None, "miou": None, "components": None, "error": "It broke & ended."}
    trials[3] |= {"status": "failed", "score": None, "miou": None, "components": None, "num_concepts": None}
    page = _render(tmp_path, make_sweep(space, trials))
    assert "3 finished, 1 stopped by the scheduler, 2 failed." in page.text
    assert len(page.alts("Parallel coordinates: 4 trials as lines over 1 settings")) == 1
    assert "It broke & ended." in page.text
    assert "no reason is known" in page.text
    assert "0.01 to 1, evenly on a logarithmic scale" in page.text


@pytest.mark.usefixtures("no_pixels")
@pytest.mark.parametrize("status", ["failed", "stopped"])
def test_write_sweep_report__nothing_finished(tmp_path, trials, status):
    for trial in trials:
        trial["status"] = status
    page = _render(tmp_path, make_sweep(SPACE, trials))
    assert "there is nothing to choose from" in page.text
    assert "transfgu predict" not in page.text


def test_setting_axes__places_by_hand():
    space = {
        "train.omega_1": [1.0, 0.0, 0.3],
        "concepts.granularity": ["fine", "super"],
        "train.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
        "train.dropout": {"low": 0.0, "high": 0.4, "log": False},
    }
    values = [(0.3, "super", 1e-3, 0.1), (1.0, "fine", 1e-4, 0.4)]
    trials = [make_trial(i, dict(zip(space, row, strict=True)), 0.5, None) for i, row in enumerate(values)]
    trials.append(
        make_trial(2, {"train.omega_1": 0.0, "concepts.granularity": "fine", "train.dropout": 0.0}, 0.5, None)
    )
    omega, granularity, rate, dropout = setting_axes(make_sweep(space, trials), trials)
    assert omega.places.tolist() == [0.5, 1.0, 0.0], "numbers in their order"
    assert omega.ticks == [(0.0, "0"), (0.5, "0.3"), (1.0, "1")]
    assert (granularity.places.tolist(), granularity.spacing) == ([1.0, 0.0, 0.0], 1.0)
    np.testing.assert_allclose(rate.places, [0.5, 0.0, np.nan])
    assert [label for _, label in rate.ticks] == ["0.0001", "0.000464", "0.00215", "0.01"]
    np.testing.assert_allclose(dropout.places, [0.25, 1.0, 0.0])
