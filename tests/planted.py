"""Shows that the tests bite: plants faults, one at a time, in a copy of the project, and runs tests that must fail.

    python tests/planted.py               # all faults; about four minutes on two cores
    python tests/planted.py --only runs   # those with this text in their name or file

It prints each fault with the test that found it. First all of these tests pass in the copy without a fault. The exit
code is 1 if a fault fails no test. (The file is long because it lists the faults.)
"""

import argparse
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[1]
LONGEST = 300
"""Seconds that one test may take."""
LIBRARIES = ("timm", "ray.tune", "ray.train.torch", "optuna", "pandas", "matplotlib.figure")


@dataclass(frozen=True)
class Fault:
    """In `file` the code `right`, which is there once, becomes `wrong`. Then one of `tests` must fail."""

    name: str
    file: str
    right: str
    wrong: str
    tests: str
    """Below `tests/`, separated by blanks. None of them is slow."""


ROOMS = (
    Fault(
        "only errors meant for users are said after a search",
        "search/cli/errors.py",
        "except Exception as error:",
        "except ValueError as error:",
        "reporting/test_test_set.py::test_a_search_whose_test_goes_wrong_still_has_its_summary_its_report_and_its_exit_code",
    ),
    Fault(
        "a value is clipped to the other end of its range",
        "search/spaces/space.py",
        "min(max(value, self.low), self.high)",
        "max(min(value, self.low), self.high)",
        "spaces/test_space.py::test_what_is_tried_first_moves_into_narrowed_dimensions",
    ),
    Fault(
        "--test-split takes all images",
        "search/options/arguments.py",
        "if not 0 < share < 1:",
        "if not 0 < share <= 1:",
        "reporting/test_test_set.py::test_the_option_takes_a_share_or_a_folder",
    ),
    Fault(
        "trials with two objectives are stopped by their error",
        "search/options/search_options.py",
        '"forecast" if self.objective == "error" else "none"',
        '"none" if self.objective == "error" else "forecast"',
        "options/test_strategy.py",
    ),
    Fault(
        "files are written in place",
        "search/runs/atomic_files.py",
        'partial.write_text(text, encoding="utf-8")\n        partial.replace(path)',
        'path.write_text(text, encoding="utf-8")',
        "runs/test_results_table.py::test_a_write_that_breaks_leaves_the_old_file",
    ),
    Fault(
        "a proposal is not synced to the disk",
        "search/runs/study_journal.py",
        "sync=sync)",
        "sync=False)",
        "tuning/test_searcher.py::test_a_proposal_is_on_the_disk_when_it_is_made_and_waits_for_it_once",
    ),
    Fault(
        "the interval of an error is one-sided",
        "search/runs/statistics.py",
        "inv_cdf((1 + level) / 2)",
        "inv_cdf(level)",
        "runs/test_statistics.py",
    ),
    Fault(
        "a run is not resumed with the trials that it has",
        "search/runs/resume.py",
        "(saved.trials or 0) < (begun",
        "(saved.trials or 0) <= (begun",
        "runs/test_resume.py::test_fewer_trials_than_have_begun_are_refused",
    ),
    Fault(
        "one trial more than --max-concurrent",
        "search/cluster/concurrency.py",
        "len(live) >= self.max_trials",
        "len(live) > self.max_trials",
        "cluster/test_concurrency.py::test_a_limit_of_trials_counts_trials_and_asks_for_no_more_than_there_is",
    ),
    Fault(
        "the p-value of a test is one-sided",
        "search/reporting/test_set.py",
        "binomtest(one, one + other)",
        'binomtest(one, one + other, alternative="greater")',
        "reporting/test_test_set.py::test_the_p_value_is_that_of_a_fair_coin",
    ),
    Fault(
        "an export divides by the deviation first",
        "search/exporting/export_formats.py",
        "(images - self.mean) / self.std",
        "images / self.std - self.mean",
        "exporting/test_export_formats.py::test_both_formats_give_the_models_logits_for_any_batch_size",
    ),
    Fault(
        "the check of an export lets nan pass",
        "search/exporting/verification.py",
        "if not result.difference <= MAX_DIFFERENCE",
        "if result.difference > MAX_DIFFERENCE",
        "exporting/test_export_formats.py::test_a_logit_that_is_no_number_is_found_out",
    ),
    Fault(
        "a trial is compared with itself, too",
        "search/tuning/early_stopping.py",
        " and other is not curve",
        "",
        "tuning/test_early_stopping.py::test_a_trial_is_not_compared_with_itself",
    ),
    Fault(
        "the first retraining has the seed of its trial",
        "search/tuning/retraining.py",
        "range(seed + 1, seed + 1 + CONFIRM_SEEDS)",
        "range(seed, seed + CONFIRM_SEEDS)",
        "tuning/test_searcher.py::test_the_best_are_trained_again_with_new_seeds_when_all_have_ended",
    ),
    Fault(
        "a setting may be nan",
        "trainables/recipe.py",
        'not meta["low"] <= value <= meta["high"]',
        '(value < meta["low"] or value > meta["high"])',
        "system/test_recipe.py::test_a_value_out_of_range_is_refused_with_the_range",
    ),
    Fault(
        "a full disk ends a search, other errors are waited out",
        "trainables/system/full_disk.py",
        "if error.errno not in FULL:",
        "if error.errno in FULL:",
        "runs/test_disk_space.py::test_a_table_keeps_its_old_content_until_there_is_room_for_the_new_one",
    ),
    Fault(
        "training and validation images are swapped",
        "trainables/data/splits.py",
        "return np.setdiff1d(np.arange(len(labels)), valid), valid",
        "return valid, np.setdiff1d(np.arange(len(labels)), valid)",
        "data/test_labelled_images.py::test_each_class_gives_its_share_to_validation",
    ),
    Fault(
        "nodes split without the groups",
        "trainables/data/source.py",
        "images = with_text(images_of(source.source), source.groups)",
        "images = images_of(source.source)",
        "data/test_groups.py::test_every_node_and_every_process_has_the_same_split",
    ),
    Fault(
        "a fold may hold a whole class",
        "trainables/probe/folds.py",
        "fold for fold in range(count) if fold not in whole",
        "fold for fold in range(count)",
        "probe/test_folds.py::test_no_fold_holds_all_of_a_class",
    ),
    Fault(
        "presized images are not synced to the disk",
        "trainables/system/cache.py",
        "    file.flush()\n    os.fsync(file.fileno())",
        "    file.flush()",
        "data/test_presize.py::test_a_cache_is_on_the_disk_before_it_has_its_name",
    ),
    Fault(
        "features of other image sizes have the same name",
        "trainables/probe/features.py",
        "recipe.concat_pool, recipe.image_size, recipe.resize_method",
        "recipe.concat_pool, recipe.resize_method",
        "probe/test_features.py::test_all_that_decides_them_is_in_their_name",
    ),
    Fault(
        "cached features are taken as they are",
        "trainables/probe/feature_files.py",
        '!= index["sha256"]:',
        '== "":',
        "probe/test_features.py training/test_probing.py::test_what_is_damaged_is_computed_again",
    ),
    Fault(
        "who has waited for features computes them again",
        "trainables/training/probing.py",
        "if found := self._opened_by_all(path, warn=True):",
        "if found := None:",
        "training/test_probing.py::test_two_trainings_at_once_compute_them_once_and_who_waits_gives_signs_of_life",
    ),
    Fault(
        "a probe cannot be computed on a full disk",
        "trainables/training/probing.py",
        "        except OSError as error:\n            logger.warning(",
        "        except KeyError as error:\n            logger.warning(",
        "training/test_probing.py::test_where_the_cache_cannot_be_written_the_training_goes_on",
    ),
    Fault(
        "images are turned the other way",
        "trainables/batches/augmentation.py",
        "maps[:, 1, 0] = -maps[:, 0, 1]",
        "maps[:, 1, 0] = maps[:, 0, 1]",
        "batches/test_augmentation.py::test_positive_degrees_turn_the_picture_clockwise",
    ),
    Fault(
        "the views of test-time augmentation have the weight of the centre",
        "trainables/batches/tta.py",
        "torch.lerp(views.mean(dim=0), centre, beta)",
        "torch.lerp(centre, views.mean(dim=0), beta)",
        "batches/test_tta.py",
    ),
    Fault(
        "norms and biases decay",
        "trainables/network/optimizer.py",
        "(p.ndim <= 1) == is_vector",
        "(p.ndim < 1) == is_vector",
        "network/test_optimizer.py::test_norms_and_biases_do_not_decay",
    ),
    Fault(
        "validation in training mode",
        "trainables/training/fine_tune.py",
        '"""Logits (rows, classes) of this worker\'s validation images under `augmentations`."""\n'
        "        self.network.model.eval()",
        "",
        "inference/test_interpretation.py::test_error_rate_and_mean_loss_on_the_validation_split_are_those_of_the_run",
    ),
    Fault(
        "two workers train with half of the gradient",
        "trainables/training/fine_tune.py",
        "self.scaler.scale(value * self.world.size).backward()",
        "self.scaler.scale(value).backward()",
        "training/test_fine_tune.py::test_two_workers_step_along_the_gradients_of_the_whole_batch_in_both_stages",
    ),
    Fault(
        "a training continues without its optimizer's state",
        "trainables/training/fine_tune.py",
        'self.optimizer.load_state_dict(training["optimizer"])',
        "pass",
        "training/test_fine_tune.py::test_a_training_continues_exactly_in_a_new_process_from_any_epoch",
    ),
    Fault(
        "a resumed trial continues from the oldest checkpoint",
        "trainables/training/checkpoint.py",
        'sorted(folder.glob("epoch_*"), reverse=True)',
        'sorted(folder.glob("epoch_*"))',
        "training/test_checkpoint.py::test_where_a_kill_left_two_the_older_one_stands_in_for_a_damaged_one",
    ),
    Fault(
        "the confusion matrix is transposed",
        "trainables/inference/interpretation.py",
        "self.labels * n + self.predicted",
        "self.predicted * n + self.labels",
        "inference/test_interpretation.py::test_the_matrix_counts_actual_classes_in_rows_and_predicted_ones_in_columns",
    ),
    Fault(
        "a heat map begins with the class token",
        "trainables/inference/heat_maps.py",
        "terms[:, first:]",
        "terms[:, : side**2]",
        "inference/test_heat_maps.py::test_the_hottest_place_is_where_the_object_is_whatever_the_network",
    ),
    Fault(
        "the interval of a class is the exact one",
        "trainables/inference/class_errors.py",
        'proportion_ci(method="wilson")',
        "proportion_ci()",
        "inference/test_class_errors.py::test_the_interval_is_wilsons",
    ),
    Fault(
        "one retry more",
        "trainables/ray/worker_group.py",
        "self._tries >= MAX_TRIES",
        "self._tries > MAX_TRIES",
        "ray/test_worker_group.py::test_a_command_that_loses_its_workers_again_and_again_fails_and_the_group_serves_the_next_trial",
    ),
)
"""At least one in each room of both packages."""

