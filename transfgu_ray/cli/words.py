"""Closing lines that several commands share."""

from typing import Any

from transfgu_ray.cli.terminal import Terminal, printable


def note_pages(terminal: Terminal, opened: Any) -> None:
    """Print where the pages of a run are."""
    for title, page in (("report", "report.html"), ("concepts", "atlas.html")):
        if opened.folder.exists(page):
            terminal.note(f"{title}: {opened.folder.uri_of(page)}")


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
