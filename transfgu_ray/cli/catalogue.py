"""Commands that list what there is to choose from: datasets and presets."""

import itertools
import json
import textwrap
from typing import Annotated, Any

import typer

from transfgu_ray.cli.options import Quiet, Set, Verbose, absolute
from transfgu_ray.cli.terminal import Terminal
from transfgu_ray.cli.words import note_refused
from transfgu_ray.errors import DataError

datasets = typer.Typer(help="Known datasets; `check` verifies a copy.", no_args_is_help=False)


@datasets.callback(invoke_without_command=True)
def list_datasets(context: typer.Context) -> None:
    """List known datasets and what each expects on disk."""
    if context.invoked_subcommand is not None:
        return
    from transfgu_ray.datasets import DATASETS

    for name, each in DATASETS.items():
        classes = f"{len(each.class_names)} classes" if each.class_names else "classes of its own"
        labels = "no labels, or classes of its own" if each.has_own_names else "no labels"
        scored = classes if each.evaluate_split else labels
        typer.echo(f"{name}: {scored}, {each.region_mode}")
        typer.echo(textwrap.fill(each.expects, 100, initial_indent="    ", subsequent_indent="    "))


@datasets.command()
def check(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Which dataset; see `transfgu datasets`.")],
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Its root, as --data of a run.")],
    *,
    assignments: Set = [],  # noqa: B006
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check a copy of a dataset: photographs, labels, sizes, label ids. Exit code 2 if it cannot be used."""
    from transfgu_ray.config.presets import paper
    from transfgu_ray.config.run import build_config
    from transfgu_ray.datasets.check import Check

    # What is refused is the same in every preset.
    limits = build_config(paper(), None, assignments).data
    terminal, prepared = Terminal(quiet, verbose), Check(name, absolute(folder), limits)
    with terminal.stage("check", prepared.num_images, "photographs") as progress:
        found = prepared.run(progress)
    terminal.table(
        [[each.split, each.what, each.found] for each in found.facts], ["split", "what", "found"], words=(1, 2)
    )
    note_refused(terminal, found.refused)
    if found.refused:
        raise DataError(f"{folder} is not a usable copy of {name}: {len(found.refused)} files were refused")


presets = typer.Typer(help="Named recipes; `show` one in full, or `diff` two.", no_args_is_help=False)
ForDataset = Annotated[str, typer.Option("--dataset", help="What the recipe says of this dataset.")]


@presets.callback(invoke_without_command=True)
def list_presets(context: typer.Context) -> None:
    """List the named recipes."""
    if context.invoked_subcommand is not None:
        return
    from transfgu_ray.config.presets import PRESETS
    from transfgu_ray.pretraining.presets import PRETRAIN_PRESETS

    for title, recipes in (("transfgu run", PRESETS), ("transfgu pretrain", PRETRAIN_PRESETS)):
        typer.echo(f"{title} --preset")
        for key, recipe in recipes.items():
            typer.echo(f"  {key:<14} {(recipe.__doc__ or '').splitlines()[0]}")


@presets.command()
def show(name: Annotated[str, typer.Argument(help="A preset.")], dataset: ForDataset = "folder") -> None:
    """Print every setting of a recipe, as YAML that --config reads."""
    from transfgu_ray.config.base import dump_yaml
    from transfgu_ray.config.presets import get_preset
    from transfgu_ray.pretraining.presets import PRETRAIN_PRESETS

    known = PRETRAIN_PRESETS.get(name)
    typer.echo(dump_yaml(known() if known else get_preset(name, dataset)), nl=False)


@presets.command()
def diff(
    one: Annotated[str, typer.Argument(help="A preset.")],
    other: Annotated[str, typer.Argument(help="Another preset.")],
    dataset: ForDataset = "voc",
) -> None:
    """Compare two recipes for a dataset, with the source of each value."""
    from transfgu_ray.config.presets import compare

    differences = compare(one, other, dataset)
    typer.echo(f"{dataset}: {one} -> {other}")
    for name, first, second, text in differences:
        typer.echo(f"{name}: {_short(first)} -> {_short(second)}")
        typer.echo(textwrap.fill(text, 100, initial_indent="    ", subsequent_indent="    "))


def _short(value: Any) -> str:
    """Return a value as YAML on one line; equal neighbours in a long list are counted."""
    if not isinstance(value, list) or len(value) <= 6:
        return json.dumps(value)
    runs = [(key, len(list(group))) for key, group in itertools.groupby(value)]
    return "[" + ", ".join(f"{key} x {count}" if count > 1 else str(key) for key, count in runs) + "]"
