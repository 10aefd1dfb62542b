"""Streaming of units of photographs through Ray Data into an actor pool, or through threads of this process.

A unit is a fixed run of consecutive photographs. One call of a worker turns one unit into one artifact, which is named
after the unit and written atomically. So results do not depend on the number of workers or blocks, the unit of a killed
actor is repeated, and a rerun skips units whose artifact exists.
"""

import itertools
import logging
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa

from transfgu_ray.datasets.listing import read_pairs
from transfgu_ray.datasets.photographs import ImageRef
from transfgu_ray.engine.inprocess import each_in_threads
from transfgu_ray.engine.logs import divert_ray_loggers
from transfgu_ray.engine.progress import Progress
from transfgu_ray.engine.session import READER_CPUS, WORKER_CPUS, Resources
from transfgu_ray.engine.signs import Sign, signs_of_life
from transfgu_ray.errors import TransfguError
from transfgu_ray.storage import Folder, storage_failure

_MAX_BLOCKS = 1000
Item = TypeVar("Item")
_LOGGER = logging.getLogger("transfgu_ray")


def peak_memory_mb() -> int:
    """Return the peak resident memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


@dataclass(frozen=True)
class Photo:
    """One photograph of a unit, as read.

    Attributes:
        image_id: see `ImageRef`.
        data: encoded bytes; None if it could not be read.
        label: encoded label bytes; None without a label.
        error: why it, or its label, could not be read.
        place: see `ImageRef`; "" stands for the file `image_id`.
    """

    image_id: str
    data: bytes | None
    label: bytes | None
    error: str | None
    place: str = ""


class UnitWorker:
    """Base class of the workers. Subclasses load models in `__init__` and implement `process`."""

    def __init__(self, device: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.device = device
        self._alive: Callable[[], None] = lambda: None

    def signed(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items of a loop inside a unit, with a sign of life before each: results reach the driver late."""
        for item in items:
            self._alive()
            yield item

    def process(self, unit: int, photos: list[Photo]) -> bytes:
        """Process one unit; the result is sent to the driver, so it must be small."""
        raise NotImplementedError

    def run(self, unit: int, photos: list[Photo], sign: Callable[[], None]) -> dict[str, Any]:
        """Return the result of a unit, and where and how it was made.

        Args:
            unit: its number.
            photos: its photographs, at least one.
            sign: called inside the unit, as a sign of life.
        """
        self._alive = sign
        node, started, pid = socket.gethostname(), time.perf_counter(), os.getpid()
        try:
            result = self.process(unit, photos)
        except Exception as error:
            note = f"in unit {unit}, which begins with {photos[0].image_id}, on node {node}, pid {pid}"
            # Ray Data may repeat a failed call with the same error.
            if note not in getattr(error, "__notes__", ()):
                error.add_note(note)
            raise
        seconds = time.perf_counter() - started
        return {
            "unit": unit, "result": result, "peak_mb": peak_memory_mb(), "node": node, "pid": pid, "seconds": seconds
        }  # fmt: skip


_RESULT = pa.schema(
    {
        "unit": pa.int64(), "result": pa.binary(), "peak_mb": pa.int64(), "node": pa.string(), "pid": pa.int64(),
        "seconds": pa.float64(),
    }
)  # fmt: skip


class _Started:
    """A worker in its actor. What its constructor raises for the user to read is raised by the first unit instead.

    An error in the constructor of an actor reaches the driver as text alone.
    """

    def __init__(self, worker: Callable[..., UnitWorker], **arguments: Any) -> None:
        self._error: Exception | None = None
        try:
            self._worker = worker(**arguments)
        except Exception as error:
            if not isinstance(error, TransfguError) and storage_failure(error) is None:
                raise
            self._error = error

    def __call__(self, table: pa.Table, sign: Sign) -> pa.Table:
        """Turn a row with a unit's photographs, see `_read_unit`, into the row that the worker makes of it."""
        if self._error is not None:
            raise self._error
        (row,) = table.to_pylist()
        columns = (row[name] for name in ("image_ids", "data", "labels", "errors", "places"))
        photos = [Photo(*values) for values in zip(*columns, strict=True)]
        return pa.Table.from_pylist([self._worker.run(row["unit"], photos, sign)], _RESULT)


