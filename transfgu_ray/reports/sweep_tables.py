"""What the trials of a sweep show: which is best, and whether the label-free score finds it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from scipy.stats import spearmanr

# Two trials are always in one order or the other: their rank correlation says nothing.
_MIN_TRIALS = 3
_ID_DIGITS = 8
_NOT_MEASURED = ""


def ranked(trials: Iterable[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    """Return the finished trials that have a value, highest first; the earliest first among equals.

    Args:
        trials: trials in the order they were drawn in, as in sweep.json.
        name: `score`, `miou`, or a component of the score.
    """
    finished = [(value_of(trial, name), trial) for trial in trials if trial["status"] == "finished"]
    known = [(value, trial) for value, trial in finished if value is not None]
    return [trial for _, trial in sorted(known, key=itemgetter(0), reverse=True)]


def best_trial(trials: Iterable[Mapping[str, Any]], objective: str) -> Mapping[str, Any] | None:
    """Return the finished trial with the highest `score` or `miou`, the earliest among equals; None if none has one."""
    return next(iter(ranked(trials, objective)), None)


def value_of(trial: Mapping[str, Any], name: str) -> float | None:
    """Return a trial's `score`, `miou` or a component of the score; None where it was not measured."""
    return trial[name] if name in ("score", "miou") else (trial["components"] or {}).get(name)


def evidence(trials: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]] | None:
    """Return how well the label-free score, and each component alone, finds the trial that labels would choose.

    Args:
        trials: trials in the order they were drawn in, as in sweep.json.

    Returns:
        `score` and each component -> {"spearman": rank correlation with mIoU over the finished trials, -1..1,
        "regret_miou": the best finished trial's mIoU minus that of the trial with the highest value, 0..1}. Both are
        null where fewer than three trials have a value, the correlation also where all values or all mIoU are equal.
        None where fewer than three finished trials have an mIoU.
    Reference: Spearman (1904), via scipy.stats.spearmanr, equal values at their mean rank. Departures: none.
    """
    labelled = [trial for trial in trials if trial["status"] == "finished" and trial["miou"] is not None]
    if len(labelled) < _MIN_TRIALS:
        return None
    names = dict.fromkeys(name for trial in labelled for name in trial["components"] or {})
    return {name: _evidence_of(labelled, name) for name in ("score", *names)}


def _evidence_of(labelled: Sequence[Mapping[str, Any]], name: str) -> dict[str, float | None]:
    chosen = ranked(labelled, name)
    if len(chosen) < _MIN_TRIALS:
        return {"spearman": None, "regret_miou": None}
    values, mious = [value_of(trial, name) for trial in chosen], [trial["miou"] for trial in chosen]
    varies = len(set(values)) > 1 and len(set(mious)) > 1
    return {
        "spearman": float(spearmanr(values, mious).statistic) if varies else None,
        "regret_miou": max(trial["miou"] for trial in labelled) - chosen[0]["miou"],
    }


def evidence_table(sweep: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows, one per score or component: how well it ranks the trials, and what its choice costs.

    Args:
        sweep: content of a sweep.json whose `evidence` is not null.
    """
    header = ["chosen by", "Spearman's rho", "regret, mIoU points", "its trial", "its mIoU, %"]
    rows = []
    for name, found in sweep["evidence"].items():
        labelled = [trial for trial in sweep["trials"] if trial["miou"] is not None]
        chosen = best_trial(labelled, name) if found["regret_miou"] is not None else None
        rows.append(
            [
                "score" if name == "score" else f"{name} alone",
                _number(found["spearman"]),
                _number(found["regret_miou"], 100),
                _NOT_MEASURED if chosen is None else short_id(chosen),
                _NOT_MEASURED if chosen is None else _number(chosen["miou"], 100),
            ]
        )
    return header, rows


def evidence_lines(sweep: Mapping[str, Any]) -> list[str]:
    """Return what the evidence rests on and the best trial by labels, or why there is no evidence."""
    labelled = ranked(sweep["trials"], "miou")
    if not labelled:
        return ["not scored: no finished trial has an mIoU, so there is nothing to judge the choice by"]
    if sweep["evidence"] is None:
        return [f"not scored: finished trials with an mIoU: {len(labelled)}; a rank correlation needs {_MIN_TRIALS}"]
    best = labelled[0]
    return [
        f"{len(labelled)} finished trials, split {sweep['split']}; the best by labels is {short_id(best)} with "
        f"{_number(best['miou'], 100)} % mIoU"
    ]


def sweep_table(sweep: Mapping[str, Any], wide: bool = False) -> tuple[list[str], list[list[str]]]:
    """Return header and rows, one per trial, the best by the objective first, those that did not finish last.

    Columns without any value are left out.

    Args:
        sweep: content of a sweep.json.
        wide: add the components of the score, and status, epochs and K even where they are the same for all trials;
            wider than most terminals.
    """
    trials = sweep["trials"]
    first = ranked(trials, sweep["objective"])
    # No two trials share an identity.
    known = {trial["id"] for trial in first}
    trials = [*first, *(trial for trial in trials if trial["id"] not in known)]
    measured = dict.fromkeys(name for trial in trials for name in trial["components"] or {}) if wide else ()
    titles = short_names(varying(sweep["space"]))
    settings = {title: [_setting(trial, name) for trial in trials] for name, title in titles.items()}
    about = {
        "status": [trial["status"] for trial in trials],
        "epochs": [_count(trial["epochs"]) for trial in trials],
        "K": [_count(trial["num_concepts"]) for trial in trials],
    }
    if not wide:
        about = {name: cells for name, cells in about.items() if len(set(cells)) > 1 and cells not in settings.values()}
    columns = {
        "trial": [short_id(trial) for trial in trials],
        **settings,
        **about,
        **{name: [_number(value_of(trial, name), digits=3) for trial in trials] for name in ("score", *measured)},
        "mIoU, %": [_number(trial["miou"], 100) for trial in trials],
    }
    columns = {title: cells for title, cells in columns.items() if any(cells) or not cells}
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def failed_trials(sweep: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the short id of each failed trial, and why it failed.

    Args:
        sweep: content of a sweep.json.
    """
    unknown = "no reason is known: its process may have been killed, see Ray's logs"
    return [(short_id(trial), trial["error"] or unknown) for trial in sweep["trials"] if trial["status"] == "failed"]


def varying(space: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a sweep varies, each with its values or its range."""
    return {name: values for name, values in space.items() if not isinstance(values, list) or len(values) > 1}


def short_names(settings: Iterable[str]) -> dict[str, str]:
    """Return setting -> its last part, if no other setting has the same: train.omega_1 -> omega_1."""
    settings = list(settings)
    last = [name.rpartition(".")[2] for name in settings]
    return {name: short if last.count(short) == 1 else name for name, short in zip(settings, last, strict=True)}


def short_id(trial: Mapping[str, Any]) -> str:
    """Return the digits of a trial's identity that are shown."""
    return str(trial["id"])[:_ID_DIGITS]


def value_text(value: Any) -> str:
    """Return a setting's value on one line, numbers to four digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return f"[{', '.join(map(value_text, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def _setting(trial: Mapping[str, Any], name: str) -> str:
    return value_text(trial["point"][name]) if name in trial["point"] else _NOT_MEASURED


def _count(value: int | None) -> str:
    return _NOT_MEASURED if value is None else str(value)


def _number(value: float | None, scale: float = 1, digits: int = 2) -> str:
    return _NOT_MEASURED if value is None else f"{scale * value:.{digits}f}"
