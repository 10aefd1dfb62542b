"""Print a row for each comparison with the published code; exit with 1 if any differs."""

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console

from tests.golden.cases import compare_all


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the golden files")
    parser.add_argument("--json", type=Path, metavar="F", help="write the rows there too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    out = Console(highlight=False, soft_wrap=True)
    rows = []
    for row in compare_all(given.folder):
        out.print(f"{'same   ' if row.same else 'DIFFERS'} {row.name}: {row.difference:.3g} (limit {row.limit:g})")
        rows.append({**row._asdict(), "same": row.same})
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    num_same = sum(row["same"] for row in rows)
    out.print(f"{num_same} of {len(rows)} same")
    return 0 if num_same == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
