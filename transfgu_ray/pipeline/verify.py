"""Every file of a run against its checksum: what later commands only compare by size and time is read here."""

from collections.abc import Callable, Iterator
from typing import Any

from transfgu_ray.engine.prefetch import in_order
from transfgu_ray.engine.progress import Reporter
from transfgu_ray.engine.session import READER_CPUS, Resources, ray_session
from transfgu_ray.engine.signs import Sign, signs_of_life
from transfgu_ray.engine.stream import unwrapped_errors
from transfgu_ray.errors import ArtifactError
from transfgu_ray.runs.checksums import hash_files, record_name
from transfgu_ray.runs.references import RunFiles
from transfgu_ray.runs.run import Run, and_more
from transfgu_ray.runs.stages import STAGES
from transfgu_ray.storage import Folder

_FILES_PER_TASK = 16


def verify(run: Run, *, address: str | None, reporter: Reporter) -> int:
    """Read every file of the finished stages and return their number.

    Raises:
        ArtifactError: some are damaged or missing; it names them, and `transfgu run` will make them again.
    """
    stages = [stage for stage in STAGES.lasting if run.manifest(stage) is not None]
    if not stages:
        raise ArtifactError(f"{run.folder.uri} has no finished stage; there is nothing to verify")
    damaged, count = [], 0
    with ray_session(address, run.config.runtime, note=reporter.note) as resources:
        for stage in stages:
            recorded = run.recorded_files(stage)
            if recorded is None:
                damaged.append(record_name(stage))
            # The last stage leaves its result elsewhere.
            if not recorded:
                continue
            with reporter.stage(stage, len(recorded), "files") as progress, signs_of_life(lambda _: None) as sign:
                found = []
                for wrong, read in _compare(run, recorded, resources, sign):
                    progress(read)
                    found += wrong
            if found:
                run.suspect(stage, sorted(found))
            damaged += sorted(found)
            count += len(recorded)
    if damaged:
        raise ArtifactError(
            f"{run.folder.uri}: {damaged[0]}{and_more(damaged)}: damaged or missing; `transfgu run` makes them again"
        )
    return count


def _compare(
    run: Run, recorded: dict[str, dict[str, Any]], resources: Resources, sign: Sign
) -> Iterator[tuple[list[str], int]]:
    """Yield the names of some damaged files, and the number of files read, until all are."""
    import ray

    # As Any: Ray's types for remote functions do not cover keyword arguments.
    function: Any = _wrong_files
    task = ray.remote(function).options(num_cpus=READER_CPUS, scheduling_strategy="DEFAULT")
    names, uri = list(recorded), run.folder.uri
    chunks = [names[start : start + _FILES_PER_TASK] for start in range(0, len(names), _FILES_PER_TASK)]
    calls = (task.remote(uri, {name: recorded[name]["sha256"] for name in chunk}, sign) for chunk in chunks)
    finish: Callable[[Any], list[str]] = ray.get
    with unwrapped_errors():
        yield from zip(in_order(calls, finish, 2 * resources.num_cores), map(len, chunks), strict=True)


def _wrong_files(run_uri: str, recorded: dict[str, str], sign: Sign) -> list[str]:
    """Return the names of files that are missing or have another sha256 than was recorded."""
    files, wrong = RunFiles(Folder(run_uri)), []
    for name, sha256 in recorded.items():
        sign()
        try:
            found = hash_files(files, [name])[name]
        except FileNotFoundError:
            found = ""
        if found != sha256:
            wrong.append(name)
    return wrong