@dataclass(frozen=True)
class UnitResult:
    """The result of a unit.

    Attributes:
        unit: number of the unit.
        result: what `process` returned.
        peak_mb: peak resident memory of the worker's process so far, MB.
    """

    unit: int
    result: bytes
    peak_mb: int


def even_ranges(count: int, num_parts: int) -> list[range]:
    """Return consecutive ranges that cover `range(count)` and differ in length by at most one."""
    edges = [count * part // num_parts for part in range(num_parts + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(edges)]


def split_units(images: Sequence[ImageRef], images_per_unit: int) -> list[Sequence[ImageRef]]:
    """Split photographs into consecutive runs; the index in the list is the unit's number."""
    return [images[i : i + images_per_unit] for i in range(0, len(images), images_per_unit)]


def stream_units(
    root: Folder,
    units: Mapping[int, Sequence[ImageRef]],
    *,
    worker: Callable[..., UnitWorker],
    arguments: Mapping[str, Any],
    resources: Resources,
    progress: Progress,
) -> Iterator[UnitResult]:
    """Run `worker(**arguments)` over all units and yield each result as it comes, in no particular order.

    Args:
        root: root of the dataset.
        units: photographs of each unit.
        worker: class of the workers.
        arguments: keyword arguments of the class.
        resources: number and kind of workers, and whether they are Ray's actors.
        progress: gets the signs of life that workers give inside their units; the caller counts the results.

    Raises:
        TransfguError: raised by a worker because the user's input is wrong.
    """
    if not units:
        return
    given = {"device": resources.device, "threads": resources.threads, **arguments}
    work = _Work(root, units, worker, given, resources)
    rows = _in_process(work, progress) if resources.in_process else _on_ray(work, progress)
    with unwrapped_errors():
        for row in rows:
            _LOGGER.debug(
                "unit %d: done in %.2f s by %s on node %s, pid %d, peak memory %d MB",
                row["unit"],
                row["seconds"],
                getattr(worker, "__name__", worker),
                row["node"],
                row["pid"],
                row["peak_mb"],
            )
            yield UnitResult(row["unit"], row["result"], row["peak_mb"])


@dataclass(frozen=True)
class _Work:
    """The arguments of `stream_units`; those of the worker are whole."""

    root: Folder
    units: Mapping[int, Sequence[ImageRef]]
    worker: Callable[..., UnitWorker]
    arguments: Mapping[str, Any]
    resources: Resources


def _in_process(work: _Work, progress: Progress) -> Iterator[dict[str, Any]]:
    """Yield the rows that workers in threads of this process return."""
    ended = threading.Event()

    def sign() -> None:
        if ended.is_set():
            raise InterruptedError
        progress()

    def start() -> Callable[[int], dict[str, Any]]:
        own = work.worker(**work.arguments)
        return lambda unit: own.run(unit, _read(work.root, *_columns(work.units[unit])), sign)

    yield from each_in_threads(sorted(work.units), start, work.resources.num_workers, ended)


def _on_ray(work: _Work, progress: Progress) -> Iterator[dict[str, Any]]:
    """Yield the rows that actors of Ray return."""
    set_up_ray_data()
    with signs_of_life(lambda _: progress()) as sign:
        for batch in _dataset(work, sign).iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from batch.to_pylist()


def _dataset(work: _Work, sign: Sign) -> Any:
    """Return the dataset of the rows that the actors will return."""
    import ray
    from ray.data import ActorPoolStrategy, TaskPoolStrategy

    resources = work.resources
    # As Any: Ray's types for mapped functions do not include Arrow tables.
    blocks: Any = ray.data.from_arrow(_unit_blocks(work.units, resources.num_blocks))
    return blocks.map_batches(
        _read_unit,
        fn_kwargs={"root_uri": work.root.uri},
        batch_format="pyarrow",
        batch_size=1,
        # Without a limit, Ray starts as many processes as fractions of a CPU allow.
        compute=TaskPoolStrategy(size=resources.num_workers),
        num_cpus=READER_CPUS,
    ).map_batches(
        _Started,
        fn_kwargs={"sign": sign},
        fn_constructor_kwargs={"worker": work.worker, **work.arguments},
        batch_format="pyarrow",
        batch_size=1,
        compute=ActorPoolStrategy(size=min(resources.num_workers, len(work.units))),
        num_cpus=WORKER_CPUS,
        num_gpus=resources.gpus_per_worker or None,
    )


def set_up_ray_data() -> None:
    """Make Ray Data print nothing, raise the worker's own errors, whose cause its wrapper loses, and never give up.

    Its own guard sees only whole blocks, so work would end that goes on inside of one: `unless_stalled` watches it.
    """
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    context.execution_no_progress_timeout_s = -1
    divert_ray_loggers()


@contextmanager
def unwrapped_errors() -> Iterator[None]:
    """Replace a Ray error by the `TransfguError` that it carries, or by the storage failure that it stems from."""
    try:
        yield
    except Exception as error:
        for cause in _causes(error):
            # Ray's wrapper is also an instance of its cause's type, but its message is a remote traceback.
            if hasattr(cause, "cause"):
                continue
            if isinstance(cause, TransfguError):
                # Ray Data appends lines of its own to the message.
                raise type(cause)(str(cause).partition("\nFailed to apply UDF")[0]) from None
            if failure := storage_failure(cause):
                raise failure from None
        raise


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and its causes, as Python, Ray and Ray Train attach them."""
    yield error
    of_training = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None)]
    for cause in (getattr(error, "cause", None) or error.__cause__, *of_training):
        if cause is not None:
            yield from _causes(cause)


def _columns(images: Sequence[ImageRef]) -> tuple[list[str], list[str], list[str | None]]:
    """Return what is to be known of photographs to read them: image_id, place and place of the label."""
    return (
        [image.image_id for image in images],
        [image.place for image in images],
        [image.label_id for image in images],
    )


def _read(
    root: Folder, image_ids: Sequence[str], places: Sequence[str], label_ids: Sequence[str | None]
) -> list[Photo]:
    pairs = read_pairs(root, places, label_ids)
    return [Photo(name, *pair, place) for name, pair, place in zip(image_ids, pairs, places, strict=True)]


def _unit_blocks(units: Mapping[int, Sequence[ImageRef]], num_blocks: int | None) -> list[pa.Table]:
    numbers = sorted(units)
    blocks = even_ranges(len(numbers), min(num_blocks or _MAX_BLOCKS, len(numbers)))
    # One after the other: as Python's objects, names take several times the memory.
    return [_unit_block({n: units[n] for n in numbers[rows.start : rows.stop]}) for rows in blocks]


def _unit_block(units: Mapping[int, Sequence[ImageRef]]) -> pa.Table:
    columns = zip(*map(_columns, units.values()), strict=True)
    lists = {
        name: pa.array(values, pa.list_(pa.string()))
        for name, values in zip(("image_ids", "places", "label_ids"), columns, strict=True)
    }
    return pa.table({"unit": pa.array([*units], pa.int64()), **lists})


def _read_unit(table: pa.Table, root_uri: str) -> pa.Table:
    """Add the encoded bytes of every photograph, and of its label if it has one."""
    root = Folder(root_uri)
    (row,) = table.to_pylist()
    photos = _read(root, row["image_ids"], row["places"], row["label_ids"])
    return pa.table(
        {
            "unit": [row["unit"]],
            "image_ids": pa.array([row["image_ids"]], pa.list_(pa.string())),
            "data": pa.array([[photo.data for photo in photos]], pa.list_(pa.large_binary())),
            "labels": pa.array([[photo.label for photo in photos]], pa.list_(pa.large_binary())),
            "errors": pa.array([[photo.error for photo in photos]], pa.list_(pa.string())),
            "places": pa.array([row["places"]], pa.list_(pa.string())),
        }
    )
