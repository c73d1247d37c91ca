"""What a person at a terminal sees: a live table with bars and the time left, that fits the terminal it is in."""

import fcntl
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from tiny_run import draw_images

from search.reporting.live_table import Leaderboard, leaderboard, rows_table
from search.runs.objective import Objective
from search.runs.paths import RunFolder
from search.runs.ranking import Ranking
from search.runs.result_rows import COMPLETED, FAILED, RUNNING, STOPPED
from search.runs.time_budget import TimeBudget

ROOT = Path(__file__).resolve().parents[2]


class Table:
    """The results table as the leaderboard sees it."""

    objective = Objective("error_rate")
    dimensions = (
        "arch",
        "lr_max",
        "a_setting_with_a_long_name",
        "another_setting_with_a_long_name",
        "one_more_of_them",
    )

    def __init__(self, *statuses: str) -> None:
        self.rows = {f"t{number}": row(number, status) for number, status in enumerate(statuses)}

    settings = {"freeze_epochs": 1}  # noqa: RUF012

    @property
    def running(self) -> dict:
        return {trial_id: row for trial_id, row in self.rows.items() if row["status"] == RUNNING}

    @property
    def ranking(self) -> Ranking:
        return Ranking(row | {"trial_id": trial_id} for trial_id, row in self.rows.items())


def row(number: int, status: str) -> dict:
    done = {COMPLETED: 4, STOPPED: 2, FAILED: 1, RUNNING: number % 4}[status]
    return {
        "number": number,
        "status": status,
        "epochs_done": done,
        "epochs_total": 4,
        "error_rate": (number % 100) / 100,
        "valid_loss": 0.5,
        "seconds": 12.0,
        "arch": "tf_efficientnet_lite0",
        "lr_max": 0.00123456,
        **dict.fromkeys(Table.dimensions[2:], 0.25),
    }


def drawn(board: Leaderboard, *, width: int = 100, height: int = 30) -> str:
    """One picture of the live table."""
    out = StringIO()
    board.console = Console(file=out, width=width, height=height, force_terminal=True, color_system=None)
    board.console.print(board._render())
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())


def board_of(*statuses: str, num_trials: int = 10, time_budget: float | None = None) -> Leaderboard:
    board = Leaderboard(Table(*statuses), num_trials=num_trials, time_budget=time_budget)
    board.ended_before = 0
    return board


def test_a_running_trial_has_a_bar_of_its_epochs_and_a_completed_one_its_status():
    lines = drawn(board_of(COMPLETED, RUNNING, FAILED, RUNNING)).splitlines()
    assert lines[0].split() == ["trial", "status", "epochs", "error", "loss", "seconds", "recipe"]
    one, three, best = lines[1:4]
    assert one.split()[0] == "1" and "1/4" in one and three.split()[0] == "3" and "3/4" in three
    assert one.count("━") < three.count("━") <= 10
    assert "completed" in best and "0.0 %" in best
    assert not any("failed" in line for line in lines)


def probe(number: int, error_rate: float, status: str = COMPLETED) -> dict:
    return row(0, status) | {
        **{"number": number, "kind": "probe", "error_rate": error_rate, "epochs_done": 0, "epochs_total": 0},
    }


def test_a_probe_is_called_one_and_shows_only_what_it_depends_on():
    board = board_of(COMPLETED)
    board.table.rows["p"] = probe(-3, 0.125)
    lines = drawn(board, width=120).splitlines()
    [shown] = [line for line in lines if line.strip().startswith("probe 3")]
    assert "12.5 %" in shown and shown.split()[-2:] == ["arch", "tf_efficientnet_lite0"]
    assert "2/10 probes and trials ended" in lines[-1]


def test_many_good_probes_do_not_hide_the_trials():
    rows = [probe(-number, number / 1000) for number in range(1, 10)] + [row(number, COMPLETED) for number in (50, 51)]
    out = StringIO()
    Console(file=out, width=100).print(leaderboard(rows, ["arch"]))
    named = [line.split("  ")[0].strip() or line.split()[0] for line in out.getvalue().splitlines()[1:]]
    assert named == ["probe 1", "probe 2", "probe 3", "50", "51"]


def test_probes_do_not_tell_how_long_the_trials_take():
    board = board_of()
    board.table.rows["p"] = probe(-1, 0.125)
    board.started = time.monotonic() - 90
    assert drawn(board).rstrip().endswith("best error 12.5 % (probe 1), 1 min 30 s elapsed")


def test_where_the_last_epoch_is_not_the_best_the_best_one_has_a_column():
    worse = row(57, COMPLETED) | {"best_epoch": 0, "best_error_rate": 0.183}
    as_good = row(58, COMPLETED) | {"best_epoch": 4, "best_error_rate": 0.58}
    out = StringIO()
    Console(file=out, width=100).print(leaderboard([worse, as_good], ["arch"]))
    head, first, second = out.getvalue().splitlines()
    assert "seconds  best epoch  recipe" in head
    assert "57.0 %" in first and "  0: 18.3 %  " in first and "%" not in second.partition("58.0 %")[2]
    failed = row(59, FAILED) | {"best_epoch": 0, "best_error_rate": 0.183}
    assert "best epoch" not in str(rows_table([as_good, failed], ["arch"]).columns)


