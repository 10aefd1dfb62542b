"""Commands that are printed for the user to give next can be pasted into a shell as they are."""

import re
import shlex
from pathlib import Path

import pytest

from tests.builders import make_folder
from tests.fixtures import open_run
from tests.tracking.test_local_store import ODD
from transfgu_ray.cli.stages import _close
from transfgu_ray.cli.terminal import Terminal
from transfgu_ray.errors import ArtifactError
from transfgu_ray.pipeline.pages import rebuild_pages
from transfgu_ray.pipeline.run import _clear_outdated, _require_before
from transfgu_ray.runs.run import Run
from transfgu_ray.runs.stages import STAGES
from transfgu_ray.tracking.local_store import store_uri

pytestmark = pytest.mark.reports


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return open_run(tmp_path / ODD / "run", make_folder(tmp_path / "data", num_images=1))


def commands_in(text: str) -> list[list[str]]:
    return [shlex.split(each) for each in re.findall(r"`((?:transfgu|mlflow) [^`]*)`", text)]


def finish(run: Run, *stages: str, **content: object) -> None:
    counts = {"rows_in": 1, "rows_out": 1, "refused": [], "seconds": 1.0}
    for stage in stages:
        run.write_manifest(stage, "fingerprint", counts | content)


def test_errors__name_commands_that_can_be_pasted(run: Run, tmp_path: Path) -> None:
    uri, said = run.folder.uri, []

    def refused(action: object) -> None:
        with pytest.raises(ArtifactError) as error:
            action()  # type: ignore[operator]
        said.extend(commands_in(str(error.value)))

    refused(lambda: Run.open(f"{uri} 2", None))
    refused(lambda: run.require("extract"))
    run.folder.write_bytes("features/part-000000.parquet", b"as written")
    finish(run, "extract", "concepts")
    refused(lambda: _require_before(run, "concepts", {"extract": "other"}))
    finish(run, "evaluate")
    run.folder.write_bytes("model/names.yaml", b"0: sky")
    refused(lambda: rebuild_pages(run))
    run.folder.write_bytes("features/part-000000.parquet", b"damaged")
    refused(lambda: run.require_whole("extract"))
    # Made again, with other bytes than concepts were made of.
    finish(run, "extract")
    refused(lambda: _clear_outdated(run, STAGES.lasting, pending=set(), overwrite=False))
    assert said == [
        ["transfgu", "run", f"{uri} 2"],
        ["transfgu", "extract", uri],
        ["transfgu", "extract", uri, "--overwrite"],
        ["transfgu", "evaluate", uri],
        ["transfgu", "extract", uri],
        ["transfgu", "run", uri, "--overwrite"],
    ]


def test_close__names_commands_that_can_be_pasted(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    uri, tracking_uri = run.folder.uri, store_uri(Path(run.folder.uri).parent / "mlflow.db")
    finish(run, "register", model_name="transfgu", model_version=1, tracking_uri=tracking_uri)
    _close(Terminal(quiet=False), run, {"register": run.require("register")})
    said = capsys.readouterr().out
    assert commands_in(said) == [["mlflow", "ui", "--backend-store-uri", tracking_uri]]
    predict, serve = (line.partition("transfgu ")[2] for line in said.splitlines()[-2:])
    assert shlex.split(predict)[:2] == ["predict", uri]
    assert shlex.split(serve.rpartition(", a page")[0]) == ["serve", uri]

    finish(run, "extract")
    _close(Terminal(quiet=False), run, {"extract": run.require("extract")})
    assert shlex.split(capsys.readouterr().out.splitlines()[-1])[-2:] == ["concepts", uri]
