"""`transfgu names`: give the concepts that were found names of your own."""

import json
from typing import Annotated

import typer

from transfgu_ray.cli.options import Quiet, RunFolder, Verbose, at_work
from transfgu_ray.cli.terminal import Terminal
from transfgu_ray.cli.words import note_pages, note_scores
from transfgu_ray.errors import ConfigError


def names(
    folder: RunFolder,
    file: Annotated[
        str, typer.Argument(metavar="NAMES", help="YAML with one line per concept: `3: sky`; `{}` removes all names.")
    ],
    *,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Name, merge or hide concepts of a trained run.

    The YAML file maps concept ids to names, or to null to hide a concept.

    Concepts of one name become one class, the first of them; hidden ones become background: the model's own where it
    has one, else a last class of their own, black. Scores and pages are made again with these names, from counts that
    the run keeps, and `transfgu predict` follows them. Nothing is trained or segmented again.
    """
    from transfgu_ray.models.names import parse_names
    from transfgu_ray.pipeline.pages import read_names, rename
    from transfgu_ray.runs.run import Run
    from transfgu_ray.storage import Folder, read_file

    try:
        data = read_file(file)
    except OSError:
        raise ConfigError(f"{file} cannot be read; give a YAML file of names") from None
    terminal = Terminal(quiet, verbose)
    opened = Run.open(folder, None)
    with at_work(Folder(folder), "names"):
        found = parse_names(data, file, read_names(opened).kinds)
        rename(opened, found)
    shown = dict.fromkeys(found.class_of[concept] for concept in found.of_concept if concept not in found.hidden)
    rows = [[found.label(c), ", ".join(map(str, found.members(c)))] for c in shown]
    if found.hidden:
        rows.append(["hidden", ", ".join(map(str, found.hidden))])
    terminal.table(rows, ["name", "concepts"], words=(1,))
    if opened.manifest("evaluate") is not None:
        note_scores(terminal, json.loads(opened.folder.read_bytes("metrics.json")))
    if opened.manifest("report") is not None:
        note_pages(terminal, opened)
