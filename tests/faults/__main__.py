"""The fault campaign: `python -m tests.faults --json F`."""

import json
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tests.faults.network import in_own_network


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the outcomes.")] = None,
    only: Annotated[str, typer.Option(help="Only faults whose names match this regular expression.")] = "",
    tries: Annotated[int, typer.Option(min=1, help="Tries per fault.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the moments at which faults happen.")] = 0,
) -> None:
    """Inject every fault into small runs on a cluster of three nodes (jobs: of one) and report what was lost."""
    from tests.faults.bench import Bench
    from tests.faults.campaign import FAULTS
    from tests.faults.cluster import cluster

    # So that the cluster ends with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    chosen = [fault for fault in FAULTS if re.search(only, fault.name)]
    if not chosen:
        raise typer.BadParameter(f"no fault matches {only!r}; there are: {', '.join(f.name for f in FAULTS)}")
    folder, outcomes, errors = (
        Path(tempfile.mkdtemp(prefix="faults")),
        [],
        Console(stderr=True, highlight=False, soft_wrap=True),
    )
    try:
        with cluster(num_nodes=3) as made:
            bench = Bench(folder, made, seed)
            errors.print("the undisturbed run has finished")
            for fault in chosen:
                outcome = fault.tries(bench, tries, say=lambda words: errors.print(f"  {words}", markup=False))
                outcomes.append(outcome)
                errors.print(
                    f"{fault.name}: {outcome.recovered} of {outcome.tried}, "
                    f"{outcome.exits_right} with the right exit codes, {outcome.seconds_lost:.0f} s lost"
                )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    columns = ("tried", "recovered", "rows lost", "rows doubled", "exit code right", "seconds lost")
    table = Table("fault", *columns, box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for outcome in outcomes:
        row = outcome.describe()
        table.add_row(*(str(row[name]) for name in list(row)[:7]))
    Console(highlight=False, width=120).print(table)
    if json_file is not None:
        json_file.write_text(json.dumps([outcome.describe() for outcome in outcomes], indent=1))
    sys.exit(0 if all(0 < o.tried == o.recovered == o.exits_right for o in outcomes) else 1)


if __name__ == "__main__":
    in_own_network("tests.faults")
    typer.run(main)
