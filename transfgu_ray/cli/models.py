"""Commands that use a model: predict masks, serve a page, compare versions."""

import shlex
import signal
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from transfgu_ray.cli.options import Address, Quiet, Verbose, absolute, finite
from transfgu_ray.cli.terminal import Terminal, duration
from transfgu_ray.cli.words import note_passed_over, note_refused
from transfgu_ray.errors import ConfigError

if TYPE_CHECKING:
    from transfgu_ray.engine.session import Resources
    from transfgu_ray.storage import Folder


class Mode(StrEnum):
    """How a photograph is given to the model."""

    RESIZE = "resize"
    SLIDE = "slide"


ModelUri = Annotated[str, typer.Argument(metavar="MODEL", help="Run folder, model folder, or models:/NAME@ALIAS.")]
ModelTrackingUri = Annotated[str | None, typer.Option(help="MLflow tracking URI, for models:/ only.")]


def predict(
    model: ModelUri,
    images: Annotated[
        str,
        typer.Option(
            help="New photographs: a folder, a file, a tar or Parquet table, a glob in quotes, or a URI of these."
        ),
    ],
    *,
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
    verbose: Verbose = False,
) -> None:
    """Segment new photographs: palette masks and overlays.

    Named like the photographs; on request also probabilities and COCO JSON.
    """
    from transfgu_ray.config.sections import RuntimeConfig
    from transfgu_ray.datasets.outputs import mark_outputs
    from transfgu_ray.engine.watchdog import unless_stalled
    from transfgu_ray.models.model import load_model
    from transfgu_ray.runs.logs import kept_log
    from transfgu_ray.serving import predict as verb
    from transfgu_ray.serving.photographs import find_photographs
    from transfgu_ray.storage import Folder

    terminal = Terminal(quiet, verbose)
    source, target = _model_folder(model, tracking_uri, terminal), Folder(out)
    # Before Ray starts, and before anything in OUT changes.
    load_model(source)
    root, photos = find_photographs(images)
    mark_outputs(target, verb.PICTURES)
    wanted = verb.Wanted(mode == Mode.SLIDE, probabilities, coco)
    with (
        kept_log(target, "predict"),
        terminal.stage("predict", len(photos.images), "photographs") as show,
        unless_stalled("the prediction", RuntimeConfig().stall_minutes, show) as progress,
        _workers(ray_address, len(photos.images), terminal) as resources,
    ):
        manifest = verb.predict(
            source, target, root=root, photos=photos, wanted=wanted, resources=resources, progress=progress
        )
    _close_prediction(terminal, target, manifest)
    command = shlex.join(["transfgu", "serve", model])
    terminal.note(f"next: look at the overlays, or drop photographs on a page with `{command}`")


def _close_prediction(terminal: Terminal, target: "Folder", manifest: dict[str, Any]) -> None:
    """Print what was left out or removed, how long it took, and where the outputs are."""
    note_passed_over(terminal, manifest["passed_over"])
    note_refused(terminal, manifest["refused"])
    if removed := manifest["masks_of_another_model_removed"]:
        terminal.note(f"{removed} masks of another model, or with other names, were in {target.uri} and are removed")
    count = manifest["rows_out"]
    terminal.note(
        f"{count} photograph{'s' if count != 1 else ''} in {duration(manifest['seconds'])}, "
        f"{manifest['images_per_second']:.2f} per second, including the start of the workers"
    )
    terminal.note(f"masks: {target.uri_of('masks')}, overlays: {target.uri_of('overlays')}")
    terminal.note(f"legend: {target.uri_of('legend.png')} and .json")
    if manifest["probabilities"]:
        terminal.note(f"probabilities: {target.uri_of('probabilities')}")
    if manifest["coco"]:
        labels, images = target.uri_of("coco/labels.json"), manifest["images"]
        terminal.note(f"COCO: {labels} and panoptic.json, of the photographs in {images}")


def _workers(ray_address: str | None, num_images: int, terminal: Terminal) -> AbstractContextManager["Resources"]:
    """Return a session of Ray; for few photographs on no cluster, the resources of this process."""
    from transfgu_ray.config.sections import RuntimeConfig
    from transfgu_ray.engine.inprocess import FEWEST_FOR_RAY, own_resources
    from transfgu_ray.engine.session import ray_session

    if ray_address is None and num_images < FEWEST_FOR_RAY:
        return nullcontext(own_resources(RuntimeConfig()))
    return ray_session(ray_address, RuntimeConfig(), note=terminal.note)


