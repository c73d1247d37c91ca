"""Epoch 0 of a training that starts from a probe: its head, what trainings share, and what may go wrong."""

import logging
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from filelock import FileLock
from PIL import Image
from processes import new_processes
from weights import draw_weights

from search import lr_find
from trainables import finetune
from trainables.data.layouts import find_images
from trainables.data.presize import presize
from trainables.data.presized_images import PresizedImages
from trainables.probe import cross_validation, feature_files, head_files
from trainables.probe.feature_files import FEATURES_FILE, lock_file
from trainables.probe.logistic_regression import fit
from trainables.probe.views import centre_view
from trainables.recipe import Recipe
from trainables.system import cache as cache_module
from trainables.training import probing as module
from trainables.training.fine_tune import FineTune

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"arch": "test_resnet", "head_init": "probe", "presize": 48, "image_size": 32, "batch_size": 8, "hidden": 16}
SMALL |= {"freeze_epochs": 0, "epochs": 0, "precision": "fp32"}
FEW = (0.1, 0.01)
"""Penalties that are tried, to be quick."""
METRICS = ("train_loss", "valid_loss", "error_rate", "expected_error_rate", "accuracy", "temperature")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, colour_images) -> Path:
    """The folder of the test's features; the images are in the cache of all tests. Few penalties are tried."""
    monkeypatch.setattr(cross_validation, "L2_GRID", FEW)
    monkeypatch.setenv("FINETUNE_SEARCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    return draw_weights(tmp_path_factory.mktemp("weights"), "test_resnet", "test_vit")


@pytest.fixture
def probe(colour_images, weights):
    """A new training with these settings."""

    def new(
        images: PresizedImages = colour_images, on_progress=lambda: None, all_images: bool = False, **settings
    ) -> FineTune:
        options = {"weights": weights, "on_progress": on_progress, "all_images": all_images}
        return FineTune(Recipe(**SMALL | settings), images, **options)

    return new


def measured(metrics: dict) -> tuple[float, ...]:
    return tuple(metrics.get(name, -1) for name in METRICS)


class ForwardPasses:
    """Counts the images that go through a training's network."""

    def __init__(self, training: FineTune) -> None:
        self.images = 0
        training.network.model.register_forward_pre_hook(self._count)

    def _count(self, model, inputs) -> None:
        self.images += len(inputs[0])


def folders(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


# --- The probe --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"arch": "test_vit"}, {"head": "mlp"}, {"concat_pool": True}], ids=str)
def test_without_other_epochs_it_is_the_whole_training(probe, colour_images, settings):
    training = probe(**settings)
    metrics = training.run_epoch()
    assert (metrics["epoch"], metrics["stage"], metrics["progress"]) == (0, "probe", 100)
    assert metrics["error_rate"] <= 0.15 and metrics["accuracy"] == 1 - metrics["error_rate"]
    assert metrics["feature_seconds"] > 0 and metrics["images_per_second"] > 0
    assert (metrics["train_images"], metrics["valid_images"]) == tuple(map(len, colour_images.split()))
    assert training.state()


@pytest.mark.parametrize("settings", [{}, {"head": "mlp"}, {"probe_views": 1}], ids=str)
def test_the_error_to_expect_of_it_is_that_on_all_images(probe, settings):
    """Of the linear probe of the centre views: exactly that; of others: corrected by it, so between the two."""
    training = probe(**settings)
    probing = training.probing()
    features, train = probing.features(), training.train_indices
    linear = probing.linear_probe(features, train)
    labels = training.inputs.labels[training.valid_indices]
    wrong = (linear.logits(torch.from_numpy(features.rows[training.valid_indices])).argmax(1) != labels).sum().item()
    on_all = (wrong + len(train) * linear.out_of_fold_error_rate) / (len(train) + len(labels))
    metrics = training.run_epoch()
    assert training.reference.error_rate == pytest.approx(on_all)
    assert metrics["expected_error_rate"] >= min(on_all, metrics["error_rate"])
    if not settings and wrong:
        assert metrics["expected_error_rate"] == pytest.approx(on_all)


@pytest.mark.parametrize(
    "settings", [{}, {"head": "mlp"}, {"start_size": 16, "start_share": 0.5, "epochs": 2}], ids=str
)
def test_evaluation_of_the_network_gives_the_error_of_the_probe(probe, settings):
    training = probe(**settings)
    metrics = training.run_epoch()
    if "start_size" in settings:  # the next epoch's images are smaller than the probe's
        training.epochs_done = -1
    again = training.evaluate()
    assert abs(again["error_rate"] - metrics["error_rate"]) * metrics["valid_images"] < 1.5
    assert again["valid_loss"] == pytest.approx(metrics["valid_loss"], rel=0.02)


@pytest.mark.parametrize("settings", [{}, {"head": "mlp"}], ids=str)
def test_it_is_the_same_in_every_training_whether_features_and_head_are_cached_or_not(probe, settings, monkeypatch):
    first, second = probe(**settings), probe(**settings, mixup_alpha=0.4)
    expected = measured(first.run_epoch())
    monkeypatch.setattr(module, "fit", lambda *args, **kwargs: pytest.fail("computed the head again"))
    monkeypatch.setattr(module, "fit_mlp", module.fit)
    passes = ForwardPasses(second)
    assert measured(second.run_epoch()) == expected
    assert passes.images == 0
    for ours, theirs in zip(first.network.model.parameters(), second.network.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_it_learns_from_the_images_that_a_deadline_leaves_time_for(colour_images, weights, cache):
    def run(seconds: float) -> tuple[dict, int]:
        deadline = time.time() + seconds
        training = FineTune(Recipe(**SMALL), colour_images, weights=weights, probe_deadline=deadline)
        passes = ForwardPasses(training)
        return training.run_epoch(), passes.images

    train, valid = map(len, colour_images.split())
    metrics, images = run(0.0)  # at least one of each class
    assert (metrics["train_images"], metrics["skipped_images"]) == (3, train - 3)
    assert metrics["valid_images"] == valid and 0 <= metrics["error_rate"] <= 1
    assert images == 3 * valid + 3  # twice to see how long they take
    metrics, _ = run(3600.0)
    assert (metrics["train_images"], metrics.get("skipped_images")) == (train, None)
    metrics, images = run(0.0)  # the features of all are known now
    assert (metrics["train_images"], images) == (train, 0)


def test_the_probabilities_of_unseen_images_are_kept_with_the_head(probe, monkeypatch):
    training = probe()
    probing, train = training.probing(), training.train_indices
    computed = probing.linear_probe(probing.features(), train)
    monkeypatch.setattr(module, "fit", lambda *args, **kwargs: pytest.fail("computed the head again"))
    kept = probing.linear_probe(probing.features(), train)
    assert kept.out_of_fold.shape == (len(train), 3) and torch.equal(kept.out_of_fold, computed.out_of_fold)
    wrong = kept.out_of_fold.argmax(1) != training.inputs.labels[torch.as_tensor(train)]
    assert kept.out_of_fold_error_rate == wrong.double().mean()


def test_augmented_views_of_the_images_for_training_are_shared_too(probe, cache):
    first, second = probe(probe_views=2), probe(probe_views=2, mixup_alpha=0.4)
    passes = [ForwardPasses(training) for training in (first, second)]
    expected = first.run_epoch()
    assert passes[0].images == 36 + 2 * expected["train_images"] and len(folders(cache)) == 3
    assert measured(second.run_epoch()) == measured(expected)
    assert passes[1].images == 0
    assert not torch.equal(probe_weight(first), probe_weight(trained(probe())))


def test_on_all_images_only_the_views_of_those_for_validation_are_new(probe, colour_images, cache):
    probe(probe_views=2).run_epoch()
    training = probe(probe_views=2, all_images=True)
    passes = ForwardPasses(training)
    metrics = training.run_epoch()
    valid = len(colour_images.split()[1])
    assert passes.images == 2 * valid
    assert (metrics["train_images"], metrics["valid_images"]) == (36, valid)
    assert "expected_error_rate" not in metrics  # the probe has seen all images


def test_a_probe_can_give_a_small_class_its_due(probe, tmp_path, cache):
    """Of two classes that cannot be told apart, one with a fifth of the other's images."""
    for name, count in (("large", 40), ("small", 8)):
        (tmp_path / name).mkdir()
        for number in range(count):
            pixels = np.random.default_rng([count, number]).normal(120, 30, (64, 64, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / name / f"{number}.png")
    images = presize(find_images(tmp_path), 48)

    def probability_of_small(**settings) -> float:
        training = probe(images, **settings)
        training.run_epoch()
        logits = training._head_logits(training.probing().features().rows[training.valid_indices])
        return float(logits.softmax(1)[:, 1].mean())

    assert probability_of_small() == pytest.approx(8 / 48, abs=0.1)
    assert probability_of_small(class_weights="inverse") == pytest.approx(1 / 2, abs=0.15)
    assert probability_of_small(logit_adjustment=1.0) == pytest.approx(1 / 2, abs=0.15)
    assert probability_of_small(logit_adjustment=1.0, head="mlp") > 0.3


def test_views_are_not_computed_again_for_a_head_that_is_kept(probe, cache):
    expected = probe(probe_views=1).run_epoch()
    [views] = [folder for folder in folders(cache) if not list(folder.glob("*.head"))]
    shutil.rmtree(views)
    again = probe(probe_views=1)
    passes = ForwardPasses(again)
    assert measured(again.run_epoch()) == measured(expected)
    assert passes.images == 0


def trained(training: FineTune) -> FineTune:
    training.run_epoch()
    return training


def probe_weight(training: FineTune) -> torch.Tensor:
    return training.network.classifier.weight


def test_other_images_for_training_get_a_head_of_their_own_from_the_same_features(colour_images, weights, cache):
    recipe = Recipe(**SMALL)
    heads = []
    for seed in (0, 1):
        training = FineTune(recipe, colour_images, weights=weights, split_seed=seed)
        passes = ForwardPasses(training)
        training.run_epoch()
        heads.append(probe_weight(training))
        assert passes.images == (0 if seed else len(colour_images))
    assert not torch.equal(*heads)
    [folder] = folders(cache)
    assert len(list(folder.glob("*.head"))) == 2


def test_groups_stay_in_one_fold_and_have_a_head_of_their_own_on_the_same_features(probe, colour_images, cache):
    groups = np.arange(36) // 3
    plain, grouped = probe(), probe(PresizedImages(colour_images.path, tuple(map(str, groups))))
    assert not set(groups[grouped.train_indices]) & set(groups[grouped.valid_indices])
    train = plain.train_indices
    features = plain.probing().features()
    passes = ForwardPasses(grouped)
    linear = [training.probing().linear_probe(training.probing().features(), train) for training in (plain, grouped)]
    assert passes.images == 0 and len(list(features.path.glob("linear-*.head"))) == 2
    rows, labels = torch.from_numpy(features.rows[train]), plain.inputs.labels[torch.from_numpy(train)]
    expected = fit(rows, labels, 3, groups=torch.from_numpy(groups[train]))
    assert linear[1].out_of_fold_error_rate == expected.out_of_fold_error_rate
    assert linear[1].weight.equal(expected.weight)


@pytest.mark.parametrize("each", [8, 1], ids=["two classes", "one image for training per class"])
def test_few_classes_and_few_images_are_enough(probe, tmp_path, each):
    for label, colour in enumerate(((200, 60, 60), (60, 60, 200))):
        for split, count in (("train", each), ("valid", 2)):
            (tmp_path / split / str(label)).mkdir(parents=True)
            for n in range(count):
                pixels = Image.new("RGB", (48, 48), tuple(c + n for c in colour))
                pixels.save(tmp_path / split / str(label) / f"{n}.png")
    metrics = probe(presize(find_images(tmp_path), 48), batch_size=2).run_epoch()
    assert (metrics["train_images"], metrics["valid_images"], metrics["error_rate"]) == (2 * each, 4, 0)


def test_without_pretrained_weights_there_is_none(probe):
    settings = {"pretrained": False, "epochs": 1}
    trained = [probe(**settings, head_init=init).run_epoch() for init in ("probe", "zeros")]
    assert [(row["epoch"], row["stage"]) for row in trained] == [(1, "unfrozen")] * 2
    assert measured(trained[0]) == measured(trained[1])


def test_a_network_whose_features_are_no_numbers_fails_in_words(probe):
    training = probe()
    with torch.no_grad():
        for parameter in training.network.model.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(ValueError, match="features that are NaN or infinite"):
        training.run_epoch()


# --- What follows it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_frozen_and_unfrozen_epochs_go_on_from_it(probe, head):
    training = probe(freeze_epochs=1, epochs=2, head=head)
    rows = [training.run_epoch() for _ in range(4)]
    assert [row["stage"] for row in rows] == ["probe", "frozen", "unfrozen", "unfrozen"]
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    assert [row["progress"] for row in rows] == [0, 0, 50, 100]
    assert rows[1]["train_loss"] < 0.9  # ln 3 from a head of zeros


@pytest.mark.parametrize("settings", [{"epochs": 2}, {"epochs": 1, "freeze_epochs": 1, "head": "mlp"}], ids=str)
def test_a_training_continues_exactly_from_the_end_of_epoch_0(probe, weights, colour_images, settings):
    whole = probe(**settings)
    whole.run_epoch()
    state = whole.state()
    expected = [measured(whole.run_epoch()) for _ in range(2)]
    resumed = FineTune(Recipe(**SMALL | settings), colour_images, load_pretrained=False)
    resumed.load_state(state)
    assert resumed.epochs_done == 0
    assert [measured(resumed.run_epoch()) for _ in range(2)] == expected


def test_a_training_that_ends_before_the_end_of_epoch_0_starts_again(probe):
    def end() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        probe(on_progress=end, epochs=1).run_epoch()
    again, other = probe(epochs=1), probe(epochs=1)
    assert [measured(again.run_epoch()) for _ in range(2)] == [measured(other.run_epoch()) for _ in range(2)]


def test_the_finder_starts_from_it(colour_images, weights):
    recipe = Recipe(**SMALL | {"epochs": 1, "freeze_epochs": 1})
    curves = lr_find.find(recipe, colour_images, weights, ["frozen", "unfrozen"], num_it=12)
    assert set(curves) == {"frozen", "unfrozen"}
    assert curves["frozen"].losses[0] < 0.9  # ln 3 from a head of zeros


def test_the_command_without_a_search_prints_epoch_0(colour_folder, weights, monkeypatch, capsys):
    options = [f"--set={name}={value}" for name, value in (SMALL | {"epochs": 1}).items()]
    monkeypatch.setattr(sys, "argv", ["finetune", "--data", str(colour_folder), "--weights", str(weights), *options])
    finetune.main()
    rows = [dict(part.split(" ", 1) for part in line.split("  ")) for line in capsys.readouterr().out.splitlines()]
    assert [(row["epoch"], row["stage"]) for row in rows] == [("0", "probe"), ("1", "unfrozen")]


# --- What may go wrong with the cache ---------------------------------------------------------------------------------


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damaged", [FEATURES_FILE, "index.json", "*.head"])
def test_what_is_damaged_is_computed_again(probe, cache, damaged, caplog):
    expected = measured(probe().run_epoch())
    [folder] = folders(cache)
    [file] = folder.glob(damaged)
    whole = file.read_bytes()
    flip_byte(file)
    again = probe()
    passes = ForwardPasses(again)
    assert measured(again.run_epoch()) == expected
    if damaged != "*.head":
        assert "the cached features are damaged and will be computed again" in caplog.text
        assert passes.images == 36
    if damaged != "index.json":  # it has the seconds that they took
        assert file.read_bytes() == whole


def no_folder(cache: Path, monkeypatch) -> None:
    cache.parent.mkdir()
    cache.touch()


def full_disk(cache: Path, monkeypatch) -> None:
    for each in (feature_files, head_files):
        monkeypatch.setattr(each, "flush", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))


@pytest.mark.parametrize("trouble", [no_folder, full_disk])
def test_where_the_cache_cannot_be_written_the_training_goes_on(probe, cache, trouble, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        trouble(cache, patch)
        training = probe(epochs=1)
        found = [measured(training.run_epoch()) for _ in range(2)]
        assert "features cannot be kept in" in caplog.text
        assert not cache.is_dir() or not [path for path in cache.iterdir() if not path.name.endswith(".lock")]
    if cache.is_file():
        cache.unlink()
    training = probe(epochs=1)
    assert [measured(training.run_epoch()) for _ in range(2)] == found


def test_two_trainings_at_once_compute_them_once_and_who_waits_gives_signs_of_life(probe, cache, monkeypatch):
    monkeypatch.setattr(cache_module, "LOOK_SECONDS", 0.02)
    waits, signs = threading.Event(), []
    builder = probe(on_progress=lambda: waits.wait(30))
    waiting = probe(on_progress=lambda: (signs.append(1), waits.set()))
    passes = [ForwardPasses(training) for training in (builder, waiting)]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(builder.run_epoch)
        while not passes[0].images:
            time.sleep(0.01)
        second = pool.submit(waiting.run_epoch)
        assert measured(first.result(60)) == measured(second.result(60))
    assert [each.images for each in passes] == [36, 0]
    assert signs and len(folders(cache)) == 1


def test_one_that_cannot_get_the_lock_computes_nothing_until_it_is_free(probe, colour_images, monkeypatch):
    monkeypatch.setattr(cache_module, "LOOK_SECONDS", 0.02)
    signs = []
    training = probe(on_progress=lambda: signs.append(1))
    path = training.probing().path(centre_view(36, training.recipe))
    path.parent.mkdir(parents=True)
    passes = ForwardPasses(training)
    with ThreadPoolExecutor(1) as pool, FileLock(lock_file(path)):
        ended = pool.submit(training.run_epoch)
        while len(signs) < 3:
            time.sleep(0.01)
        assert passes.images == 0
    assert ended.result(30)["stage"] == "probe" and passes.images == 36


def build_and_hang(cache: str, weights: Path, halfway) -> None:
    def hang() -> None:
        halfway.set()
        time.sleep(60)

    FineTune(Recipe(**SMALL), PresizedImages(cache), weights=weights, on_progress=hang).run_epoch()


@pytest.mark.slow
def test_a_killed_build_frees_its_lock_and_leaves_nothing_that_is_used(probe, colour_images, weights, cache):
    spawn = multiprocessing.get_context("spawn")
    halfway = spawn.Event()
    process = spawn.Process(target=build_and_hang, args=(str(colour_images.path), weights, halfway))
    process.start()
    assert halfway.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    assert not folders(cache)
    training = probe()
    passes = ForwardPasses(training)
    assert training.run_epoch()["epoch"] == 0 and passes.images == 36


def test_memory_that_is_scarce_splits_the_forward_passes_too(colour_images, weights):
    sizes: list[int] = []
    training = FineTune(Recipe(**SMALL), colour_images, weights=weights, batch_parts=4)
    training.network.model.register_forward_pre_hook(lambda model, inputs: sizes.append(len(inputs[0])))
    training.run_epoch()
    assert sizes == [16, 16, 4]


def test_the_pass_that_tells_how_long_one_takes_is_split_too(colour_images, weights):
    sizes: list[int] = []
    deadline = time.time() + 3600
    training = FineTune(Recipe(**SMALL), colour_images, weights=weights, batch_parts=16, probe_deadline=deadline)
    training.network.model.register_forward_pre_hook(lambda model, inputs: sizes.append(len(inputs[0])))
    training.run_epoch()
    assert set(sizes) == {4}


# --- Several workers --------------------------------------------------------------------------------------------------

SHARED = {
    "linear head": {"epochs": 1},
    "mlp head": {"head": "mlp", "epochs": 1},
    "two views": {"probe_views": 2, "epochs": 1},
    "back from a high rate": {"wise_ft": True, "epochs": 1, "lr_max": 0.02, "lr_ratio": 1},
}


def work(rank: int, rendezvous: str, images: str, weights: Path, caches: dict[str, str]) -> dict:
    """One of two workers: the features and two epochs of each recipe, with the caches of some situations."""
    torch.set_num_threads(1)
    logging.disable()
    cross_validation.L2_GRID = FEW
    module.PIECE, module.CHUNK = 5, 4  # several chunks for each worker, and several pieces
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    found = {}
    for situation, cache in caches.items():
        os.environ["FINETUNE_SEARCH_CACHE"] = cache
        for name, settings in SHARED.items():
            training = FineTune(Recipe(**SMALL | settings), PresizedImages(images), weights=weights)
            passes = ForwardPasses(training)
            rows = training.probing().features().rows
            computed = passes.images
            metrics = [training.run_epoch() for _ in range(2)]
            found[situation, name] = {
                "features": rows.tobytes(),
                "probe": measured(metrics[0]),
                "next": measured(metrics[1]),
                "computed": computed,
                "mapped": isinstance(rows, np.memmap),
            }
            training.close()
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def groups(colour_images, weights, tmp_path_factory) -> list[list[dict]]:
    """What the workers of two trainings on one machine found, with the same cache or with one for each worker (as on
    two nodes, on which the first workers of the two are different ones), and where it cannot be written."""
    folder = tmp_path_factory.mktemp("workers")
    (folder / "closed").touch()
    with new_processes(4) as pool:
        futures = []
        for group in range(2):
            for rank in range(2):
                node = (group + rank) % 2
                caches = {"one node": folder / "shared", "two nodes": folder / f"node {node}"}
                caches |= {"no cache": folder / "closed" / "cache"}
                arguments = str(folder / f"rendezvous {group}"), str(colour_images.path), weights
                futures.append(pool.submit(work, rank, *arguments, {name: str(path) for name, path in caches.items()}))
        found = [future.result(timeout=300) for future in futures]
    return [found[:2], found[2:]]


@pytest.fixture(scope="module")
def alone(colour_images, weights, tmp_path_factory) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_SEARCH_CACHE", str(tmp_path_factory.mktemp("alone")))
        patch.setattr(cross_validation, "L2_GRID", FEW)
        patch.setattr(module, "CHUNK", 4)
        found = {}
        for name, settings in SHARED.items():
            training = FineTune(Recipe(**SMALL | settings), colour_images, weights=weights)
            rows = training.probing().features().rows
            metrics = [measured(training.run_epoch()) for _ in range(2)]
            found[name] = {"features": rows.tobytes(), "probe": metrics[0], "next": metrics[1]}
        return found


SITUATIONS = ("one node", "two nodes", "no cache")


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_two_workers_compute_the_same_features_and_the_same_probe_as_one(groups, alone, situation, name):
    expected = alone[name]
    for workers in groups:
        for worker in workers:
            found = worker[situation, name]
            assert found["features"] == expected["features"]
            np.testing.assert_allclose(found["probe"], expected["probe"], rtol=1e-6)
            np.testing.assert_allclose(found["next"], expected["next"], rtol=1e-3)


@pytest.mark.slow
def test_two_trainings_of_two_workers_each_at_once_compute_them_once(groups):
    computed = [[worker["one node", "linear head"]["computed"] for worker in workers] for workers in groups]
    assert sorted(map(sum, computed)) == [0, 36]
    assert sorted(map(max, computed))[1] < 36  # in shares


@pytest.mark.slow
@pytest.mark.parametrize("situation", SITUATIONS[:2])
def test_each_node_keeps_them_and_the_next_training_finds_them(groups, situation):
    for workers in groups:
        for worker in workers:
            assert worker[situation, "mlp head"]["computed"] == 0
            assert worker[situation, "mlp head"]["mapped"]


def test_where_epochs_follow_it_predicts_the_same_less_confidently(probe):
    alone, followed = probe().run_epoch(), probe(epochs=2, head_softening=0.4).run_epoch()
    assert followed["error_rate"] == alone["error_rate"]
    assert followed["train_loss"] == pytest.approx(0.4 * math.log(3), rel=0.01)
    assert alone["train_loss"] < 0.1 * followed["train_loss"]
