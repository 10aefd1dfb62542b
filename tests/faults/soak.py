"""Many photographs through extract and labels with one kill per minute: `python -m tests.faults.soak --json F`."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from tests.builders import make_folder
from tests.faults.bench import WORKERS, compare, finish, kill, start
from tests.faults.cluster import Cluster, cluster
from tests.faults.network import in_own_network

_SETTINGS = (
    "encoder.overrides={embed_dim: 24, depth: 2, num_heads: 3, patch_size: 8}",
    "data.image_size=[64, 64]",
    "extract.window_fracs=[0.5]",
    "extract.images_per_part=50",
    "concepts.num_concepts=4",
    "runtime.num_workers=2",
)
_STAGES = ("extract", "concepts", "labels")
_TIMEOUT_S = 3600


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the outcome.")] = None,
    num_photos: Annotated[int, typer.Option(min=1000, help="Number of photographs.")] = 20_000,
    every: Annotated[float, typer.Option(min=1, help="Seconds between kills.")] = 60,
    seed: Annotated[int, typer.Option(help="Seed of what is killed.")] = 0,
) -> None:
    """Exit with 1 unless the tables of the disturbed run equal those of the quiet one."""
    # So that the cluster ends with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    folder = Path(tempfile.mkdtemp(prefix="soak"))
    try:
        with cluster(num_nodes=3) as made:
            outcome = _soak(folder, made, num_photos, every, random.Random(seed))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    text = json.dumps(outcome, indent=1)
    typer.echo(text)
    if json_file is not None:
        json_file.write_text(text)
    sys.exit(0 if all(stage["equal"] for stage in outcome["stages"].values()) else 1)


def _soak(folder: Path, made: Cluster, num_photos: int, every: float, rng: random.Random) -> dict[str, Any]:
    photos = make_folder(folder / "photos", num_photos, (48, 36))
    few = folder / "few"
    few.mkdir()
    for path in sorted(photos.iterdir())[:1000]:
        os.link(path, few / path.name)
    quiet, small, disturbed = folder / "quiet", folder / "small", folder / "disturbed"
    for run, data in ((small, few), (quiet, photos)):
        for stage in _STAGES:
            finish(_start(made, stage, run, data), timeout=_TIMEOUT_S)
    kills = {"driver": 0, "worker": 0, "node": 0}
    for stage in _STAGES:
        _disturb(made, stage, disturbed, photos, every, rng, kills)
    stages = {}
    for stage in ("extract", "labels"):
        found = compare(stage, quiet, disturbed)
        peaks = {name: _manifest(run, stage)["peak_memory_mb"] for name, run in (("few", small), ("all", disturbed))}
        stages[stage] = {
            "equal": found.is_equal,
            "rows_lost": found.rows_lost,
            "rows_doubled": found.rows_doubled,
            "seconds_quiet": _manifest(quiet, stage)["seconds"],
            "peak_memory_mb": peaks,
        }
    return {"photographs": num_photos, "kills": kills, "stages": stages}


def _start(made: Cluster, stage: str, run: Path, data: Path) -> subprocess.Popen[str]:
    settings = [part for setting in _SETTINGS for part in ("--set", setting)]
    options = ("--preset", "tiny_cpu", "--data", data, *settings, "--ray-address", made.address)
    return start(stage, run, *options, environment=made.environment)


def _disturb(
    made: Cluster, stage: str, run: Path, data: Path, every: float, rng: random.Random, kills: dict[str, int]
) -> None:
    process = _start(made, stage, run, data)
    while True:
        try:
            printed, _ = process.communicate(timeout=every)
        except subprocess.TimeoutExpired:
            pass
        else:
            if process.returncode:
                raise RuntimeError(f"{stage} ended with {process.returncode}: {printed[-2000:]}")
            return
        workers = made.workers(WORKERS.get(stage, "nothing"))
        nodes = made.nodes[1:]
        what = rng.choice(["driver", *(["worker", "node"] if workers else [])])
        kills[what] += 1
        if what == "driver":
            kill(process)
            process = _start(made, stage, run, data)
        elif what == "worker":
            os.kill(rng.choice(workers), signal.SIGKILL)
        else:
            made.lose(rng.choice(nodes))
            made.add_node()


def _manifest(run: Path, stage: str) -> dict[str, Any]:
    return json.loads((run / f"{stage}.json").read_text())


if __name__ == "__main__":
    in_own_network("tests.faults.soak")
    typer.run(main)
