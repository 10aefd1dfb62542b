"""Closing lines that several commands share."""

from collections.abc import Mapping
from typing import Any

from transfgu_ray.cli.terminal import Terminal, duration, printable


def note_pages(terminal: Terminal, opened: Any) -> None:
    """Print where the pages of a run are."""
    for title, page in (("report", "report.html"), ("concepts", "atlas.html")):
        if opened.folder.exists(page):
            terminal.note(f"{title}: {opened.folder.uri_of(page)}")


def note_passed_over(terminal: Terminal, passed_over: Mapping[str, int]) -> None:
    """Print which files were not taken for photographs, unless nobody would."""
    from transfgu_ray.datasets.listing import passed_over_words

    if told := passed_over_words(passed_over):
        terminal.note(f"passed over: {', '.join(told)}")


def note_refused(terminal: Terminal, refused: list[dict[str, str]], most: int = 20) -> None:
    """Print which photographs were refused and why, the first ones by name."""
    if not refused:
        return
    terminal.note(f"refused {len(refused)} photographs:")
    for refusal in refused[:most]:
        terminal.note(printable(f"  {refusal['image_id']}: {refusal['reason']}"))
    if len(refused) > most:
        terminal.note(f"  and {len(refused) - most} more, named in the manifests")


def note_scores(terminal: Terminal, metrics: dict[str, Any]) -> None:
    """Print the score table of metrics.json, or that there is none."""
    if not metrics["scored"]:
        terminal.note(f"nothing was scored: dataset {metrics['dataset']} has no labels")
        return
    from transfgu_ray.reports.score_tables import score_lines, score_table

    (first, *others), rows = score_table(metrics)
    # Two lines, so that methods keep one in 80 columns.
    terminal.table(rows, [first, *(name.replace(" ", "\n") for name in others)])
    for line in score_lines(metrics):
        terminal.note(line)


def note_plan(terminal: Terminal, planned: dict[str, Any]) -> None:
    """Print what a run will cost, by stage and by image size, and what that is founded on."""
    card, tflops = planned["card"], planned["gpu_tflops"]
    of_gpus = [f"{n} GPU{'s' if n > 1 else ''}" for n in planned["all"]["gpu_seconds"]]
    if card is None:
        of_gpus = [f"{name},\nat least" for name in of_gpus]
    header = ["stage", "encoder\nforwards", "PFLOP", "GB kept", "time here", *of_gpus]
    rows = [
        [
            row["stage"],
            f"{row['forwards']:,}",
            _figure(row["operations"] / 1e15),
            f"{row['num_bytes'] / 1e9:.3f}",
            duration(row["seconds"]),
            *map(duration, row["gpu_seconds"].values()),
        ]
        for row in (*planned["stages"], {"stage": "all", **planned["all"]})
    ]
    terminal.table(rows, header)
    terminal.note("")
    sizes = [
        [
            f"{' x '.join(map(str, row['image_hw']))} px, {'class token' if row['class_only'] else 'all tokens'}",
            f"{row['count']:,}",
            _figure(row["operations_each"] / 1e9),
            _figure(row["count"] * row["operations_each"] / 1e15),
        ]
        for row in planned["passes"]
    ]
    terminal.table(sizes, ["height x width, result", "forwards", "GFLOP each", "PFLOP"])
    terminal.note("")
    terminal.note(
        f"{planned['photographs']} photographs, {planned['scored']} scored or shown; {planned['workers']} workers, "
        f"{planned['train_workers']} in training, on {card or planned['device']}; "
        f"timed in {planned['calibration_seconds']:.0f} s; all: with the start of Ray"
    )
    price = "" if planned["dollars"] is None else f"; {planned['dollars']:,.2f} dollars on {planned['nodes']} node(s)"
    terminal.note(f"features and bank: {planned['files']:,} files{price}")
    if card is not None:
        terminal.note(f"1 and 8 GPUs: as timed on {card}, each with as many CPU cores as here")
    elif tflops is not None:
        terminal.note(
            f"1 and 8 GPUs: the encoder's operations alone at {tflops:g} TFLOP/s a GPU, so a lower bound: reading, "
            "decoder, clustering and starts are not in it"
        )
    else:
        terminal.note("no GPU was timed: with --gpu-tflops N, hours on 1 and 8 GPUs are bounded from below")


def _figure(value: float) -> str:
    """Return a positive number with three significant digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
