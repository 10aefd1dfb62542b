"""Tune's schedulers, and Optuna as a search that never suggests a point twice."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from ray.tune import Callback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from transfgu_ray.studies.spaces import Range, Space, expand
from transfgu_ray.studies.trials import POINT

# After this many known suggestions in a row, no new point is expected.
_MAX_KNOWN = 100


def new_scheduler(name: str, num_epochs: int) -> TrialScheduler:
    """Return the scheduler that stops trials by the scores of their epochs.

    Args:
        name: `none`, `asha` (Li et al. 2020) or `median` (Golovin et al. 2017).
        num_epochs: of a complete trial.
    """
    grace = max(1, num_epochs // 4)
    if name == "asha":
        # One more than there are, so that a complete trial counts as finished, not as stopped.
        return ASHAScheduler(time_attr="epoch", grace_period=grace, max_t=num_epochs + 1, reduction_factor=2)
    if name == "median":
        return MedianStoppingRule(time_attr="epoch", grace_period=grace, min_samples_required=3)
    return FIFOScheduler()  # type: ignore[no-untyped-call]  # Ray annotates no return


class Ended(Callback):
    """Reports each trial as soon as it has ended.

    Args:
        on_end: takes its point, and its status unless its last stage is done: `stopped` or `failed`.
        on_epoch: called whenever a trial has finished an epoch.
    """

    def __init__(self, on_end: Callable[[dict[str, Any], str], None], on_epoch: Callable[[], None]) -> None:
        self._on_end, self._on_epoch = on_end, on_epoch

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing to pickle: Tune never restores a sweep here, and a terminal's lock cannot be pickled."""
        return {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[Any, Any], **info: Any
    ) -> None:
        """Report an epoch."""
        self._on_epoch()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Report a trial that was completed or stopped."""
        self._on_end(json.loads(trial.config[POINT]), "stopped")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Report a trial that raised an exception."""
        self._on_end(json.loads(trial.config[POINT]), "failed")


class NewPoints(OptunaSearch):
    """Ray's adaptor of Optuna, which here suggests no point twice and gives points as text.

    The sampler is Optuna's tree-structured Parzen estimator (Bergstra et al. 2011).

    Args:
        space: what varies.
        seed: of the sampler.
        metric: what is maximised.
        known: point and result of each finished trial.
        taken: points of trials that were stopped.
        first: points to suggest before new ones.
    """

    def __init__(
        self,
        space: Space,
        seed: int,
        *,
        metric: str,
        known: Sequence[tuple[Mapping[str, Any], float]],
        taken: Sequence[Mapping[str, Any]],
        first: Sequence[Mapping[str, Any]],
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._values = space
        self._seen = {to_text(point) for point in (*(point for point, _ in known), *taken)}
        super().__init__(
            {key: _distribution(values) for key, values in space.items()},
            metric=metric,
            mode="max",
            seed=seed,
            points_to_evaluate=[self._parameters(point) for point, _ in known],
            evaluated_rewards=[value for _, value in known],
        )
        # Ray's adaptor takes either points with results or points without.
        for point in first:
            self._study.enqueue_trial(self._parameters(point))

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # Ray omits FINISHED
        """Return a new point as text; FINISHED where none seems to be left."""
        for _ in range(_MAX_KNOWN):
            parameters = super().suggest(trial_id)
            assert parameters is not None
            choice = {
                key: parameters[key] if isinstance(values, Range) else values[parameters[key]]
                for key, values in self._values.items()
            }
            text = to_text(expand(choice))
            if text not in self._seen:
                self._seen.add(text)
                return {POINT: text}
            # Ray's adaptor repeats its suggestion for a trial that it knows.
            self._study.tell(self._ot_trials.pop(trial_id), state=optuna.trial.TrialState.FAIL)
        return Searcher.FINISHED

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Ignore an epoch's score: Optuna prunes nothing here, and warns when a restarted trial repeats an epoch."""

    @property
    def _study(self) -> Any:
        # Ray annotates only the value that it has before the study is made.
        return self._ot_study

    def _parameters(self, point: Mapping[str, Any]) -> dict[str, Any]:
        # Lists cannot be Optuna's categories, so it chooses among their positions.
        parameters = {}
        for key, values in self._values.items():
            if isinstance(values, Range):
                parameters[key] = point[key]
            else:
                parameters[key] = next(
                    i for i, value in enumerate(values) if expand({key: value}).items() <= point.items()
                )
        return parameters


def _distribution(values: Sequence[Any] | Range) -> optuna.distributions.BaseDistribution:
    if not isinstance(values, Range):
        return optuna.distributions.CategoricalDistribution(list(range(len(values))))
    if values.is_whole:
        return optuna.distributions.IntDistribution(int(values.low), int(values.high), log=values.log)
    return optuna.distributions.FloatDistribution(values.low, values.high, log=values.log)


def to_text(point: Mapping[str, Any]) -> str:
    """Return a point in the form in which a trial takes it."""
    return json.dumps(point)
