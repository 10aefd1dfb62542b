"""The command line. Heavy imports wait until a command needs them, so that `--help` answers at once."""

import signal
import sys
import warnings
from typing import NoReturn

import typer

from transfgu_ray.background import Stop, stoppable
from transfgu_ray.cli import catalogue, encoders, models, names, stages, studies
from transfgu_ray.cli.terminal import printable
from transfgu_ray.errors import ConfigError, TransfguError, UnfinishedError, foreign_words
from transfgu_ray.surroundings import settle_surroundings

app = typer.Typer(
    name="transfgu",
    help="Segment photographs into K classes without a single label (TransFGU), on a laptop or a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _name, (_help, _command) in stages.COMMANDS.items():
    app.command(name=_name, help=_help)(_command)
for _command in (
    names.names,
    models.predict,
    models.serve,
    models.compare,
    encoders.render,
    encoders.pretrain,
    encoders.probe,
    stages.demo,
    stages.verify,
    studies.ablate,
    studies.tune,
    studies.plan,
    studies.bench,
):
    app.command()(_command)
app.add_typer(catalogue.datasets, name="datasets")
app.add_typer(catalogue.presets, name="presets")


_LAST_WORDS = "transfgu: stopped; the same command goes on from here"


def main() -> None:
    """Run a command: wrong input ends in one sentence and exit code 2, a stop in exit code 128 + the signal."""
    # Deprecations in libraries concern developers, not users.
    warnings.simplefilter("ignore")
    stop = Stop()
    try:
        settle_surroundings()
        with stoppable(stop, _LAST_WORDS):
            _refuse_former_form(sys.argv[1:])
            app()
    except BaseException as error:
        # Whatever a stop has become on its way; but a command may take Ctrl-C as its regular end.
        if stop.by is not None and (stop.by == signal.SIGTERM or _code(error) != 0):
            typer.echo(_LAST_WORDS, err=True)
            sys.exit(128 + stop.by)
        _exit_told(error)
        raise


def _code(error: BaseException) -> object:
    """Return the exit code with which typer ends a command; 1 for an error."""
    return error.code or 0 if isinstance(error, SystemExit) else 1


def _exit_told(error: BaseException) -> None:
    """Exit with a sentence, if the error is of a kind that has one for the user."""
    if isinstance(error, TransfguError | OSError):
        from transfgu_ray.storage import storage_failure

        reported = error if isinstance(error, TransfguError) else storage_failure(error)
        if reported is not None:
            _exit_failed(str(reported), error, code=2)
    elif isinstance(error, UnfinishedError):
        _exit_failed(str(error), error, code=1)
    elif isinstance(error, ImportError | MemoryError) or "can't start new thread" in str(error):
        _exit_failed(
            f"this process lacks something to go on: {foreign_words(error)}; check its limits (`ulimit -a`), its "
            "memory and the installation",
            error,
            code=2,
        )


def _refuse_former_form(arguments: list[str]) -> None:
    """Refuse `transfgu concepts name RUN FILE`, as versions before 0.2 had it.

    Raises:
        ConfigError: it is that.
    """
    if arguments[:2] == ["concepts", "name"] and any(not word.startswith("-") for word in arguments[2:3]):
        raise ConfigError("`transfgu concepts name RUN FILE` is now `transfgu names RUN FILE`")


def _exit_failed(sentence: str, error: BaseException, *, code: int) -> NoReturn:
    from transfgu_ray.runs.logs import log_of

    typer.echo(printable(f"transfgu: {sentence}"), err=True)
    if log := log_of(error):
        typer.echo(printable(f"transfgu: the log has more: {log}"), err=True)
    sys.exit(code)
