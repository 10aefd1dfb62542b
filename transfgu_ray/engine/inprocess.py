"""Units of photographs without Ray, in threads of this process: for few photographs its start takes longest."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from transfgu_ray.config.sections import RuntimeConfig
from transfgu_ray.cores import usable_cores
from transfgu_ray.engine.session import Resources
from transfgu_ray.errors import ConfigError
from transfgu_ray.runs.logs import begin_work

# Photographs from which on Ray's start is a small share of the work.
FEWEST_FOR_RAY = 200
_ENDING_S = 10.0


def own_resources(runtime: RuntimeConfig) -> Resources:
    """Return the resources of this process, for units that run in it; see `Resources.in_process`.

    Raises:
        ConfigError: cuda is asked for and this machine has none.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if runtime.device == "cuda" and not has_gpu:
        raise ConfigError("runtime.device=cuda, but torch finds no GPU on this machine; use auto or cpu")
    begin_work()
    cores, on_gpu = usable_cores(), has_gpu and runtime.device != "cpu"
    return Resources(
        num_cores=cores,
        num_workers=runtime.num_workers or (1 if on_gpu else max(1, cores // runtime.threads)),
        train_workers=1,
        device="cuda" if on_gpu else "cpu",
        threads=runtime.threads,
        num_blocks=None,
        in_process=True,
    )


def each_in_threads(
    units: Sequence[int], work: Callable[[], Callable[[int], Any]], num_threads: int, ended: threading.Event
) -> Iterator[Any]:
    """Yield the result of each unit as it comes, in no particular order.

    Args:
        units: numbers of the units.
        work: makes the function that turns a unit into its result; called once in each thread.
        num_threads: threads, at most.
        ended: set once no more results are wanted; units at work should then end soon.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for unit in units:
        waiting.put(unit)
    results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            process = work()
            while not ended.is_set():
                results.put((process(waiting.get_nowait()), None))
        except queue.Empty:
            return
        # Any error ends the call in the thread that asked for it.
        except BaseException as error:  # noqa: BLE001
            results.put((None, error))

    # Daemons: a thread that hangs in a read must not keep a stopped command alive.
    threads = [
        threading.Thread(target=run, name=f"units {i}", daemon=True) for i in range(min(num_threads, len(units)))
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in units:
            result, error = results.get()
            if error is not None:
                raise error
            yield result
    finally:
        ended.set()
        for thread in threads:
            # Or the interpreter would end amid their work.
            thread.join(_ENDING_S)
