"""A trial that starts from a probe, on real workers."""

import pytest
import ray
from ray import tune
from weights import draw_weights

from trainables.probe.feature_files import features_folder
from trainables.ray.trial import FineTuneTrial, TrialOptions
from trainables.ray.worker_group import GroupSize
from trainables.recipe import Recipe
from trainables.training.fine_tune import FineTune

pytestmark = pytest.mark.ray

SETTINGS = {"arch": "test_resnet", "head_init": "probe", "presize": 48, "image_size": 32, "batch_size": 8}
SETTINGS |= {"freeze_epochs": 0, "precision": "fp32", "head": "mlp", "hidden": 16}


@pytest.fixture
def new_trial(ray_head, search_cache, colour_folder, tmp_path):
    """Trials of two workers in the same folder: each goes on where the one before it ended."""
    ray.init(address=ray_head, log_to_driver=False, logging_level="ERROR")
    made = []

    def new(**config) -> FineTuneTrial:
        options = TrialOptions(
            settings=SETTINGS,
            data=str(colour_folder),
            weights=str(draw_weights(tmp_path / "weights", "test_resnet")),
            checkpoints=str(tmp_path / "checkpoints"),
            group_size=GroupSize(num_workers=2),
        )
        made.append(tune.with_parameters(FineTuneTrial, options=options)(config))
        return made[-1]

    yield new
    for trial in made:
        trial.cleanup()
    ray.shutdown()


def test_its_first_result_is_the_probe_and_a_later_trial_goes_on_from_there(new_trial, colour_images, tmp_path):
    kept_before = set(features_folder().glob("*"))
    trial = new_trial(epochs=1)
    probed = trial.step()
    trial.cleanup()
    assert (probed["epoch"], probed["stage"], probed["done"], probed["failure"]) == (0, "probe", False, "")
    alone = FineTune(Recipe(**SETTINGS, epochs=1), colour_images, weights=tmp_path / "weights")
    expected = [alone.run_epoch() for _ in range(2)]
    names = ("train_loss", "valid_loss", "error_rate")
    assert [probed[name] for name in names] == pytest.approx([expected[0][name] for name in names], rel=1e-3)
    # The workers and this process had the same features.
    assert len([path for path in set(features_folder().glob("*")) - kept_before if path.is_dir()]) == 1

    resumed = new_trial(epochs=1)
    again, last = resumed.step(), resumed.step()
    assert again == probed
    assert (last["epoch"], last["stage"], last["done"], last["progress"]) == (1, "unfrozen", True, 100)
    assert [last[name] for name in names] == pytest.approx([expected[1][name] for name in names], rel=1e-2)
    assert last["best_epoch"] in (0, 1) and last["best_error_rate"] <= min(probed["error_rate"], last["error_rate"])
