"""Writes a run as one self-contained HTML file: `python -m search.report RUN`. Every search also does as it runs."""

import argparse
from datetime import datetime
from pathlib import Path

from search.cli.messages import command_name, say
from search.reporting import (
    calibration_charts,
    charts,
    html_page,
    run_facts,
    suspects,
    test_set,
    trials_table,
    winner_charts,
)
from search.reporting.chart_parts import Chart
from search.reporting.error_analysis import ErrorAnalysis, analyse, read_analysis
from search.runs.atomic_files import write_atomically
from search.runs.kinds import name_of
from search.runs.result_rows import FAILED, RUNNING
from search.runs.run_record import RunRecord, load
from trainables.system.command_line import run_cli
from trainables.system.full_disk import require_writable_file
from trainables.system.text import shell_command

EXAMPLES = """
examples:
  python -m search.report results/pets-20250101-120000
      writes results/pets-20250101-120000/report.html; open it in a browser, or print it
  python -m search.report results/pets-20250101-120000 --no-analysis --out now.html
      of a running search, at once: without labelling the validation images for the confusion matrix

Exit code 0, or 2 if the run or an option is invalid.
"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("search.report"),
        description="Write a run as one HTML file: winner, charts, errors, table, failures, and how to run it again.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run, such as results/<name>")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the file to write (default: RUN/report.html)")
    parser.add_argument("--no-analysis", action="store_true", help=(
        "do not label the validation images with the winner; errors that are already known are still shown"
    ))  # fmt: skip
    parser.add_argument("--suspects", action="store_true", help=(
        "write suspects.csv anew: the training and validation images that may be labelled wrongly, or are like no "
        "other; without this, a report looks for them once, if that is quick"
    ))  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    run = load(args.run)
    out = args.out.expanduser() if args.out else run.folder.report
    require_writable_file(out)
    write_report(run, out, analysis=not args.no_analysis, look=args.suspects)
    say(f"report: {out}")
    return 0


def write_report(run: RunRecord, out: Path, *, analysis: bool, look: bool = False) -> None:
    """Write the report of `run` to `out`: at once from its tables, then again with the winner's errors, and with the
    images that may be labelled wrongly if they are found quickly, or whatever that takes with `look`.

    Raises `ValueError` if `out` cannot be written.
    """
    _write(out, render(run))
    if run.best is not None and (look or (analysis and read_analysis(run) is None)):
        effort = suspects.effort_of(run, asked=look)
        and_looking = " and looking for wrong labels" if effort else ""
        winner = name_of(run.best["number"])
        say(f"labelling the validation images with {winner}{and_looking} for the report (Ctrl-C skips this)")
        if missing := analyse(run, effort=effort):
            say(missing)
        _write(out, render(run, no_analysis=missing))


def _write(out: Path, text: str) -> None:
    try:
        write_atomically(out, text, wait=False)
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error}. Make room, or give another --out.") from error


def render(run: RunRecord, *, no_analysis: str = "") -> str:
    """The report as HTML. `no_analysis` says why it lacks the winner's errors."""
    found = read_analysis(run)
    failed = run.trials[run.trials["status"] == FAILED]
    found_charts, about_winner = charts.search_charts(run), winner_figures(run, found)
    judged = found.calibration if found else None
    rows = trials_table.table(run)
    return html_page.render(
        "report.html",
        [*found_charts, *about_winner, *([calibration_charts.reliability(judged)] if judged else [])],
        name=run.path.name,
        doc=run.space["doc"],
        headline=run_facts.headline(run),
        written_at=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        running=bool((run.trials["status"] == RUNNING).any()),
        cards=run_facts.cards(run),
        verdict=run_facts.verdict(run),
        test=test_set.lines(run.folder),
        facts=run_facts.facts(run),
        search_charts=[chart.name for chart in found_charts],
        winner_charts=[chart.name for chart in about_winner],
        winner=run_facts.winner(run),
        no_analysis=no_analysis,
        errors=found,
        calibration=calibration_charts.section(judged, run.best),
        suspects=suspects.pictures(run),
        about_suspects=suspects.lines(run.folder),
        columns=trials_table.columns(run),
        rows=trials_table.first_rows(rows),
        later_rows=trials_table.later_rows(rows),
        statuses=sorted(run.trials["status"].unique()),
        failures=trials_table.failures(failed),
        command=shell_command("search.run", *run.command.argv),
        later_commands=run.later_commands,
        environment=run_facts.environment(run),
    )


def winner_figures(run: RunRecord, found: ErrorAnalysis | None) -> list[Chart]:
    recipe = run.best_recipe
    shown = [winner_charts.confusion(found.counts, found.classes)] if found and found.counts is not None else []
    return [*shown, winner_charts.schedule(recipe)] if recipe and recipe.total_epochs else shown


if __name__ == "__main__":
    run_cli(main)
