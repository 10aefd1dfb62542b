"""Ray's own output, sent to the log `transfgu_ray` instead of the terminal."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LOGGER = logging.getLogger("transfgu_ray")
# Ray libraries that log in the driver; those that do not propagate to `ray` need a handler of their own.
_OF_RAY = ("ray", "ray.data", "ray.train", "ray.tune", "ray.serve")
_PRINTED = "ray_print_logs"


class _Forward(logging.Handler):
    """A handler that passes records of another logger on to ours."""

    def emit(self, record: logging.LogRecord) -> None:
        # Ray Data logs tracebacks of errors that it also raises, which are logged anyway.
        if not record.name.startswith("ray.data.exceptions"):
            _LOGGER.handle(record)


_forward = _Forward(logging.WARNING)


def divert_ray_loggers() -> None:
    """Send warnings and errors that Ray logs in this process to our log; call it again after importing a Ray library.

    Ray's libraries set up their loggers on import, each with a handler that prints.
    """
    for name in _OF_RAY:
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
        for handler in logger.handlers:
            # Handlers that write to Ray's session folder stay as they are.
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.CRITICAL + 1)
        if (name == "ray" or not logger.propagate) and _forward not in logger.handlers:
            logger.addHandler(_forward)
    # Otherwise Python's root logger would print them.
    logging.getLogger("ray").propagate = False


@contextmanager
def diverted_prints() -> Iterator[None]:
    """Send what workers print to our log, each line with its node and process. Ray must be running.

    Ray started with `log_to_driver` passes the lines to this process, which would print them.
    """
    try:
        # A private module: without it, what workers print stays in Ray's session folder.
        from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher
    except ImportError:
        yield
        return

    last: dict[Any, tuple[str, int]] = {}

    def log(data: dict[str, Any]) -> None:
        # The autoscaler prints a page every five seconds, and every process says which environment it obeys.
        if data.get("pid") == "autoscaler":
            return
        process = data.get("actor_name") or data.get("task_name") or "worker", data.get("ip"), data.get("pid")
        for line in data.get("lines") or ():
            text = str(line).rstrip()
            if not text or "Set ray log level from environment" in text:
                continue
            said, times = last.get(process, ("", 0))
            # Some processes repeat a line every second, for hours.
            if text == said:
                last[process] = text, times + 1
                continue
            if times > 1:
                _LOGGER.info("%s, node %s, pid %s: (%d times)", *process, times)
            last[process] = text, 1
            _LOGGER.info("%s, node %s, pid %s: %s", *process, text)

    dispatcher.remove_handler(_PRINTED)
    dispatcher.add_handler("transfgu_ray", log)
    try:
        yield
    finally:
        dispatcher.remove_handler("transfgu_ray")
