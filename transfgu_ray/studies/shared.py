"""The stages that trials share, run once each below SWEEP/shared and named by the settings they depend on."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from transfgu_ray.config.run import RunConfig
from transfgu_ray.engine.progress import Reporter
from transfgu_ray.pipeline.run import run_stages
from transfgu_ray.runs.run import Run
from transfgu_ray.runs.stages import STAGES
from transfgu_ray.storage import Folder

# All that comes before training and lasts.
SHARED = STAGES.lasting[: STAGES.lasting.index("train")]


class SharedStages:
    """The shared runs of a sweep.

    Args:
        folder: of the sweep.
        base: configuration that the trials change.
    """

    def __init__(self, folder: Folder, base: RunConfig) -> None:
        self._folder = folder
        self._base = base

    def bank(self, config: RunConfig) -> Run:
        """Open the run that holds features, concepts, bank and cached tokens of a trial."""
        return self._open("labels", config)

    def make(self, configs: Iterable[RunConfig], reporter: Reporter) -> None:
        """Make the features, banks and tokens that the trials need and that are missing, each distinct one once.

        The runs of banks refer to the features, and all banks of the same features to the same tokens.

        Raises:
            TransfguError: settings, data or weights are unusable.
        """
        with_tokens: dict[str, Run] = {}
        for place, _ in self._banks(configs):
            run = Run.open(place.folder.uri, place.config)
            features = self._open("extract", run.config)
            if features.folder.uri not in with_tokens:
                run_stages(features, SHARED[:1], address=None, reporter=reporter)
            if run.manifest("extract") is None:
                run.refer_stage(features, "extract")
            source = with_tokens.setdefault(features.folder.uri, run)
            if source is not run and source.manifest("tokens") is not None:
                run.refer_stage(source, "tokens")
            run_stages(run, (*SHARED, "tokens"), address=None, reporter=reporter)

    def give(self, target: Run) -> None:
        """Let a trial refer to the tables of the shared stages and copy all else, unless it is trained already."""
        if target.manifest("train") is not None:
            return
        source = self.bank(target.config)
        for stage in (*SHARED, "tokens"):
            if source.manifest(stage) is not None:
                target.refer_stage(source, stage)

    def drop_tokens(self, configs: Iterable[RunConfig]) -> None:
        """Delete the cached tokens, which are large and not needed once every trial has ended."""
        for place, _ in self._banks(configs):
            place.clear("tokens")

    def describe(self, configs: Iterable[RunConfig]) -> list[dict[str, Any]]:
        """Return stage, fingerprint, seconds and number of these trials for each stage of the shared runs."""
        stages: dict[str, dict[str, Any]] = {}
        for run, uses in self._banks(configs):
            for manifest in filter(None, map(run.manifest, SHARED)):
                entry = {"stage": manifest["stage"], "fingerprint": manifest["fingerprint"], "used_by": 0}
                entry |= {"seconds": manifest["seconds"]}
                stages.setdefault(manifest["fingerprint"], entry)["used_by"] += uses
        return sorted(stages.values(), key=lambda entry: SHARED.index(entry["stage"]))

    def _banks(self, configs: Iterable[RunConfig]) -> list[tuple[Run, int]]:
        """Return the distinct runs that hold the banks of trials, each with the number of trials that use it."""
        places = [self._place("labels", config) for config in configs]
        used_by = Counter(place.folder.uri for place in places)
        return [(place, used_by[uri]) for uri, place in {place.folder.uri: place for place in places}.items()]

    def _open(self, stage: str, config: RunConfig) -> Run:
        place = self._place(stage, config)
        return Run.open(place.folder.uri, place.config)

    def _place(self, stage: str, config: RunConfig) -> Run:
        """Return the shared run of a stage, which for later stages has the settings of the base."""
        changed: dict[str, Any] = {"extract": config.extract}
        if stage == "labels":
            changed |= {"seed": config.seed, "concepts": config.concepts, "cam": config.cam}
        run = Run(self._folder, self._base.model_copy(update=changed))
        return Run(Folder(self._folder.uri_of(f"shared/{stage}-{run.settings_key(stage)}")), run.config)
