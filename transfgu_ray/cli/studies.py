"""Commands for many runs and for what a run costs: ablate, tune, plan, bench."""

import json
from enum import StrEnum
from typing import Annotated, Any

import typer

from transfgu_ray.cli.options import (
    Address,
    Config,
    Data,
    Dataset,
    Quiet,
    Set,
    TrackingUri,
    Verbose,
    Weights,
    absolute,
    at_work,
    finite,
    named_settings,
    write_json,
)
from transfgu_ray.cli.terminal import Terminal
from transfgu_ray.cli.words import note_plan
from transfgu_ray.errors import ConfigError


def ablate(
    folder: Annotated[str, typer.Argument(metavar="OUT", help="Where the runs and ablations.md go.")],
    preset: Annotated[str, typer.Option(help="Recipe that the variants change; see `transfgu presets`.")] = "demo",
    *,
    dataset: Dataset = None,
    data: Data = None,
    config: Config = None,
    assignments: Set = [],  # noqa: B006
    weights: Weights = None,
    num_seeds: Annotated[int, typer.Option(min=1, help="Runs of each variant, seeds 0, 1, ...")] = 3,
    only: Annotated[list[str], typer.Option(help="One variant; may be given often. Default: all.")] = [],  # noqa: B006
    resnet: Annotated[str, typer.Option(help="Weights of the ResNet-50: a checkpoint file, or 'random'.")] = "random",
    num_scenes: Annotated[int, typer.Option(min=1, help="Scenes to learn from, where --data is not given.")] = 160,
    ray_address: Address = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run the paper's ablations, Tables 3, 4 and 5.

    Every variant and seed, resumed where it stopped.
    """
    from transfgu_ray.config.presets import DEMO_SCENES, configure
    from transfgu_ray.reports.ablations import VARIANTS, ablation_tables
    from transfgu_ray.scenes import write_scenes
    from transfgu_ray.storage import Folder
    from transfgu_ray.studies.ablate import ablate as verb

    unknown = [name for name in only if name not in VARIANTS]
    if unknown:
        raise ConfigError(f"unknown variant {unknown[0]!r}; allowed for --only: {', '.join(VARIANTS)}")
    terminal, target, notes = Terminal(quiet, verbose), Folder(folder), []
    if data is None:
        data = target.uri_of("scenes")
        write_scenes(data, **DEMO_SCENES | {"num_train": num_scenes})
        notes.append(f"{num_scenes} rendered scenes to learn from, {DEMO_SCENES['num_val']} to score.")
    if resnet == "random":
        notes.append("The ResNet-50 has random weights; DINO's are given with --resnet.")
    resolved = configure(
        preset, config, [*named_settings(dataset, data, weights), "evaluate.baselines=[]", *assignments]
    )
    resnet = resnet if resnet == "random" else str(absolute(resnet))
    with at_work(target, "ablate"):
        runs = verb(
            target,
            resolved,
            variants=only or list(VARIANTS),
            seeds=range(num_seeds),
            resnet=resnet,
            address=ray_address,
            reporter=terminal,
        )
    tables = ablation_tables(runs, notes)
    target.write_bytes("ablations.md", tables.encode())
    terminal.note(tables)
    terminal.note(f"tables: {target.uri_of('ablations.md')}")


class Sampler(StrEnum):
    """How a sweep chooses its points."""

    GRID = "grid"
    RANDOM = "random"
    OPTUNA = "optuna"


class Scheduler(StrEnum):
    """What stops the trials of a sweep early."""

    NONE = "none"
    ASHA = "asha"
    MEDIAN = "median"


class Objective(StrEnum):
    """What a sweep chooses by."""

    SCORE = "score"
    MIOU = "miou"


def tune(
    folder: Annotated[str, typer.Argument(metavar="SWEEP", help="Where trials, sweep.json and sweep.html go.")],
    space: Annotated[
        str, typer.Option(help="What varies: a YAML file, or 'paper' for alpha, omega_1, omega_2, K.")
    ] = "paper",
    *,
    preset: Annotated[str, typer.Option(help="Recipe that the trials change; see `transfgu presets`.")] = "demo",
    dataset: Dataset = None,
    data: Data = None,
    config: Config = None,
    assignments: Set = [],  # noqa: B006
    weights: Weights = None,
    num_trials: Annotated[int | None, typer.Option(min=1, help="Points to try; a grid tries all.")] = None,
    sampler: Annotated[Sampler, typer.Option(help="How points are chosen.")] = Sampler.RANDOM,
    scheduler: Annotated[Scheduler, typer.Option(help="What stops trials by their epochs' score.")] = Scheduler.NONE,
    objective: Annotated[
        Objective, typer.Option(help="score: without labels. miou: by the labels of the validation photographs.")
    ] = Objective.SCORE,
    num_scenes: Annotated[int, typer.Option(min=1, help="Scenes to learn from, where --data is not given.")] = 120,
    ray_address: Address = None,
    tracking_uri: TrackingUri = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Sweep alpha, omega, K and other settings, without labels.

    Resumed where it stopped.
    """
    from transfgu_ray.config.presets import DEMO_SCENES, configure
    from transfgu_ray.reports.sweep_tables import evidence_lines, evidence_table, failed_trials, sweep_table
    from transfgu_ray.scenes import write_scenes
    from transfgu_ray.storage import Folder
    from transfgu_ray.studies.spaces import read_space
    from transfgu_ray.studies.tune import PAGE, SWEEP, SweepPlan, require_ended
    from transfgu_ray.studies.tune import tune as verb

    terminal, target, rendered = Terminal(quiet, verbose), Folder(folder), []
    if data is None and preset == "demo" and dataset is None:
        data = target.uri_of("scenes")
        write_scenes(data, **DEMO_SCENES | {"num_train": num_scenes})
        # Shorter than the demo: a sweep looks for an order of settings, not for the best model of one.
        rendered = ["train.round_epochs=[2, 3]"]
    named = [*named_settings(dataset, data, weights), "evaluate.baselines=[]", *rendered]
    if tracking_uri is not None:
        named.append(f"tracking.uri={json.dumps(tracking_uri)}")
    # Trials side by side use the cores better than workers side by side.
    resolved = configure(preset, config, [*named, "runtime.train_workers=1", *assignments])
    planned = SweepPlan(read_space(space, resolved), num_trials, sampler, scheduler, objective)
    with at_work(target, "tune"):
        sweep = verb(target, resolved, plan=planned, address=ray_address, reporter=terminal)
    header, rows = sweep_table(sweep)
    terminal.table(rows, [name.replace("_", "_\n").replace(" ", "\n") for name in header])
    if sweep["evidence"]:
        header, rows = evidence_table(sweep)
        terminal.table(rows, [name.replace(", ", ",\n") for name in header])
    for line in evidence_lines(sweep):
        terminal.note(line)
    for name, words in failed_trials(sweep):
        terminal.note(f"trial {name} failed: {words}")
    terminal.note(f"sweep: {target.uri_of(SWEEP)}, page: {target.uri_of(PAGE)}")
    require_ended(target.uri, sweep)


def plan(
    preset: Annotated[str, typer.Option(help="Recipe to start from; see `transfgu presets`.")] = "paper",
    dataset: Dataset = None,
    *,
    data: Data = None,
    config: Config = None,
    assignments: Set = [],  # noqa: B006
    weights: Weights = None,
    ray_address: Address = None,
    gpu_tflops: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            callback=finite,
            metavar="N",
            help="Sustained, not peak, TFLOP/s of one GPU; bounds its hours from below where none is timed. Measure it "
            "on the card: 0.0201 x crops_per_second.bare of `transfgu bench --only extract --json FILE`.",
        ),
    ] = None,
    node_price: Annotated[
        float | None,
        typer.Option(min=0, callback=finite, metavar="USD", help="Dollars of an hour of one node; adds what it costs."),
    ] = None,
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Also write everything here.")] = None,
) -> None:
    """Estimate forwards, bytes and hours before a run starts.

    From a minute of timing on the machines at hand.
    """
    from transfgu_ray.config.presets import configure
    from transfgu_ray.planning.plan import plan as verb

    named = named_settings(dataset, data, weights)
    planned = verb(configure(preset, config, [*named, *assignments]), ray_address, gpu_tflops, node_price)
    write_json(json_file, planned)
    note_plan(Terminal(quiet=False), planned)


def bench(
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Also write everything here.")] = None,
    only: Annotated[list[str], typer.Option(help="One part; may be given often. Default: all.")] = [],  # noqa: B006
    threads: Annotated[int, typer.Option(min=1, help="Torch threads.")] = 1,
) -> None:
    """Measure time, bytes and memory of each stage against plain code.

    That is the bare encoder, and a plain rewrite of the published code.
    """
    from transfgu_ray.bench.table import run_parts, table_rows

    terminal = Terminal(quiet=False)
    found: dict[str, Any] = {}
    for found in run_parts(only, threads, lambda part: typer.echo(f"measuring {part} ...", err=True)):
        # After each part: all of them take half an hour.
        write_json(json_file, found)
    machine = found["machine"]
    terminal.table(table_rows(found["targets"]), ["what", "target", "value", "reached"])
    terminal.note(f"{machine['device']}, {machine['processor']}, {machine['cores']} cores, {threads} thread(s)")
