"""One command per stage of a run, and `transfgu run` and `demo`, which do them all."""

import json
import os
import shlex
from collections.abc import Callable
from typing import Annotated, Any

import typer

from transfgu_ray.cli.options import (
    Address,
    Config,
    Data,
    Dataset,
    Overwrite,
    Preset,
    Quiet,
    RunFolder,
    Set,
    TrackingUri,
    Verbose,
    Weights,
    at_work,
    named_settings,
)
from transfgu_ray.cli.terminal import Terminal
from transfgu_ray.cli.words import note_pages, note_passed_over, note_refused, note_scores
from transfgu_ray.runs.stages import STAGES


def _command(name: str) -> Callable[..., None]:
    """Return the command that brings one stage of a run, or for `run` all of them, up to date."""

    def command(
        folder: RunFolder,
        *,
        preset: Preset = None,
        dataset: Dataset = None,
        data: Data = None,
        config: Config = None,
        assignments: Set = [],  # noqa: B006
        weights: Weights = None,
        ray_address: Address = None,
        tracking_uri: TrackingUri = None,
        overwrite: Overwrite = False,
        quiet: Quiet = False,
        verbose: Verbose = False,
    ) -> None:
        from transfgu_ray.config.presets import configure
        from transfgu_ray.config.run import build_config
        from transfgu_ray.pipeline.run import run_stages
        from transfgu_ray.runs.run import Run
        from transfgu_ray.storage import Folder

        named = named_settings(dataset, data, weights)
        if tracking_uri is not None:
            named.append(f"tracking.uri={json.dumps(tracking_uri)}")
        resolved = None
        if preset or config or assignments or named:
            stored, changes = None if preset else Run.stored_config(folder), [*named, *assignments]
            resolved = (
                build_config(stored, config, changes) if stored else configure(preset or "paper", config, changes)
            )
        if resolved is None and Run.stored_config(folder) is None:
            # Before anything is made there.
            Run.open(folder, None)
        terminal = Terminal(quiet, verbose)
        with at_work(Folder(folder), name):
            opened = Run.open(folder, resolved, overwrite)
            if name == "report":
                from transfgu_ray.pipeline.pages import rebuild_pages

                # Always, and without Ray: it takes seconds, and pages differ between versions.
                manifests = {name: rebuild_pages(opened)}
            else:
                stages = STAGES.lasting if name == "run" else (name,)
                manifests = run_stages(opened, stages, address=ray_address, reporter=terminal, overwrite=overwrite)
            _close(terminal, opened, manifests)

    return command


# Only `run` does the last stage, MLflow's.
_OF_ONE = [stage for stage in STAGES if stage.feeds is None and stage.name != STAGES.lasting[-1]]
COMMANDS = {
    "run": ("Photographs to masks: every stage, resumed where it stopped.", _command("run")),
    **{
        stage.name: (f"Stage {number}: {stage.help}", _command(stage.name))
        for number, stage in enumerate(_OF_ONE, start=1)
    },
}


def demo(
    folder: Annotated[str, typer.Argument(metavar="[RUN]", help="Run folder.")] = "transfgu-demo/run",
    assignments: Set = [],  # noqa: B006
    *,
    ray_address: Address = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run the whole pipeline on rendered scenes, with bundled weights.

    The scenes are written beside RUN.
    """
    from transfgu_ray.config.presets import DEMO_SCENES
    from transfgu_ray.scenes import write_scenes
    from transfgu_ray.storage import Folder

    scenes = f"{os.path.dirname(Folder(folder).uri.rstrip('/'))}/scenes"
    terminal = Terminal(quiet)
    terminal.note(f"scenes: {DEMO_SCENES['num_train']} to learn from, {DEMO_SCENES['num_val']} to score, in {scenes}")
    write_scenes(scenes, **DEMO_SCENES)
    _, run = COMMANDS["run"]
    run(
        folder,
        preset="demo",
        data=scenes,
        assignments=assignments,
        ray_address=ray_address,
        overwrite=overwrite,
        quiet=quiet,
        verbose=verbose,
    )


def verify(folder: RunFolder, *, ray_address: Address = None, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Compare every file of a run with its checksum.

    The other commands look at sizes and times alone, and read what somebody has written since.
    """
    from transfgu_ray.pipeline.verify import verify as verify_run
    from transfgu_ray.runs.run import Run
    from transfgu_ray.storage import Folder

    terminal = Terminal(quiet, verbose)
    with at_work(Folder(folder), "verify"):
        count = verify_run(Run.open(folder, None), address=ray_address, reporter=terminal)
    terminal.note(f"{count} files are as they were written")


def _close(terminal: Terminal, opened: Any, manifests: dict[str, dict[str, Any]]) -> None:
    """Print the result, what was refused, and what to do next."""
    rows = [
        [m["stage"], str(m["rows_in"]), str(m["rows_out"]), str(len(m["refused"])), f"{m['seconds']:.1f}"]
        for m in manifests.values()
    ]
    terminal.table(rows, ["stage", "in", "out", "refused", "seconds"])
    note_passed_over(terminal, manifests.get("extract", {}).get("passed_over", {}))
    refused = {r["image_id"]: r for m in manifests.values() for r in m["refused"]}
    note_refused(terminal, list(refused.values()))
    if "evaluate" in manifests:
        note_scores(terminal, json.loads(opened.folder.read_bytes("metrics.json")))
    if "report" in manifests:
        note_pages(terminal, opened)
    if "register" in manifests:
        entry = manifests["register"]
        terminal.note(
            f"model: models:/{entry['model_name']}/{entry['model_version']}, seen with "
            f"`mlflow ui --backend-store-uri {shlex.quote(entry['tracking_uri'])}`"
        )
    _note_next(terminal, opened, list(manifests)[-1])


def _note_next(terminal: Terminal, opened: Any, done: str) -> None:
    """Print what to do after this stage."""
    uri = shlex.quote(opened.folder.uri)
    *_, last = STAGES.lasting
    # `report` may also be asked of a finished run.
    if done == last or (done == "report" and opened.manifest(last) is not None):
        terminal.note(f"next: look at report.html, then transfgu predict {uri} --images DIR --out DIR")
        terminal.note(f"      or transfgu serve {uri}, a page to drop photographs on")
    else:
        following = STAGES.lasting[STAGES.lasting.index(done) + 1]
        terminal.note(f"next: transfgu {'run' if following == last else following} {uri}")
