"""Compares runs in the terminal and in one HTML file: `python -m search.compare RUN RUN...`."""

import argparse
import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from rich.console import Console
from rich.table import Table
from rich.text import Text

from search.cli.messages import command_name, say
from search.reporting import html_page
from search.reporting.chart_parts import FAMILIES, Chart, plain
from search.reporting.charts import end_times
from search.reporting.importance import importances
from search.reporting.summary import model, scores
from search.runs.atomic_files import write_atomically
from search.runs.kinds import PROBE, how_many, name_of
from search.runs.result_rows import COMPLETED, FAILED, PROBED, RANKED, STOPPED, UNFINISHED
from search.runs.run_record import RunRecord, load
from trainables.system.command_line import run_cli
from trainables.system.full_disk import require_writable_file
from trainables.system.text import duration, many, percent

EXAMPLES = """
examples:
  python -m search.compare results/pets-20250101-120000 results/pets-20250102-090000
      best errors with intervals, their costs, the importance of the settings, and the winners' recipes
  python -m search.compare results/pets-* --out compare.html
      the same with charts, as one HTML file

Exit code 0, or 2 if a run or an option is invalid.
"""


HEADINGS = ["run", "best", "95 % interval", "best probe", "trial 0", "trials", "epochs", "trained", "took"]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("search.compare"),
        description="Compare runs: best error, budget, importance of the settings, and the winners' recipes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the folder of a run; two or more")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the comparison as HTML")
    args = parser.parse_args(argv)
    if len(args.runs) < 2:
        parser.error("a comparison needs two or more runs")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.out:
        require_writable_file(args.out.expanduser())
    runs = [load(path) for path in args.runs]
    names = short_names([run.path for run in runs])
    console = Console() if os.isatty(1) else Console(width=200)
    for title, table in tables(runs, names).items():
        say(f"\n{title}")
        console.print(_rich(table))
    for warning in warnings(runs, names):
        say(f"\nwarning: {warning}")
    if args.out:
        out = args.out.expanduser()
        try:
            write_atomically(out, render(runs, names), wait=False)
        except OSError as error:
            raise ValueError(f"{out} cannot be written: {error}. Make room, or give another --out.") from error
        say(f"\ncomparison: {out}")
    return 0


def short_names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, or as much of their paths as makes them unique. Raises `ValueError` if one is given twice."""
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    twice = next(path for path in paths if paths.count(path) > 1)
    raise ValueError(f"{twice} is given twice. Give each run once.")


def tables(runs: Sequence[RunRecord], names: Sequence[str]) -> dict[str, list[list[str]]]:
    """The comparison as tables by title; the first row of each has the headings."""
    dimensions = list(dict.fromkeys(name for run in runs for name in run.dimensions))
    shares = [importances(run) for run in runs]
    head = ["setting", *names]
    rated = [[name, *(percent(found[name], 0) if name in found else "" for found in shares)] for name in dimensions]
    recipes = [[name, *(_setting(run, name) for run in runs)] for name in dimensions]
    found = {"Best error and budget": [HEADINGS, *map(_row, runs, names)]}
    if any(run.fine_tuning for run in runs):
        worth = [[name, run.fine_tuning] for run, name in zip(runs, names, strict=True)]
        found["Fine-tuning against the best probe"] = [["run", "fine-tuning"], *worth]
    if any(shares):
        found["Importance of the settings (PED-ANOVA; empty: too few trials, or not searched)"] = [head, *rated]
    return found | {"The winners' recipes": [head, *recipes]}


def _row(run: RunRecord, name: str) -> list[str]:
    """A run's best error and budget; empty texts for what is not known."""
    best, probe, first = run.best, run.probe, run.first
    low_high = run.interval(best) if best is not None else None
    counts = run.trials["status"].value_counts()
    statuses = (COMPLETED, UNFINISHED, STOPPED, FAILED)
    ended = ", ".join(f"{counts[status]} {status}" for status in statuses if status in counts)
    kinds = run.trials["kind"]
    started = how_many(kinds) if (kinds == PROBE).any() else str(len(run.trials))
    minutes = end_times(run)
    return [
        name,
        "none completed" if best is None else f"{percent(best['error_rate'])} ({name_of(best['number'])})",
        " to ".join(map(percent, low_high)) if low_high else "",
        "" if probe is None else f"{_with_interval(run, probe)}: {model(run, probe)}",
        "" if first is None else _with_interval(run, first),
        f"{started}: {ended}" if ended else started,
        str((run.epochs["epoch"] > 0).sum()),
        duration(run.trials["seconds"].sum()),
        duration(60 * minutes.max()) if len(minutes) else "",
    ]