def test_in_a_log_a_probe_and_a_better_earlier_epoch_are_told(capsys):
    board = board_of(COMPLETED, num_trials=2)
    board.table.rows["tp"] = probe(-3, 0.125) | {"reason": ""}
    board.table.rows["t0"] |= {"reason": "", "best_epoch": 0, "best_error_rate": 0.0}
    board.console = Console(width=200)
    for trial_id in ("p", "0"):
        board.on_trial_complete(0, [], SimpleNamespace(trial_id=trial_id, config={}))
    first, second = capsys.readouterr().out.splitlines()
    assert "  probe 3   completed: error 12.5 %. " in first
    assert "  trial 0   completed: error 0.0 % (0.0 % at epoch 0). " in second


def test_below_are_a_bar_of_all_trials_the_incumbent_and_the_time_left():
    board = board_of(COMPLETED, COMPLETED, STOPPED, RUNNING)
    board.started = time.monotonic() - 90
    bar, summary = drawn(board).splitlines()[-2:]
    assert 28 <= len(bar.strip()) <= 32  # three of ten trials, of 100 columns
    assert summary == "3/10 trials ended, best error 0.0 % (trial 0), 1 min 30 s elapsed, about 3 min 30 s left"


def test_a_time_budget_ends_the_search_sooner_than_its_trials():
    board = board_of(COMPLETED, RUNNING, time_budget=120)
    board.started = time.monotonic() - 100
    assert "about 19 s left" in drawn(board) or "about 20 s left" in drawn(board)


def test_what_earlier_starts_have_spent_counts_for_the_time_budget(tmp_path):
    board = board_of(COMPLETED, RUNNING, time_budget=120)
    board.table.folder = RunFolder(tmp_path / "run")
    TimeBudget(board.table.folder, 120).spent = 60.0
    board.setup()
    assert "1 min 0 s elapsed, about 1 min 0 s left" in drawn(board) or "about 59 s left" in drawn(board)


def test_before_the_first_end_nobody_knows_the_time_left():
    assert "0/10 trials ended, no trial completed yet, 0 s elapsed" in drawn(board_of(RUNNING))
    assert "left" not in drawn(board_of(RUNNING))


@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 12), (200, 60)])
def test_it_is_never_wider_or_higher_than_the_terminal(width, height):
    statuses = [RUNNING] * 40 + [COMPLETED] * 40
    lines = drawn(board_of(*statuses, num_trials=1000), width=width, height=height).splitlines()
    assert len(lines) < height and max(map(len, lines)) <= width
    more = re.search(r"and (\d+) more running", "\n".join(lines))
    shown = sum("━" in line and "/4" in line for line in lines)
    assert shown + int(more[1] if more else 0) == 40
    assert any("completed" in line for line in lines)
    assert lines[0].split()[:6] == ["trial", "status", "epochs", "error", "loss", "seconds"]


def test_a_thousand_trials_cost_no_time():
    board = board_of(*[COMPLETED] * 990, *[RUNNING] * 10, num_trials=1000)
    started = time.process_time()
    for _ in range(10):
        drawn(board)
    assert time.process_time() - started < 2  # 0.1 s here; it is drawn twice a second


def crowd(**changes) -> Leaderboard:
    """A hundred running trials: half have made one epoch of two, others none; and a completed one."""
    board = board_of(COMPLETED, *[RUNNING] * 100, num_trials=1000)
    board.many.rungs = (60, 80)
    for number, trial in enumerate(board.table.running.values()):
        trial |= {"epochs_done": number % 2, "epochs_total": 2, "images_per_second": 50.0, "reason": ""}
        trial |= {"error_rate": 0.5 if number % 2 else math.nan} | changes
    return board


def event(number: int) -> SimpleNamespace:
    return SimpleNamespace(trial_id=str(number), config={})


def test_a_thousand_slots_are_shown_as_slots_speed_and_next_decisions():
    board = crowd()
    board.many.since -= 60
    for _ in range(30):
        board.many.note_epoch()
    board.many.note_end(STOPPED)
    lines = drawn(board, width=120, height=24).splitlines()
    assert len(lines) < 24 and "completed" in lines[1]
    slots, speed, following = map(str.rstrip, lines[-5:-2])
    assert slots == "slots  100 trials running, 50 of them before their first result"
    assert speed == "speed  30 epochs a minute, 5000 images/s, 1 trial ended in the last minute (1 stopped early)"
    assert following == "next   with their next epoch, 50 end"
    assert lines[-1].startswith("1/1000 trials ended, best error 0.0 % (trial 0)")
    assert not any("━" in line and "0/2" in line for line in lines)


