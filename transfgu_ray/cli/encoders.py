"""Commands for an encoder of one's own: render pictures, train without labels, measure the result."""

import json
import shlex
from enum import StrEnum
from typing import Annotated, Any

import typer

from transfgu_ray.cli.options import Address, Config, Quiet, Set, Verbose, absolute, at_work
from transfgu_ray.cli.terminal import Terminal
from transfgu_ray.cli.words import note_passed_over, note_refused


class Pictures(StrEnum):
    """What `transfgu render` makes."""

    OBJECTS = "objects"
    SCENES = "scenes"


def render(
    what: Annotated[Pictures, typer.Argument(help="objects: one per picture, Parquet. scenes: several, with masks.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URI.")],
    *,
    num_train: Annotated[int, typer.Option(min=1, help="Pictures to learn from.")],
    num_val: Annotated[int, typer.Option(min=1, help="Pictures to measure on.")],
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.")] = 0,
) -> None:
    """Render pictures to pretrain or train on.

    Objects for `transfgu pretrain`, or labelled scenes for `--dataset scenes`.
    """
    from transfgu_ray.scenes import write_objects, write_scenes

    if what is Pictures.SCENES:
        write_scenes(out, num_train, num_val=num_val, seed=seed)
    else:
        write_objects(out, num_train, seed=seed, split="train")
        write_objects(out, num_val, seed=seed, split="val")
    typer.echo(f"{num_train} {what} to learn from and {num_val} to measure on in {out}")


def pretrain(
    folder: Annotated[str, typer.Argument(metavar="OUT", help="Where the encoder goes: a path or a URI.")],
    data: Annotated[
        str | None, typer.Option(help="Images without labels: a folder, or Parquet with encoded images in `bytes`.")
    ] = None,
    *,
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
    verbose: Verbose = False,
) -> None:
    """Train an encoder on your own images, without labels (DINO).

    For images that no public encoder fits. Resumes where it stopped.
    """
    from transfgu_ray.config.run import build_config
    from transfgu_ray.pretraining.folder import PretrainFolder
    from transfgu_ray.pretraining.presets import get_pretrain_preset
    from transfgu_ray.pretraining.pretrain import pretrain as verb
    from transfgu_ray.storage import Folder

    shorthand = {"data.root": absolute(data), "data.val_root": absolute(val)}
    named = [f"{key}={json.dumps(value)}" for key, value in shorthand.items() if value is not None]
    resolved = None
    if preset or config or assignments or named:
        base = None if preset else PretrainFolder.stored_config(folder)
        resolved = build_config(base or get_pretrain_preset(preset or "photos"), config, [*named, *assignments])
    terminal = Terminal(quiet, verbose)
    with at_work(Folder(folder), "pretrain"):
        opened = PretrainFolder.open(folder, resolved, overwrite)
        _close_pretrain(terminal, opened, verb(opened, ray_address, reporter=terminal, overwrite=overwrite))


def probe(
    weights: Annotated[str, typer.Argument(metavar="WEIGHTS", help="A checkpoint file, or 'bundled' or 'hub'.")],
    data: Annotated[str, typer.Option(help="Images with classes: class folders, or Parquet with `bytes` and `label`.")],
    *,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side in px of the images. Default: what the encoder was trained at.")
    ] = None,
    bands: Annotated[
        tuple[int, int, int] | None,
        typer.Option(min=1, help="Bands that are red, green and blue, from 1, as data.bands of the pretraining."),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure an encoder: k-NN, RankMe, foreground priors.

    Nothing is trained. Priors are measured where a table has a column `mask`. Neighbours come from the tables
    train-*.parquet, queries from val-*.parquet; of any other layout a tenth is held out.
    """
    from transfgu_ray.pretraining.probe import Probe

    terminal, prepared = Terminal(quiet, verbose), Probe(weights, data, image_size, bands)
    with terminal.stage("probe", prepared.num_images, "images") as progress:
        result = prepared.run(progress)
    note_refused(terminal, result.refused)
    rows = [["images", f"{result.num_queries} at {result.image_size} px"]]
    if result.knn_top1 is not None and result.knn_chance is not None:
        rows.append(["k-NN top-1", f"{100 * result.knn_top1:.2f} % of {result.num_bank} neighbours"])
        rows.append(["chance", f"{100 * result.knn_chance:.2f} %"])
    rows.append(["RankMe", f"{result.rank_me:.1f}"])
    rows += [[f"IoU of {prior}", f"{100 * iou:.2f} %"] for prior, iou in result.object_iou.items()]
    terminal.table(rows, ["probe", weights], words=(1,))


def _close_pretrain(terminal: Terminal, opened: Any, manifest: dict[str, Any]) -> None:
    """Print the result, what was refused, and what to do next."""
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
    note_passed_over(terminal, manifest.get("passed_over", {}))
    note_refused(terminal, manifest["refused"])
    for alarm in manifest["alarms"]:
        terminal.note(f"warning: {alarm}")
    terminal.note(f"use it: transfgu run RUN --weights {shlex.quote(opened.folder.uri_of('encoder.safetensors'))} ...")
