"""The single table of stages: inputs, outputs and function of each. Everything that lists stages is derived from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transfgu_ray.config.run import RunConfig

NAMES = "model/names.yaml"
# Takes a `pipeline.context.StageJob`, a class that packages below the pipeline may not import, and returns the content
# of the stage's manifest.
StageFunction = Callable[[Any], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: name of its command, its manifest `<name>.json` and its progress.
        sections: parts of the configuration that it reads beside those of the stages it follows, each `section` or
            `section.field`; its fingerprint is computed from them.
        outputs: files and folders that it writes to the run folder beside its manifest.
        unit: plural noun for what its progress counts.
        help: what it does and writes, in at most 55 characters: longer texts are cut in `transfgu --help`.
        run: a `StageFunction`, or `module:function`, which is imported when the stage is first run.
        follows: stage whose sections it reads too; None for the one before it in the table.
        unchecked: prefixes of output names for which no checksums are kept.
        reads_names: whether its output depends on the names of concepts.
        only_shows: whether its outputs only show those of earlier stages, so that nothing is made of them.
        feeds: stage that consumes its outputs. It is run whenever that stage has to be run, and its outputs are deleted
            once that stage is finished.
        is_wanted: whether a configuration includes this stage.
    """

    name: str
    sections: tuple[str, ...]
    outputs: tuple[str, ...]
    unit: str
    help: str
    run: str | StageFunction
    follows: str | None = None
    unchecked: tuple[str, ...] = ()
    reads_names: bool = False
    only_shows: bool = False
    feeds: str | None = None
    is_wanted: Callable[[RunConfig], bool] = lambda config: True

    @property
    def function(self) -> StageFunction:
        """Return the function that runs the stage, imported if needed."""
        if not isinstance(self.run, str):
            return self.run
        module, _, name = self.run.partition(":")
        function: StageFunction = getattr(import_module(module), name)
        return function


class StageTable:
    """The stages in the order in which they run."""

    def __init__(self, stages: tuple[Stage, ...]) -> None:
        self._stages = list(stages)

    def __iter__(self) -> Iterator[Stage]:
        return iter(self._stages)

    def __getitem__(self, name: str) -> Stage:
        return self._stages[self.index(name)]

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def add(self, stage: Stage, *, before: str) -> None:
        """Insert a stage.

        Args:
            stage: a stage with a name of its own.
            before: name of the stage that it comes before.

        Raises:
            ValueError: the name is taken.
        """
        if stage.name in self:
            raise ValueError(f"stage {stage.name} is already in the table")
        self._stages.insert(self.index(before), stage)

    def remove(self, name: str) -> None:
        """Take out a stage that was added."""
        del self._stages[self.index(name)]

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of all stages, in order."""
        return tuple(stage.name for stage in self)

    @property
    def lasting(self) -> tuple[str, ...]:
        """Return the names of the stages whose outputs stay: all but those that feed another."""
        return tuple(stage.name for stage in self if stage.feeds is None)

    def index(self, name: str) -> int:
        """Return the position of a stage.

        Raises:
            KeyError: there is no such stage.
        """
        try:
            return self.names.index(name)
        except ValueError:
            raise KeyError(name) from None

    def before(self, name: str) -> tuple[str, ...]:
        """Return the names of the stages before this one."""
        return self.names[: self.index(name)]

    def after(self, name: str) -> tuple[str, ...]:
        """Return the names of the stages after this one."""
        return self.names[self.index(name) + 1 :]

    def feeders(self, name: str) -> tuple[str, ...]:
        """Return the names of the stages that feed this one."""
        return tuple(stage.name for stage in self if stage.feeds == name)

    def sections(self, name: str) -> tuple[str, ...]:
        """Return every section of the configuration that a stage's output depends on, each once, in order."""
        stage, place = self[name], self.index(name)
        # A stage that feeds another reads only that stage's own settings, so it adds no sections.
        earlier = [each for each in self.before(name) if each in self.lasting]
        before = stage.follows or (earlier[-1] if place else None)
        inherited = () if before is None else self.sections(before)
        return tuple(dict.fromkeys((*inherited, *stage.sections)))


STAGES = StageTable(
    (
        Stage(
            name="extract",
            sections=("data", "encoder", "extract"),
            outputs=("features", "model/encoder.safetensors"),
            unit="photographs",
            help="Class tokens of sliding windows -> features/.",
            run="transfgu_ray.pipeline.features:run_stage",
        ),
        Stage(
            name="concepts",
            sections=("seed", "concepts"),
            outputs=("concepts.parquet", NAMES),
            unit="passes",
            help="k-means of the class tokens -> concepts.parquet.",
            run="transfgu_ray.pipeline.concepts:run_stage",
            # Edited by hand.
            unchecked=(NAMES,),
        ),
        Stage(
            name="labels",
            sections=("cam",),
            outputs=("labels",),
            unit="photographs",
            help="Response maps of all concepts -> labels/.",
            run="transfgu_ray.pipeline.labels:run_stage",
        ),
        Stage(
            name="tokens",
            sections=(
                "train.crop_size",
                "train.token_window",
                "train.backbone",
                "train.backbone_weights",
                "cam.batch_size",
            ),
            outputs=("tokens",),
            unit="photographs",
            help="Tokens of whole photographs -> tokens/, until trained.",
            run="transfgu_ray.pipeline.tokens:run_stage",
            follows="extract",
            unchecked=("tokens/",),
            feeds="train",
            is_wanted=lambda config: config.train.features == "cached" and config.train.decoder_weights is None,
        ),
        Stage(
            name="train",
            sections=("train",),
            outputs=(
                "train",
                "model/config.json",
                "model/backbone.safetensors",
                "model/decoder.safetensors",
                "model/decoder_round_0.safetensors",
            ),
            unit="epochs",
            help="Decoder in teacher-student rounds -> train/, model/.",
            run="transfgu_ray.pipeline.train:run_stage",
            # Written by Ray Train, whose checkpoints come and go.
            unchecked=("train/rounds-",),
        ),
        Stage(
            name="evaluate",
            sections=("evaluate",),
            outputs=("metrics.json", "samples", "baselines", "confusions", "extremes", "atlas", "atlas.json"),
            unit="photographs",
            help="Scores, where there are labels -> metrics.json.",
            run="transfgu_ray.pipeline.evaluate:run_stage",
            # Copies of pictures in report.html.
            unchecked=("samples/strip_",),
            reads_names=True,
        ),
        Stage(
            name="report",
            sections=(),
            outputs=("report.html", "atlas.html"),
            unit="pages",
            help="Self-contained pages -> report.html, atlas.html.",
            run="transfgu_ray.pipeline.pages:run_stage",
            reads_names=True,
            only_shows=True,
        ),
        Stage(
            name="register",
            sections=(),
            outputs=(),
            unit="models",
            help="MLflow run and registered model.",
            run="transfgu_ray.pipeline.register:run_stage",
            reads_names=True,
        ),
    )
)
