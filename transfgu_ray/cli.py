"""The command line. Heavy imports wait until a command needs them, so that `--help` answers at once."""

import itertools
import json
import os
import signal
import sys
import textwrap
import warnings
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from transfgu_ray.errors import ConfigError, DataError, StalledError, TransfguError
from transfgu_ray.terminal import Terminal, duration, printable

app = typer.Typer(
    name="transfgu",
    help="Segments photographs into K classes without a single label (TransFGU), on a laptop or a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="Run folder: a path or a URI such as s3://bucket/run.")]
Preset = Annotated[
    str | None,
    typer.Option(help="Recipe to start from; see `transfgu presets`. Default: the run's own settings, else paper."),
]
Dataset = Annotated[
    str | None,
    typer.Option(help="Layout of --data; see `transfgu datasets`. Default: the preset's (demo: scenes), else folder."),
]
Data = Annotated[str | None, typer.Option(help="Folder or URI of the photographs.")]
Config = Annotated[str | None, typer.Option(help="YAML file that changes the preset.")]
Set = Annotated[
    list[str], typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Change one setting; may be given often.")
]
Weights = Annotated[str | None, typer.Option(help="Encoder weights: a checkpoint file, 'hub', 'bundled' or 'random'.")]
Address = Annotated[
    str | None,
    typer.Option(
        "--ray-address", envvar="RAY_ADDRESS", help="Ray to use: host:port or auto. Default: start a local Ray."
    ),
]
TrackingUri = Annotated[str | None, typer.Option(help="MLflow tracking URI. Default: sqlite beside the run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Compute again what another configuration changes.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, only errors.")]


def _named(dataset: str | None, data: str | None, weights: str | None) -> list[str]:
    """The assignments that these options stand for."""
    from transfgu_ray.config import NAMED_WEIGHTS

    shorthand = {
        "data.dataset": dataset,
        "data.root": _absolute(data),
        "encoder.weights": weights if weights in NAMED_WEIGHTS else _absolute(weights),
    }
    return [f"{key}={json.dumps(value)}" for key, value in shorthand.items() if value is not None]


def _verb(name: str, text: str, cls: type[TyperCommand] = TyperCommand) -> Callable[..., None]:
    """Adds a command that brings one stage of a run, or for `run` all of them, up to date."""

    def command(
        folder: RunFolder,
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
    ) -> None:
        from transfgu_ray.artifacts import STAGES, Run
        from transfgu_ray.claims import claimed
        from transfgu_ray.config import build_config
        from transfgu_ray.pipeline.run import run_stages
        from transfgu_ray.presets import configure
        from transfgu_ray.storage import Folder

        named = _named(dataset, data, weights)
        if tracking_uri is not None:
            named.append(f"tracking.uri={json.dumps(tracking_uri)}")
        resolved = None
        if preset or config or assignments or named:
            stored, changes = None if preset else Run.stored_config(folder), [*named, *assignments]
            resolved = (
                build_config(stored, config, changes) if stored else configure(preset or "paper", config, changes)
            )
        terminal = Terminal(quiet)
        stages = STAGES if name == "run" else (name,)
        with claimed(Folder(folder)):
            opened = Run.open(folder, resolved, overwrite)
            if name == "report":
                from transfgu_ray.pipeline.rewrite import rebuild_pages

                # Always, and without Ray: it takes seconds, and another version makes other pages.
                manifests = {name: rebuild_pages(opened)}
            else:
                manifests = run_stages(opened, stages, ray_address, terminal, overwrite)
            _close(terminal, opened, manifests)

    app.command(name=name, help=text, cls=cls)(command)
    return command


class _ConceptsCommand(TyperCommand):
    """The stage `concepts RUN`, and beside it `concepts name RUN FILE`; a run folder called name is `./name`."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        if args[:1] == ["name"]:
            return typer.main.get_command(_naming).make_context(f"{info_name} name", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)


_naming = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@_naming.command()
def name_concepts(
    folder: RunFolder,
    file: Annotated[
        str, typer.Argument(metavar="NAMES", help="YAML, a line a concept: `3: sky`; `{}` takes all names away.")
    ],
    quiet: Quiet = False,
) -> None:
    """Names, merges or hides concepts of a trained run: concept id -> name, or null.

    Concepts of one name are one class, the first of them; hidden ones become background: that of the model where it has
    one, else a class of its own, the last, black. What was evaluated and reported is told anew by these names, from the
    counts that the run keeps, and `transfgu predict` follows them. Nothing is trained or segmented again.
    """
    from transfgu_ray.artifacts import Run
    from transfgu_ray.claims import claimed
    from transfgu_ray.names import parse_names
    from transfgu_ray.pipeline.rewrite import read_names, rename
    from transfgu_ray.storage import Folder, read_file

    try:
        data = read_file(file)
    except OSError:
        raise ConfigError(f"{file} cannot be read; give a YAML file of names") from None
    terminal = Terminal(quiet)
    with claimed(Folder(folder)):
        opened = Run.open(folder, None)
        names = parse_names(data, file, read_names(opened).kinds)
        rename(opened, names)
    shown = dict.fromkeys(names.class_of[concept] for concept in names.of_concept if concept not in names.hidden)
    rows = [[names.label(c), ", ".join(map(str, names.members(c)))] for c in shown]
    if names.hidden:
        rows.append(["hidden", ", ".join(map(str, names.hidden))])
    terminal.table(rows, ["name", "concepts"], words=(1,))
    if opened.manifest("evaluate") is not None:
        _note_scores(terminal, json.loads(opened.folder.read_bytes("metrics.json")))
    if opened.manifest("report") is not None:
        _note_pages(terminal, opened)


run = _verb("run", "Photographs to masks: every stage, resumed where it stopped.")
_verb("extract", "Stage 1: class tokens of sliding windows -> features/.")
_verb(
    "concepts",
    "Stage 2: k-means of the class tokens -> concepts.parquet. See also `transfgu concepts name --help`, which names, "
    "merges and hides concepts of a trained run.",
    _ConceptsCommand,
)
_verb("labels", "Stage 3: response maps of all concepts -> labels/.")
_verb("train", "Stage 4: decoder in teacher-student rounds -> model/.")
_verb("evaluate", "Stage 5: scores, where there are labels -> metrics.json.")
_verb("report", "Stage 6: self-contained pages, made again from the run's artifacts -> report.html, atlas.html.")


class Mode(StrEnum):
    """What the model sees of a photograph."""

    RESIZE = "resize"
    SLIDE = "slide"


ModelUri = Annotated[str, typer.Argument(metavar="MODEL", help="Run folder, model folder, or models:/NAME@ALIAS.")]
ModelTrackingUri = Annotated[str | None, typer.Option(help="MLflow tracking URI, for models:/ only.")]


@app.command()
def predict(
    model: ModelUri,
    images: Annotated[
        str, typer.Option(help="New photographs: a folder, a file, a glob in quotes, or a URI of one of these.")
    ],
    out: Annotated[str, typer.Option(help="Folder or URI that masks/, overlays/ and the legend go to.")],
    mode: Annotated[
        Mode,
        typer.Option(
            help="resize: the model sees the whole photograph, squashed to its input size. slide: windows of that size "
            "over the photograph as large as it is, for details of large photographs; takes longer."
        ),
    ] = Mode.RESIZE,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also probabilities/NAME/CLASS.png, greyscale, 255 = certain.")
    ] = False,
    coco: Annotated[
        bool,
        typer.Option(
            "--coco", help="Also coco/labels.json (run-length masks, for FiftyOne, CVAT, ...) and coco/panoptic.json."
        ),
    ] = False,
    ray_address: Address = None,
    tracking_uri: ModelTrackingUri = None,
    quiet: Quiet = False,
) -> None:
    """Palette masks and overlays of new photographs, named as these; on request probabilities and COCO JSON."""
    from transfgu_ray.config import RuntimeConfig
    from transfgu_ray.photographs import find_photographs
    from transfgu_ray.pipeline import predict as verb
    from transfgu_ray.pipeline.session import ray_session
    from transfgu_ray.pipeline.watchdog import unless_stalled
    from transfgu_ray.storage import Folder

    terminal = Terminal(quiet)
    source, target = _model_folder(model, tracking_uri), Folder(out)
    root, photos = find_photographs(images)
    target.write_bytes(".transfgu", b"")
    target.delete(".transfgu")
    wanted = verb.Wanted(mode == Mode.SLIDE, probabilities, coco)
    with (
        terminal.stage("predict", len(photos.images), "photographs") as show,
        unless_stalled("the prediction", RuntimeConfig().stall_minutes, show) as progress,
        ray_session(ray_address, RuntimeConfig()) as resources,
    ):
        manifest = verb.predict(source, root, photos, target, wanted, resources, progress)
    _note_refused(terminal, manifest["refused"])
    terminal.note(
        f"{manifest['rows_out']} photographs in {duration(manifest['seconds'])}, "
        f"{manifest['images_per_second']:.2f} a second, the workers' start included"
    )
    terminal.note(f"masks: {target.uri_of('masks')}, overlays: {target.uri_of('overlays')}")
    terminal.note(f"legend: {target.uri_of('legend.png')} and .json")
    if probabilities:
        terminal.note(f"probabilities: {target.uri_of('probabilities')}")
    if coco:
        terminal.note(f"COCO: {target.uri_of('coco/labels.json')} and panoptic.json, of the photographs in {root.uri}")
    terminal.note(f"next: look at the overlays, or drop photographs on a page with `transfgu serve {model}`")


def _model_folder(model: str, tracking_uri: str | None) -> Any:
    """The folder of a model that a run folder, a model folder or the registry holds."""
    from transfgu_ray.pipeline.predict import model_folder

    if model.startswith("models:/"):
        from transfgu_ray.pipeline.tracking import fetch_model

        model = fetch_model(model, tracking_uri)
    return model_folder(model)


@app.command()
def serve(
    model: ModelUri,
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond 127.0.0.1, whoever reaches it can use the page.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    max_megabytes: Annotated[float, typer.Option(min=0.001, help="Larger files are refused.")] = 25,
    max_megapixels: Annotated[float, typer.Option(min=0.001, help="Larger photographs are refused.")] = 50,
    tracking_uri: ModelTrackingUri = None,
    quiet: Quiet = False,
) -> None:
    """A page to drop photographs on and see their masks, and the HTTP endpoint behind it, on Ray Serve; Ctrl-C ends it.

    POST /predict takes the bytes of a photograph (curl --data-binary @photo.jpg URL/predict) and answers with JSON: a
    palette PNG and the classes in it, or {"error": ...} with status 413, 415 or 422. GET /health tells that it is up.
    """
    from transfgu_ray.config import RuntimeConfig
    from transfgu_ray.pipeline import serve as verb
    from transfgu_ray.pipeline.session import ray_session

    terminal, source = Terminal(quiet), _model_folder(model, tracking_uri)
    verb.require_free(host, port)
    limits = verb.Limits(max_megabytes, max_megapixels)
    name = model.rstrip("/").rpartition("/")[2]
    terminal.note("starting Ray Serve ...")
    with ray_session(None, RuntimeConfig()) as resources:
        url = verb.start(source, name, host, port, limits, resources)
        terminal.note(f"{name} is served on {url}; open it in a browser, or POST photographs to {url}/predict")
        terminal.note("Ctrl-C ends it")
        verb.wait_for_ctrl_c()
    terminal.note("stopped")


@app.command()
def compare(
    model: Annotated[str, typer.Option(help="Name of a registered model; see `transfgu run`.")],
    data: Annotated[str, typer.Option(help="Folder or URI of the photographs.")],
    versions: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Which; the champion is always added. Default: all.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Layout of --data; see `transfgu datasets`. Default: the versions' own.")
    ] = None,
    out: Annotated[str, typer.Option(help="Where comparison.json, .md and .png go.")] = "transfgu-compare",
    promote: Annotated[
        bool, typer.Option("--promote", help="Move the alias champion to the best version, if it is clearly better.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="With --promote: also if it is not clearly better.")] = False,
    ray_address: Address = None,
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow tracking URI. Default: sqlite in the working directory.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Registered versions on the same photographs, by the same protocol, side by side."""
    from transfgu_ray.comparison import class_table, comparison_lines, version_table
    from transfgu_ray.pipeline.compare import compare as verb
    from transfgu_ray.storage import Folder

    if force and not promote:
        raise ConfigError("--force has no use without --promote")
    terminal, target, root = Terminal(quiet), Folder(out), str(_absolute(data))
    numbers = _version_numbers(versions)
    comparison = verb(model, numbers, dataset, root, target, tracking_uri, ray_address, terminal, promote, force)
    for header, rows in (version_table(comparison), *([class_table(comparison)] if comparison["scored"] else [])):
        # Intervals below their scores, so that versions keep to 80 columns.
        cells = [[cell.replace(" [", "\n[") for cell in row] for row in rows]
        terminal.table(cells, [header[0], *(name.replace(" ", "\n") for name in header[1:])])
    for line in comparison_lines(comparison):
        terminal.note(line)
    _note_refused(terminal, comparison["refused"])
    if comparison["promotion"]:
        terminal.note(comparison["promotion"]["sentence"])
    terminal.note(f"side by side: {target.uri_of('comparison.png')}")


def _version_numbers(text: str | None) -> list[int]:
    try:
        return [int(number) for number in text.split(",")] if text else []
    except ValueError:
        raise ConfigError(f"--versions {text} must be numbers with commas between them, e.g. 1,3") from None


class Pictures(StrEnum):
    """What `transfgu render` makes."""

    OBJECTS = "objects"
    SCENES = "scenes"


@app.command()
def render(
    what: Annotated[Pictures, typer.Argument(help="objects: one a picture, Parquet. scenes: several, with masks.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URI.")],
    num_train: Annotated[int, typer.Option(min=1, help="Pictures to learn from.")],
    num_val: Annotated[int, typer.Option(min=1, help="Pictures to measure on.")],
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.")] = 0,
) -> None:
    """Pictures without third-party art: objects to pretrain on, or labelled scenes for `--dataset scenes`."""
    from transfgu_ray.scenes import write_objects, write_scenes

    if what is Pictures.SCENES:
        write_scenes(out, num_train, num_val, seed)
    else:
        write_objects(out, num_train, seed, "train")
        write_objects(out, num_val, seed, "val")
    typer.echo(f"{num_train} {what} to learn from and {num_val} to measure on in {out}")


@app.command()
def pretrain(
    folder: Annotated[str, typer.Argument(metavar="OUT", help="Where the encoder goes: a path or a URI.")],
    data: Annotated[
        str | None, typer.Option(help="Images without labels: a folder, or Parquet with encoded images in `bytes`.")
    ] = None,
    val: Annotated[
        str | None,
        typer.Option(help="Images that only measure. Default: the table's val-*.parquet, else some of --data."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Recipe to start from; see `transfgu presets`. Default: the folder's own, else photos."),
    ] = None,
    config: Config = None,
    assignments: Set = [],  # noqa: B006
    ray_address: Address = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Train anew what another configuration made.")] = False,
    quiet: Quiet = False,
) -> None:
    """Images to an encoder, where no public prior fits: DINO without labels, resumed where it stopped."""
    from transfgu_ray.claims import claimed
    from transfgu_ray.config import build_config
    from transfgu_ray.pipeline.pretrain import pretrain as verb
    from transfgu_ray.pretrain_folder import PretrainFolder
    from transfgu_ray.pretrain_presets import get_pretrain_preset
    from transfgu_ray.storage import Folder

    shorthand = {"data.root": _absolute(data), "data.val_root": _absolute(val)}
    named = [f"{key}={json.dumps(value)}" for key, value in shorthand.items() if value is not None]
    resolved = None
    if preset or config or assignments or named:
        base = None if preset else PretrainFolder.stored_config(folder)
        resolved = build_config(base or get_pretrain_preset(preset or "photos"), config, [*named, *assignments])
    terminal = Terminal(quiet)
    with claimed(Folder(folder)):
        opened = PretrainFolder.open(folder, resolved, overwrite)
        _close_pretrain(terminal, opened, verb(opened, ray_address, terminal, overwrite))


@app.command()
def probe(
    weights: Annotated[str, typer.Argument(metavar="WEIGHTS", help="A checkpoint file, or 'bundled' or 'hub'.")],
    data: Annotated[str, typer.Option(help="Images with classes: class folders, or Parquet with `bytes` and `label`.")],
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side in px of the images. Default: what the encoder was trained at.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """How good an encoder is, without training: k-NN, RankMe and, where a table has `mask`, its foreground priors.

    The neighbours come from the tables train-*.parquet and are asked about val-*.parquet; of any other layout a tenth
    is held out.
    """
    from transfgu_ray.probing import Probe

    terminal, prepared = Terminal(quiet), Probe(weights, data, image_size)
    with terminal.stage("probe", prepared.num_images, "images") as progress:
        result = prepared.run(progress)
    _note_refused(terminal, result.refused)
    rows = [["images", f"{result.num_queries} at {result.image_size} px"]]
    if result.knn_top1 is not None:
        rows.append(["k-NN top-1", f"{100 * result.knn_top1:.2f} % of {result.num_bank} neighbours"])
        rows.append(["chance", f"{100 * result.knn_chance:.2f} %"])
    rows.append(["RankMe", f"{result.rank_me:.1f}"])
    rows += [[f"IoU of {prior}", f"{100 * iou:.2f} %"] for prior, iou in result.object_iou.items()]
    terminal.table(rows, ["probe", weights], words=(1,))


@app.command()
def demo(
    folder: Annotated[str, typer.Argument(metavar="[RUN]", help="Run folder.")] = "transfgu-demo/run",
    assignments: Set = [],  # noqa: B006
    ray_address: Address = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """The whole pipeline on scenes that the package renders beside RUN, with the weights it brings along."""
    from transfgu_ray.presets import DEMO_SCENES
    from transfgu_ray.scenes import write_scenes
    from transfgu_ray.storage import Folder

    scenes = f"{os.path.dirname(Folder(folder).uri.rstrip('/'))}/scenes"
    terminal = Terminal(quiet)
    terminal.note(f"scenes: {DEMO_SCENES['num_train']} to learn from, {DEMO_SCENES['num_val']} to score, in {scenes}")
    write_scenes(scenes, **DEMO_SCENES)
    run(
        folder,
        preset="demo",
        data=scenes,
        assignments=assignments,
        ray_address=ray_address,
        overwrite=overwrite,
        quiet=quiet,
    )


@app.command()
def ablate(
    folder: Annotated[str, typer.Argument(metavar="OUT", help="Where the runs and ablations.md go.")],
    preset: Annotated[str, typer.Option(help="Recipe that the variants change; see `transfgu presets`.")] = "demo",
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
) -> None:
    """The paper's ablations, Tables 3, 4 and 5: every variant and seed, resumed where it stopped."""
    from transfgu_ray.ablations import VARIANTS, ablation_tables
    from transfgu_ray.claims import claimed
    from transfgu_ray.pipeline.ablate import ablate as verb
    from transfgu_ray.presets import DEMO_SCENES, configure
    from transfgu_ray.scenes import write_scenes
    from transfgu_ray.storage import Folder

    unknown = [name for name in only if name not in VARIANTS]
    if unknown:
        raise ConfigError(f"unknown variant {unknown[0]!r}; allowed for --only: {', '.join(VARIANTS)}")
    terminal, target, notes = Terminal(quiet), Folder(folder), []
    if data is None:
        data = target.uri_of("scenes")
        write_scenes(data, **DEMO_SCENES | {"num_train": num_scenes})
        notes.append(f"{num_scenes} rendered scenes to learn from, {DEMO_SCENES['num_val']} to score.")
    if resnet == "random":
        notes.append("The ResNet-50 has random weights; DINO's are given with --resnet.")
    resolved = configure(preset, config, [*_named(dataset, data, weights), "evaluate.baselines=[]", *assignments])
    resnet = resnet if resnet == "random" else str(_absolute(resnet))
    with claimed(target):
        metrics = verb(target, resolved, only or list(VARIANTS), range(num_seeds), resnet, ray_address, terminal)
    tables = ablation_tables(metrics, notes)
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


@app.command()
def tune(
    folder: Annotated[str, typer.Argument(metavar="SWEEP", help="Where trials, sweep.json and sweep.html go.")],
    space: Annotated[
        str, typer.Option(help="What varies: a YAML file, or 'paper' for alpha, omega_1, omega_2, K.")
    ] = "paper",
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
) -> None:
    """A sweep over alpha, omega_1, omega_2, K or other settings, chosen without labels; resumed where it stopped."""
    from transfgu_ray.claims import claimed
    from transfgu_ray.evidence import evidence_lines, evidence_table, sweep_table
    from transfgu_ray.pipeline.tune import PAGE, SWEEP, SweepPlan
    from transfgu_ray.pipeline.tune import tune as verb
    from transfgu_ray.presets import DEMO_SCENES, configure
    from transfgu_ray.scenes import write_scenes
    from transfgu_ray.spaces import read_space
    from transfgu_ray.storage import Folder

    terminal, target, rendered = Terminal(quiet), Folder(folder), []
    if data is None and preset == "demo" and dataset is None:
        data = target.uri_of("scenes")
        write_scenes(data, **DEMO_SCENES | {"num_train": num_scenes})
        # Shorter than the demo: a sweep looks for an order of settings, not for the best model of one.
        rendered = ["train.round_epochs=[2, 3]"]
    named = [*_named(dataset, data, weights), "evaluate.baselines=[]", *rendered]
    if tracking_uri is not None:
        named.append(f"tracking.uri={json.dumps(tracking_uri)}")
    # Trials side by side use the cores better than workers side by side.
    resolved = configure(preset, config, [*named, "runtime.train_workers=1", *assignments])
    planned = SweepPlan(read_space(space, resolved), num_trials, sampler, scheduler, objective)
    with claimed(target):
        sweep = verb(target, resolved, planned, ray_address, terminal)
    header, rows = sweep_table(sweep)
    terminal.table(rows, [name.replace("_", "_\n").replace(" ", "\n") for name in header])
    if sweep["evidence"]:
        header, rows = evidence_table(sweep)
        terminal.table(rows, [name.replace(", ", ",\n") for name in header])
    for line in evidence_lines(sweep):
        terminal.note(line)
    terminal.note(f"sweep: {target.uri_of(SWEEP)}, page: {target.uri_of(PAGE)}")


@app.command()
def plan(
    preset: Annotated[str, typer.Option(help="Recipe to start from; see `transfgu presets`.")] = "paper",
    dataset: Dataset = None,
    data: Data = None,
    config: Config = None,
    assignments: Set = [],  # noqa: B006
    weights: Weights = None,
    ray_address: Address = None,
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Also write everything here.")] = None,
) -> None:
    """Forwards, bytes and hours of a run before anything starts, from a minute of timing on the machines at hand."""
    from transfgu_ray.pipeline.plan import plan as verb
    from transfgu_ray.presets import configure

    named = _named(dataset, data, weights)
    planned = verb(configure(preset, config, [*named, *assignments]), ray_address)
    _write_json(json_file, planned)
    stages = planned["stages"]
    total = {name: sum(stage[name] for stage in stages) for name in ("forwards", "num_bytes", "seconds")}
    total["seconds"] += planned["start_ray"]
    rows = [
        [row["stage"], f"{row['forwards']:,}", f"{row['num_bytes'] / 1e9:.3f}", duration(row["seconds"])]
        for row in (*stages, {"stage": "all, with the start of Ray", **total})
    ]
    terminal = Terminal(quiet=False)
    terminal.table(rows, ["stage", "encoder forwards", "GB kept", "time"])
    terminal.note(
        f"{planned['photographs']} photographs, {planned['scored']} scored or shown; {planned['workers']} workers, "
        f"{planned['train_workers']} in training, on {planned['device']}; "
        f"timed in {planned['calibration_seconds']:.0f} s"
    )


def _write_json(file: str | None, content: dict[str, Any]) -> None:
    from transfgu_ray.storage import Folder

    if file is not None:
        folder, _, name = file.rpartition("/")
        Folder(folder or ".").write_bytes(name, json.dumps(content, indent=1).encode())


@app.command()
def bench(
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Also write everything here.")] = None,
    only: Annotated[list[str], typer.Option(help="One part; may be given often. Default: all.")] = [],  # noqa: B006
    threads: Annotated[int, typer.Option(min=1, help="Torch threads.")] = 1,
) -> None:
    """Time, bytes and memory of each stage against the bare encoder and a plain rewrite of the published code."""
    from transfgu_ray.bench.table import run_parts, table_rows

    terminal = Terminal(quiet=False)
    found: dict[str, Any] = {}
    for found in run_parts(only, threads, lambda part: typer.echo(f"measuring {part} ...", err=True)):
        # After each part: all of them take half an hour.
        _write_json(json_file, found)
    machine = found["machine"]
    terminal.table(table_rows(found["targets"]), ["what", "target", "value", "reached"])
    terminal.note(f"{machine['device']}, {machine['processor']}, {machine['cores']} cores, {threads} thread(s)")


datasets = typer.Typer(help="Known datasets; `check` verifies a copy.", no_args_is_help=False)
app.add_typer(datasets, name="datasets")


@datasets.callback(invoke_without_command=True)
def list_datasets(context: typer.Context) -> None:
    """Known datasets and what each expects on disk."""
    if context.invoked_subcommand is not None:
        return
    from transfgu_ray.benchmarks import BENCHMARKS

    for name, each in BENCHMARKS.items():
        classes = f"{len(each.class_names)} classes" if each.class_names else "classes of its own"
        scored = classes if each.evaluate_split else "no labels"
        typer.echo(f"{name}: {scored}, {each.region_mode}")
        typer.echo(textwrap.fill(each.expects, 100, initial_indent="    ", subsequent_indent="    "))


@datasets.command()
def check(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Which dataset; see `transfgu datasets`.")],
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Its root, as --data of a run.")],
    quiet: Quiet = False,
) -> None:
    """Whether a copy of a dataset can be used: photographs, labels, sizes, label ids. Exit code 2 if not."""
    from transfgu_ray.checking import Check

    terminal, prepared = Terminal(quiet), Check(name, _absolute(folder))
    with terminal.stage("check", prepared.num_images, "photographs") as progress:
        found = prepared.run(progress)
    terminal.table(
        [[each.split, each.what, each.found] for each in found.facts], ["split", "what", "found"], words=(1, 2)
    )
    _note_refused(terminal, found.refused)
    if found.refused:
        raise DataError(f"{folder} is no usable copy of {name}: {len(found.refused)} files are not as they should be")


presets = typer.Typer(help="Named recipes; `show` one in full, or `diff` two.", no_args_is_help=False)
app.add_typer(presets, name="presets")
ForDataset = Annotated[str, typer.Option("--dataset", help="What the recipe says of this dataset.")]


@presets.callback(invoke_without_command=True)
def list_presets(context: typer.Context) -> None:
    """Named recipes."""
    if context.invoked_subcommand is not None:
        return
    from transfgu_ray.presets import PRESETS
    from transfgu_ray.pretrain_presets import PRETRAIN_PRESETS

    for title, recipes in (("transfgu run", PRESETS), ("transfgu pretrain", PRETRAIN_PRESETS)):
        typer.echo(f"{title} --preset")
        for key, recipe in recipes.items():
            typer.echo(f"  {key:<14} {(recipe.__doc__ or '').splitlines()[0]}")


@presets.command()
def show(name: Annotated[str, typer.Argument(help="A preset.")], dataset: ForDataset = "folder") -> None:
    """Every setting of one, as YAML that --config reads."""
    from transfgu_ray.config import dump_yaml
    from transfgu_ray.presets import get_preset
    from transfgu_ray.pretrain_presets import PRETRAIN_PRESETS

    known = PRETRAIN_PRESETS.get(name)
    typer.echo(dump_yaml(known() if known else get_preset(name, dataset)), nl=False)


@presets.command()
def diff(
    one: Annotated[str, typer.Argument(help="A preset.")],
    other: Annotated[str, typer.Argument(help="Another preset.")],
    dataset: ForDataset = "voc",
) -> None:
    """Where two recipes differ for a dataset, and where each value comes from."""
    from transfgu_ray.presets import compare

    differences = compare(one, other, dataset)
    typer.echo(f"{dataset}: {one} -> {other}")
    for name, first, second, text in differences:
        typer.echo(f"{name}: {_short(first)} -> {_short(second)}")
        typer.echo(textwrap.fill(text, 100, initial_indent="    ", subsequent_indent="    "))


def _short(value: Any) -> str:
    """A value as YAML on one line; runs of a long list are counted."""
    if not isinstance(value, list) or len(value) <= 6:
        return json.dumps(value)
    runs = [(key, len(list(group))) for key, group in itertools.groupby(value)]
    return "[" + ", ".join(f"{key} x {count}" if count > 1 else str(key) for key, count in runs) + "]"


def _absolute(path: str | None) -> str | None:
    """Workers and jobs run in other folders: local paths are made absolute, URIs are left."""
    return path if path is None or "://" in path else os.path.abspath(os.path.expanduser(path))


def _close(terminal: Terminal, opened: Any, manifests: dict[str, dict[str, Any]]) -> None:
    """What came out, what was refused, and where to look next."""
    rows = [
        [m["stage"], str(m["rows_in"]), str(m["rows_out"]), str(len(m["refused"])), f"{m['seconds']:.1f}"]
        for m in manifests.values()
    ]
    terminal.table(rows, ["stage", "in", "out", "refused", "seconds"])
    refused = {r["image_id"]: r for m in manifests.values() for r in m["refused"]}
    _note_refused(terminal, list(refused.values()))
    if "evaluate" in manifests:
        _note_scores(terminal, json.loads(opened.folder.read_bytes("metrics.json")))
    if "report" in manifests:
        _note_pages(terminal, opened)
    if "register" in manifests:
        entry = manifests["register"]
        terminal.note(
            f"model: models:/{entry['model_name']}/{entry['model_version']}, seen with "
            f"`mlflow ui --backend-store-uri {entry['tracking_uri']}`"
        )
    _note_next(terminal, opened.folder.uri, list(manifests))


def _note_next(terminal: Terminal, run_uri: str, done: list[str]) -> None:
    """What one does after these stages."""
    from transfgu_ray.artifacts import STAGES

    if done[-1] == STAGES[-1]:
        terminal.note(f"next: look at report.html, then transfgu predict {run_uri} --images DIR --out DIR")
        terminal.note(f"      or transfgu serve {run_uri}, a page to drop photographs on")
    else:
        # The last stage, MLflow's, has no command of its own.
        following = STAGES[STAGES.index(done[-1]) + 1]
        terminal.note(f"next: transfgu {'run' if following == STAGES[-1] else following} {run_uri}")


def _note_pages(terminal: Terminal, opened: Any) -> None:
    for title, page in (("report", "report.html"), ("concepts", "atlas.html")):
        if opened.folder.exists(page):
            terminal.note(f"{title}: {opened.folder.uri_of(page)}")


def _close_pretrain(terminal: Terminal, opened: Any, manifest: dict[str, Any]) -> None:
    """What came out, what was refused, and how to go on."""
    shown = {
        "images": f"{manifest['images_train']} trained on, {manifest['images_val']} held out",
        "images seen": f"{manifest['images_seen']} in {manifest['steps']} steps",
        "seconds": f"{manifest['seconds']:.0f} ({manifest['images_per_second']:.0f} images/s)",
        "loss": f"{manifest['loss']:.4f}",
        "RankMe": f"{manifest['rank_me']:.1f}",
    }
    if "knn_top1" in manifest:
        shown["k-NN top-1"] = f"{100 * manifest['knn_top1']:.2f} % (chance {100 * manifest['knn_chance']:.2f} %)"
    terminal.table([[name, value] for name, value in shown.items()], ["pretrain", opened.folder.uri], words=(1,))
    _note_refused(terminal, manifest["refused"])
    for alarm in manifest["alarms"]:
        terminal.note(f"warning: {alarm}")
    terminal.note(f"use it: transfgu run RUN --weights {opened.folder.uri_of('encoder.safetensors')} ...")


def _note_refused(terminal: Terminal, refused: list[dict[str, str]], most: int = 20) -> None:
    if not refused:
        return
    terminal.note(f"refused {len(refused)} photographs:")
    for refusal in refused[:most]:
        terminal.note(printable(f"  {refusal['image_id']}: {refusal['reason']}"))
    if len(refused) > most:
        terminal.note(f"  and {len(refused) - most} more, named in the manifests")


def _note_scores(terminal: Terminal, metrics: dict[str, Any]) -> None:
    if not metrics["scored"]:
        terminal.note(f"nothing was scored: dataset {metrics['dataset']} has no labels")
        return
    from transfgu_ray.scores import score_lines, score_table

    (first, *others), rows = score_table(metrics)
    # Two lines, so that methods keep one in 80 columns.
    terminal.table(rows, [first, *(name.replace(" ", "\n") for name in others)])
    for line in score_lines(metrics):
        terminal.note(line)


class _Stopped(BaseException):
    """SIGTERM, as `ray job stop` and schedulers send it."""


def _on_sigterm(*_: object) -> None:
    raise _Stopped


def main() -> None:
    """Entry point: user errors are one sentence and exit code 2; what is stopped says so, with 128 + the signal."""
    # Third-party deprecations are for us, not for the people who run this.
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        app()
    except (TransfguError, OSError) as error:
        from transfgu_ray.storage import storage_failure

        told = error if isinstance(error, TransfguError) else storage_failure(error)
        if told is None:
            raise
        typer.echo(printable(f"transfgu: {told}"), err=True)
        sys.exit(2)
    except StalledError as error:
        typer.echo(f"transfgu: {error}", err=True)
        sys.exit(1)
    except _Stopped:
        _exit_stopped(signal.SIGTERM)
    except SystemExit as error:
        # What typer makes of Ctrl-C.
        if error.code == 128 + signal.SIGINT:
            _exit_stopped(signal.SIGINT)
        raise


def _exit_stopped(by: int) -> NoReturn:
    typer.echo("transfgu: stopped; the same command goes on from here", err=True)
    sys.exit(128 + by)


if __name__ == "__main__":
    main()
