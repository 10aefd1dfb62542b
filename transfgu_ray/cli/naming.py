"""`transfgu concepts name`, beside the stage `transfgu concepts`."""

import json
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from transfgu_ray.cli.options import Quiet, RunFolder
from transfgu_ray.cli.terminal import Terminal
from transfgu_ray.cli.words import note_pages, note_scores
from transfgu_ray.errors import ConfigError


class ConceptsCommand(TyperCommand):
    """The stage `concepts RUN`, and beside it `concepts name RUN FILE`; a run folder called name is `./name`."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Hands `concepts name ...` to the command of that name."""
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
    from transfgu_ray.models.names import parse_names
    from transfgu_ray.pipeline.pages import read_names, rename
    from transfgu_ray.runs.lock import locked
    from transfgu_ray.runs.run import Run
    from transfgu_ray.storage import Folder, read_file

    try:
        data = read_file(file)
    except OSError:
        raise ConfigError(f"{file} cannot be read; give a YAML file of names") from None
    terminal = Terminal(quiet)
    with locked(Folder(folder)):
        opened = Run.open(folder, None)
        names = parse_names(data, file, read_names(opened).kinds)
        rename(opened, names)
    shown = dict.fromkeys(names.class_of[concept] for concept in names.of_concept if concept not in names.hidden)
    rows = [[names.label(c), ", ".join(map(str, names.members(c)))] for c in shown]
    if names.hidden:
        rows.append(["hidden", ", ".join(map(str, names.hidden))])
    terminal.table(rows, ["name", "concepts"], words=(1,))
    if opened.manifest("evaluate") is not None:
        note_scores(terminal, json.loads(opened.folder.read_bytes("metrics.json")))
    if opened.manifest("report") is not None:
        note_pages(terminal, opened)