MENDED = (
    Fault(
        "a folder Testing/ validates beside Training/",
        "trainables/data/readings.py",
        '"evaluation", "dev"),\n    "test": ("test", "testing", "tst", "holdout"),',
        '"evaluation", "dev", "test", "testing", "tst", "holdout"),\n    "test": (),',
        "data/test_layouts.py::test_a_test_folder_does_not_validate_and_is_offered_for_test_split",
    ),
    Fault(
        "class names in two Unicode forms are two classes",
        "trainables/data/folder_tree.py",
        'return unicodedata.normalize("NFC", self.name)',
        "return self.name",
        "data/test_layouts.py::test_two_spellings_of_one_name_are_one_class",
    ),
    Fault(
        "images of 12 bits in files of 16 are nearly black",
        "trainables/data/image_file.py",
        "if largest else WHITE_16_BIT",
        "if largest < 256 else WHITE_16_BIT",
        "data/test_image_file.py::test_twelve_bits_in_a_file_of_sixteen_keep_their_shades",
    ),
    Fault(
        "a prediction does not know how deep the images of the training were",
        "trainables/inference/predictor.py",
        "self.white_level = preprocessing.white_level",
        "self.white_level = 65535",
        "commands/test_predict.py::test_images_of_twelve_bits_have_the_shades_that_validation_sees",
    ),
    Fault(
        "a PNG's chunks are cut off before their checksum",
        "trainables/data/image_file.py",
        "end = place + 12 + int.from_bytes",
        "end = place + 8 + int.from_bytes",
        "data/test_image_file.py::test_a_png_with_more_text_than_pillow_takes_keeps_its_pixels",
    ),
    Fault(
        "a folder of test images is opened before the search has ended",
        "trainables/data/source.py",
        "images.labels, images.paths, images.valid, ",
        "images.labels, images.paths, images.valid, images.white_level, ",
        "runs/test_resume.py::test_weights_and_test_images_elsewhere_must_be_the_same_files",
    ),
    Fault(
        "dropout depends on the number of workers",
        "trainables/network/dropout.py",
        "if rest or not each:",
        "if each:",
        "network/test_dropout.py::test_dropout_of_a_batch_is_the_same_in_one_piece_or_shared_out",
    ),
    Fault(
        "any images are those that validated a model",
        "trainables/inference/split_record.py",
        "return (known, test) if images_digest(known) == record.images else None",
        "return known, test",
        "inference/test_interpretation.py::test_images_that_are_not_those_of_the_training_are_not_called_valid",
    ),
    Fault(
        "a failure counts once more when a kill comes before Tune's next save",
        "search/runs/results_table.py",
        'self.repeating.add(row["trial_id"])',
        'row["status"] = RUNNING',
        "runs/test_results_table.py::test_failures_that_are_said_once_more_are_not_failures_of_this_start",
    ),
    Fault(
        "a third search gets in beside the second one of its name",
        "search/runs/run_lock.py",
        "if os.path.samestat(os.fstat(opened), file.stat()):",
        "if opened:",
        "runs/test_resume.py::test_a_third_search_is_refused_where_the_second_came_as_the_first_one_left",
    ),
    Fault(
        "a search whose time is over proposes a trial when it is resumed",
        "search/tuning/tuner.py",
        "super().is_finished() or self.budget.is_over()",
        "super().is_finished()",
        "tuning/test_searcher.py::test_a_search_whose_time_is_over_proposes_nothing_when_it_is_started_again",
    ),
    Fault(
        "a lost node costs a trial its tries",
        "trainables/ray/trial.py",
        "sum(node is None or node in nodes for node in lost_on)",
        "len(lost_on)",
        "ray/test_trial.py::test_a_node_that_takes_one_host_after_another_with_it_costs_the_trial_no_try",
    ),
    Fault(
        "memory does not count in how many trials run at once",
        "search/cluster/resources.py",
        "return min(self.workers(size), int(self.memory",
        "return max(self.workers(size), int(self.memory",
        "cluster/test_resources.py::test_memory_counts_in_how_many_trials_run_at_once",
    ),
)
"""Faults like those that were mended last."""


