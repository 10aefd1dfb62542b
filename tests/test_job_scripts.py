"""jobs/*.py: one script per command that people submit to a cluster, all alike."""

from pathlib import Path

import pytest
import typer

from transfgu_ray.cli import app
from transfgu_ray.cli.stages import COMMANDS

JOBS = sorted((Path(__file__).resolve().parents[1] / "jobs").glob("*.py"))


def test_jobs__every_stage_and_the_whole_run_have_one():
    assert {*COMMANDS} <= {job.stem for job in JOBS}


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_jobs__each_is_its_command(job):
    assert job.stem in typer.main.get_command(app).commands
    _, code = job.read_text().split('"""\n\n', 1)
    assert code == (f'import sys\n\nfrom transfgu_ray.cli import main\n\nsys.argv.insert(1, "{job.stem}")\nmain()\n')