def _with_interval(run: RunRecord, row: "pd.Series[Any]") -> str:
    """Such as "5.0 % (2.3 % to 10.5 %)"."""
    low_high = run.interval(row)
    return scores(run, row) + (f" ({' to '.join(map(percent, low_high))})" if low_high else "")


def warnings(runs: Sequence[RunRecord], names: Sequence[str]) -> list[str]:
    """Why the errors of these runs may not be comparable."""
    splits = {(run.command.data, run.command.split_seed, run.command.groups or "", run.num_valid) for run in runs}
    if len(splits) == 1:
        return []
    listed = "; ".join(
        f"{name}: {run.command.data}, seed {run.command.split_seed}, {run.num_valid or 'unknown'} images"
        + (f", grouped by {run.command.arguments.group}" if run.command.arguments.group else "")
        for name, run in zip(names, runs, strict=True)
    )
    return [f"the runs did not validate on the same images, so their errors are not comparable ({listed})"]


def _setting(run: RunRecord, name: str) -> str:
    """The winner's value of a setting, searched or not."""
    if run.best is None:
        return ""
    if run.best["kind"] == PROBE and name not in PROBED:
        return ""
    value = run.setting(run.best, name)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _rich(rows: list[list[str]]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, heading in enumerate(rows[0]):
        table.add_column(Text(heading), justify="right" if i else "left", overflow="fold")
    for row in rows[1:]:
        table.add_row(*map(Text, row))  # Text, as a name is not markup
    return table


# --- HTML -------------------------------------------------------------------------------------------------------------


def render(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    """The comparison as one self-contained HTML file."""
    charts = [chart for chart in (incumbents(runs, names), importance_chart(runs, names)) if chart is not None]
    return html_page.render(
        "compare.html",
        charts,
        title=f"{many(len(runs), 'run')} compared",
        warnings=warnings(runs, names),
        tables=tables(runs, names),
        chart_names=[chart.name for chart in charts],
    )


def incumbents(runs: Sequence[RunRecord], names: Sequence[str]) -> Chart | None:
    """Error of each run's best trial over the training time of all its trials until then."""
    figure, parts = go.Figure(), []
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        minutes = end_times(run)
        trials = run.trials.assign(minutes=minutes).sort_values("minutes")
        done = trials.assign(spent=trials["seconds"].cumsum() / 60)
        done = done[done["status"].isin(RANKED) & done["error_rate"].notna()]
        if done.empty:
            continue
        best = list(accumulate(done[run.objective.column], min))
        colour, symbol = FAMILIES[i % len(FAMILIES)]
        figure.add_scatter(
            x=done["spent"],
            y=best,
            name=plain(name),
            mode="lines+markers",
            line={"color": colour, "width": 3, "shape": "hv"},
            marker={"symbol": symbol, "size": 8},
            hovertemplate="%{y:.3g} after %{x:.1f} min of training<extra></extra>",
        )
        parts.append(f"{name} reaches {run.objective.text(best[-1])} in {done['spent'].iloc[-1]:.1f} min")
    if not parts:
        return None
    figure.update_xaxes(title_text="minutes of training and validation, all trials together", rangemode="tozero")
    figure.update_yaxes(title_text=" or ".join(dict.fromkeys(_minimised(run) for run in runs)), rangemode="tozero")
    return Chart("incumbents", "Error of the best trial over the budget", f"{'; '.join(parts)}.", figure)


def _minimised(run: RunRecord) -> str:
    return "validation error" if run.objective.is_error_rate else run.objective.name


def importance_chart(runs: Sequence[RunRecord], names: Sequence[str]) -> Chart | None:
    """Importance of each setting in each run, side by side."""
    figure, parts = go.Figure(), []
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        if not (shares := importances(run)):
            continue
        figure.add_bar(
            x=[plain(setting) for setting in shares],
            y=list(shares.values()),
            name=plain(name),
            marker={"color": FAMILIES[i % len(FAMILIES)][0]},
        )
        first, share = next(iter(shares.items()))
        parts.append(f"in {name}, {first} matters most ({percent(share, 0)})")
    if not parts:
        return None
    figure.update_yaxes(title_text="share of the importance", tickformat=".0%")
    return Chart("importances", "Importance of the settings", f"{'; '.join(parts).capitalize()}.", figure)


if __name__ == "__main__":
    run_cli(main)