def _model_folder(model: str, tracking_uri: str | None, terminal: Terminal) -> Any:
    """Return the folder of a model in a run folder, a model folder or the registry."""
    from transfgu_ray.serving.predict import model_folder

    if model.startswith("models:/"):
        from transfgu_ray.tracking.client import registry_uri
        from transfgu_ray.tracking.models import fetch_model
        from transfgu_ray.tracking.waiting import told_of_waits

        with told_of_waits(registry_uri(tracking_uri), terminal.note):
            model = fetch_model(model, tracking_uri)
    return model_folder(model)


def serve(
    model: ModelUri,
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond 127.0.0.1, whoever reaches it can use the page.")
    ] = "127.0.0.1",
    *,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    max_megabytes: Annotated[float, typer.Option(min=0.001, callback=finite, help="Larger files are refused.")] = 25,
    max_megapixels: Annotated[
        float, typer.Option(min=0.001, callback=finite, help="Larger photographs are refused.")
    ] = 50,
    tracking_uri: ModelTrackingUri = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Serve a page to drop photographs on and see their masks.

    With the HTTP endpoint behind it, on Ray Serve; Ctrl-C ends it.

    POST /predict takes the bytes of a photograph (curl --data-binary @photo.jpg URL/predict) and answers with JSON: a
    palette PNG and the classes in it, or {"error": ...} with status 413, 415 or 422. GET /health tells that it is up.
    """
    from transfgu_ray.config.sections import RuntimeConfig
    from transfgu_ray.engine.session import ray_session
    from transfgu_ray.serving import serve as verb

    terminal = Terminal(quiet, verbose)
    source = _model_folder(model, tracking_uri, terminal)
    verb.require_free(host, port)
    limits = verb.Limits(max_megabytes, max_megapixels)
    name = model.rstrip("/").rpartition("/")[2]
    terminal.note("starting Ray Serve ...")
    is_up = False
    # Not where it waits: what closes the session must not be interrupted by what ended the waiting.
    try:
        with ray_session(None, RuntimeConfig()) as resources:
            url = verb.start(source, name, host=host, port=port, limits=limits, resources=resources)
            terminal.note(f"{name} is served on {url}; open it in a browser, or POST photographs to {url}/predict")
            terminal.note("Ctrl-C ends it")
            is_up = True
            while True:
                signal.pause()
    except KeyboardInterrupt:
        if not is_up:
            raise
    terminal.note("stopped")


def compare(
    model: Annotated[str, typer.Option(help="Name of a registered model; see `transfgu run`.")],
    data: Annotated[str, typer.Option(help="Folder or URI of the photographs.")],
    *,
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
    verbose: Verbose = False,
) -> None:
    """Compare registered versions on the same photographs."""
    from transfgu_ray.reports.comparison import class_table, comparison_lines, version_table
    from transfgu_ray.runs.logs import kept_log
    from transfgu_ray.storage import Folder
    from transfgu_ray.studies.compare import Comparison
    from transfgu_ray.studies.compare import compare as verb

    if force and not promote:
        raise ConfigError("--force has no use without --promote")
    terminal, target, root = Terminal(quiet, verbose), Folder(out), str(absolute(data))
    wanted = Comparison(
        name=model, numbers=_version_numbers(versions), dataset=dataset, data=root, tracking_uri=tracking_uri
    )
    with kept_log(target, "compare"):
        comparison = verb(wanted, target, address=ray_address, reporter=terminal, promote=promote, force=force)
    for header, rows in (version_table(comparison), *([class_table(comparison)] if comparison["scored"] else [])):
        # Intervals below their scores, so that versions keep to 80 columns.
        cells = [[cell.replace(" [", "\n[") for cell in row] for row in rows]
        terminal.table(cells, [header[0], *(name.replace(" ", "\n") for name in header[1:])])
    for line in comparison_lines(comparison):
        terminal.note(line)
    note_refused(terminal, comparison["refused"])
    if comparison["promotion"]:
        terminal.note(comparison["promotion"]["sentence"])
    terminal.note(f"side by side: {target.uri_of('comparison.png')}")


def _version_numbers(text: str | None) -> list[int]:
    try:
        return [int(number) for number in text.split(",")] if text else []
    except ValueError:
        raise ConfigError(f"--versions {text} must be numbers with commas between them, e.g. 1,3") from None