def test_the_next_decisions_are_those_at_the_rungs_and_at_the_end():
    board = crowd(epochs_done=3, epochs_total=6)  # one of them frozen: 3 of 5 epochs with the next
    assert "with their next epoch, 100 reach rung 60 %" in drawn(board, width=120)
    board = crowd(epochs_done=4, epochs_total=6)
    assert "with their next epoch, 100 reach rung 80 %" in drawn(board, width=120)
    assert "no trial is near a rung or its end" in drawn(crowd(epochs_done=1, epochs_total=6), width=120)


def test_a_log_of_a_thousand_slots_has_a_line_from_time_to_time_new_best_trials_and_failures(capsys):
    board = crowd()
    board.console = Console(width=200)
    result = {"failure": "", "stage": "unfrozen", "train_loss": 1.0, "images_per_second": 50.0}
    for number in range(1, 101):
        board.on_trial_start(0, [], event(number))
        board.on_trial_result(0, [], event(number), result)
    [line] = capsys.readouterr().out.splitlines()
    assert "100 trials running" in line and "with their next epoch, 50 end. 1/1000 trials ended, best" in line
    for number, changes in (
        (7, {"status": COMPLETED, "error_rate": 0.7}),
        (8, {"status": FAILED, "reason": "no loss"}),
    ):
        board.table.rows[f"t{number}"] |= changes
        board.on_trial_complete(0, [], event(number))
    [failure] = capsys.readouterr().out.splitlines()
    assert "trial 8" in failure and "failed: no loss" in failure
    board.table.rows["t9"] |= {"status": COMPLETED, "error_rate": 0.0, "valid_loss": 0.1}
    board.on_trial_complete(0, [], event(9))
    assert "trial 9   completed: error 0.0 %" in capsys.readouterr().out
    board.many.said_at -= 11
    board.on_trial_start(0, [], event(10))
    assert "trials running" in capsys.readouterr().out


def test_the_final_table_has_the_best_first_and_no_bars():
    out = StringIO()
    Console(file=out, width=100).print(leaderboard(list(Table(*[COMPLETED] * 12, RUNNING).rows.values()), ["arch"]))
    lines = out.getvalue().splitlines()
    assert [line.split()[0] for line in lines[1:]] == [str(n) for n in range(8)]
    assert "━" not in out.getvalue()


@pytest.mark.ray
def test_a_search_in_a_terminal_draws_the_live_table_and_ends_with_the_leaderboard(tmp_path, ray_head):
    data = draw_images(tmp_path / "data")
    settings = "pretrained=false presize=40 image_size=32 batch_size=4 arch=test_resnet.r160_in1k,test_vit.r160_in1k"
    settings += " freeze_epochs=1 epochs=8 lr_ratio=10 lr_max_frozen=0.002 lr_max=0.001 mixup_alpha=0 smoothing=0.1"
    command = [sys.executable, "-m", "search.run", "--space", "quickstart", "--data", data, "--trials", 2]
    command += ["--max-concurrent", 1, "--cpus-per-worker", 1, "--address", ray_head, "--report", "off"]
    command += ["--results", tmp_path, "--name", "live"]
    command += [word for setting in settings.split() for word in ("--set", setting)]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    child = subprocess.Popen(
        [*map(str, command)], cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    text = _all_of(ours)
    assert child.wait(60) == 0, text
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert "\x1b[?25l" in text and "\x1b[?25h" in text  # the cursor was hidden, and is back
    assert re.search(r"1/2 trials ended, best error \d+\.\d % \(trial 0\), .* elapsed, about .* left", plain)
    assert re.search(r"^ +0 +━+.* +[1-8]/9 ", plain, re.MULTILINE)
    last = plain[plain.rindex("trial  status") :]
    assert "2 trials in" in last and "2 completed" in last and last.count("━") == 0


def _all_of(descriptor: int) -> str:
    """What is written to a terminal until it is closed."""
    chunks = []
    while True:
        try:
            chunk = os.read(descriptor, 65536)
        except OSError:  # Linux's way to say that nobody writes any more
            break
        if not chunk:
            break
        chunks.append(chunk)
    return b"".join(chunks).decode(errors="replace")


def test_with_another_metric_the_leaderboard_has_its_column():
    rows = [row(number, COMPLETED) | {"objective": 0.01 * number} for number in (1, 2)]
    out = StringIO()
    Console(file=out, width=120).print(leaderboard(rows, ["arch"], Objective("macro_f1")))
    heading, first, _ = out.getvalue().splitlines()
    assert "1 - macro F1" in heading and "1.0 %" in first


def test_the_winners_training_on_all_images_is_told():
    out = StringIO()
    board = board_of(COMPLETED, num_trials=1)
    board.console = Console(file=out, width=120)
    trial = SimpleNamespace(trial_id="again", config={"refits": "t0"})
    board.on_trial_start(0, [], trial)
    board.on_trial_result(0, [], trial, {"failure": "", "epoch": 2, "epochs_total": 5})
    board.on_trial_complete(0, [], trial)
    assert "trial 0   the winner again, on all images: epoch 2/5" in out.getvalue()
    assert "on all images: epoch 2/5" in board._summary()
