"""Ray's own words, led into the log `transfgu_ray` instead of the terminal."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LOGGER = logging.getLogger("transfgu_ray")
# Libraries of Ray that log in the driver; those that do not propagate to `ray` need a handler of their own.
_OF_RAY = ("ray", "ray.data", "ray.train", "ray.tune", "ray.serve")
_PRINTED = "ray_print_logs"


class _Forward(logging.Handler):
    """Hands records of another logger on to ours."""

    def emit(self, record: logging.LogRecord) -> None:
        # Tracebacks of what is raised, and so logged, anyway.
        if not record.name.startswith("ray.data.exceptions"):
            _LOGGER.handle(record)


_forward = _Forward(logging.WARNING)


def divert_ray_loggers() -> None:
    """Lead warnings and errors that Ray logs in this process into our log; call it again after a library is imported.

    Ray's libraries set their loggers up on import, each with a handler that prints.
    """
    for name in _OF_RAY:
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
        for handler in logger.handlers:
            # Ray's files, in its session folder, stay as they are.
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.CRITICAL + 1)
        if (name == "ray" or not logger.propagate) and _forward not in logger.handlers:
            logger.addHandler(_forward)
    # Else Python's root logger would print them.
    logging.getLogger("ray").propagate = False


@contextmanager
def diverted_prints() -> Iterator[None]:
    """Lead what workers print into our log, each line with its node and process. Ray must be running.

    Ray hands the lines to this process where it was started with `log_to_driver`; it would print them.
    """
    try:
        # A private module: without it what workers print stays in Ray's session folder.
        from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher
    except ImportError:
        yield
        return

    def log(data: dict[str, Any]) -> None:
        # The autoscaler prints a page every five seconds, and every process that it obeys the environment.
        if data.get("pid") == "autoscaler":
            return
        level = logging.WARNING if data.get("is_err") else logging.INFO
        who = data.get("actor_name") or data.get("task_name") or "worker"
        for line in data.get("lines") or ():
            if (text := str(line).rstrip()) and "Set ray log level from environment" not in text:
                _LOGGER.log(level, "%s, node %s, pid %s: %s", who, data.get("ip"), data.get("pid"), text)

    dispatcher.remove_handler(_PRINTED)
    dispatcher.add_handler("transfgu_ray", log)
    try:
        yield
    finally:
        dispatcher.remove_handler("transfgu_ray")