def require_right_code(faults: Iterable[Fault], copy: Path) -> None:
    """Raises `ValueError` if a fault cannot be planted, because the code has changed."""
    texts = ((fault, (copy / fault.file).read_text(encoding="utf-8")) for fault in faults)
    if problems := [f"{fault.file}: {fault.right}" for fault, text in texts if text.count(fault.right) != 1]:
        raise ValueError("\n".join(["These are not there exactly once:", *problems]))


@contextmanager
def planted(fault: Fault, copy: Path) -> Iterator[None]:
    """Within it, `copy` has the fault."""
    file = copy / fault.file
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(fault.right, fault.wrong), encoding="utf-8")
    try:
        yield
    finally:
        file.write_text(text, encoding="utf-8")


def failed_test(tests: Iterable[str], copy: Path) -> str | None:
    """The first of `tests` that fails in `copy`; None if all pass. Raises `RuntimeError` if they cannot be run."""
    output = copy.parent / "output"
    command = ["-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", f"--timeout={LONGEST}"]
    command += [f"--basetemp={copy.parent / 'temporary'}", *(f"tests/{test}" for test in tests)]
    if (child := os.fork()) == 0:
        run_pytest(command, copy, output)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 0:
        return None
    said = output.read_text(encoding="utf-8", errors="replace")
    failed = re.findall(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", said, re.MULTILINE)
    if code != 1 or not failed:  # a fault that stops the collection says nothing about the tests
        raise RuntimeError(f"pytest ended with exit code {code}:\n{said[-4000:]}")
    return failed[0]


def run_pytest(command: list[str], copy: Path, output: Path) -> NoReturn:
    """In a child process, which imports what it tests from `copy`, and ends with pytest's exit code."""
    code = 3  # pytest's for an error of its own
    try:
        os.chdir(copy)
        os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        sys.path[0] = str(copy)
        sys.dont_write_bytecode = True  # a file may change twice within a second
        with output.open("w") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        code = int(pytest.main(command))
        sys.stdout.flush()
    finally:
        os._exit(code)


def import_libraries() -> None:
    """Import what takes the most time once, for all child processes."""
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # as tests/conftest.py has it, before torch is imported
    for name in LIBRARIES:
        importlib.import_module(name)


def copy_of_project(folder: Path) -> Path:
    """All files that git has or would add, in `folder`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, os.fsdecode(listed.stdout).split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="faults with this text in their name or file")
    only = parser.parse_args().only
    faults = [fault for fault in (*ROOMS, *MENDED) if only in f"{fault.name} {fault.file}"]
    if not faults:
        parser.error(f"--only {only}: no fault has this text")
    import_libraries()
    found = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of_project(Path(folder) / "project")
        require_right_code(faults, copy)
        if failed := failed_test(dict.fromkeys(test for fault in faults for test in fault.tests.split()), copy):
            raise RuntimeError(f"{failed} fails without a fault, too")
        for fault in faults:
            with planted(fault, copy):
                failed = failed_test(fault.tests.split(), copy)
            found += failed is not None
            print(f"{'found' if failed else 'MISSED'} | {fault.name} | {fault.file} | {failed or ''}", flush=True)
    print(f"{found} of {len(faults)} planted faults fail a test")
    return int(found < len(faults))


if __name__ == "__main__":
    sys.exit(main())
