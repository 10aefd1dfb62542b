"""What the grid of ablations hands to its tables. No Ray; `tests/test_readme.py` runs the grid."""

from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.fixtures import Silent
from tests.reports.evaluated import make_evaluated
from transfgu_ray.reports.ablations import FULL, aggregate
from transfgu_ray.runs.run import Run
from transfgu_ray.storage import Folder
from transfgu_ray.studies import ablate as study


def test_ablate__returns_runs_with_the_counts_of_their_photographs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = make_evaluated(tmp_path / "finished")

    def finish(run: Run, *args: object, **settings: object) -> None:
        for output in ("metrics.json", "confusions", "model"):
            run.copy_output(finished, output)

    monkeypatch.setattr(study, "ray_session", lambda *settings, **more: nullcontext())
    monkeypatch.setattr(study, "run_stages", finish)
    found = study.ablate(
        Folder(str(tmp_path / "grid")),
        finished.config,
        variants=[FULL],
        seeds=range(1),
        resnet="random",
        address=None,
        reporter=Silent(),
    )
    (run,) = found[FULL]
    assert run.metrics == finished.folder.read_json("metrics.json")
    assert run.config.seed == 0
    # With a single seed the interval is that of its photographs, read from the table of confusions.
    for stage, scores in aggregate([run])["stages"].items():
        assert scores["miou"]["interval"] == run.metrics["stages"][stage]["miou_interval"]
