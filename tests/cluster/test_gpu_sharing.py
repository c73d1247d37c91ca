"""How many trials share a GPU: from the epochs that they have trained to the next number, and what is said of it.

A real group on a share of a GPU is in tests/ray/test_gpu_share.py.
"""

import pytest

from search.cluster.gpu_sharing import MAX_EPOCHS, MIN_EPOCHS, Epoch, GpuSharing

AUTO = (1, 2, 4, 8)
SECONDS = 10.0


class Search:
    """Trials on one GPU, or several: as many at once as the decision says, each of some epochs of ten seconds.

    `total` is the images per second of so many trials together on one GPU; an architecture of `costs` slows its trials
    by a factor.
    """

    def __init__(self, total: dict[int, float], *, costs: tuple[float, ...] = (1.0,), num_gpus: int = 1) -> None:
        self.sharing = GpuSharing(AUTO, measures=True)
        self.total, self.costs, self.num_gpus = total, costs, num_gpus
        self.said: list[str] = []
        self.now = 0.0
        self.begun = 0

    def round(self, epochs: int = 3, alone: bool = False) -> None:
        """Trials on all GPUs, from their begin to their end; `alone`, one on each, whatever the number is."""
        level = self.sharing.trials_per_gpu
        per_gpu = 1 if alone else level
        trials = [(f"t{self.begun + i}", f"gpu{i % self.num_gpus}") for i in range(per_gpu * self.num_gpus)]
        costs = [self.costs[(self.begun + i) % len(self.costs)] for i in range(len(trials))]
        self.begun += len(trials)
        for epoch in range(epochs):
            self.now += SECONDS
            for i, ((name, gpu), cost) in enumerate(zip(trials, costs, strict=True)):
                ended = self.now + 0.1 * i
                slow_start = 0.5 if epoch == 0 else 1.0
                rate = slow_start * self.total[per_gpu] / per_gpu / cost
                what = {"trial": name, "gpu": gpu, "kind": cost, "images_per_second": rate, "trials_per_gpu": level}
                if said := self.sharing.add(Epoch(began=ended - SECONDS, ended=ended, **what)):
                    self.said.append(said)

    def settled(self) -> int:
        for _ in range(40):
            self.round()
        return self.sharing.trials_per_gpu


@pytest.mark.parametrize(
    ("total", "expected"),
    [
        ({1: 1000, 2: 1050, 4: 9999, 8: 9999}, 1),  # 5 % more is not worth it
        ({1: 1000, 2: 1600, 4: 1700, 8: 9999}, 2),
        ({1: 1000, 2: 1600, 4: 2300, 8: 2300}, 4),
        ({1: 1000, 2: 1900, 4: 3600, 8: 6000}, 8),
        ({1: 1000, 2: 700, 4: 9999, 8: 9999}, 1),  # they hinder each other
    ],
)
@pytest.mark.parametrize("num_gpus", [1, 2])
def test_trials_are_added_while_all_of_them_together_train_over_a_tenth_faster(total, expected, num_gpus):
    search = Search(total, num_gpus=num_gpus)
    assert search.settled() == expected
    assert not search.sharing.measures


def test_what_was_found_is_said():
    search = Search({1: 1000, 2: 1600, 4: 1700})
    search.settled()
    assert search.said == [
        "one trial at a time is measured, trying 2 at once",
        "2 trials at once train 1.60 times the images per second of 1, trying 4 at once",
        "4 trials at once train 1.06 times the images per second of 2; 2 share it from now on",
    ]
    search = Search({1: 1000, 2: 900})
    search.settled()
    assert search.said[-1].endswith("of 1; each trial has one for itself from now on")


def test_architectures_are_compared_with_themselves():
    """The later trials are of a network that costs ten times as much: that is not what sharing costs."""
    search = Search({1: 1000, 2: 1600, 4: 1650}, costs=(1.0, 10.0))
    assert search.settled() == 2
    only_others = Search({1: 1000, 2: 1600})
    while only_others.sharing.trials_per_gpu == 1:
        only_others.round()
    only_others.costs = (10.0,)
    for _ in range(3):
        only_others.round()
    assert only_others.sharing.measures and only_others.sharing.trials_per_gpu == 2  # nothing to compare with


def test_where_no_two_epochs_can_be_compared_it_gives_up_after_a_while():
    search = Search({1: 1000, 2: 1600}, costs=tuple(1.0 + i for i in range(1000)))
    assert search.settled() == 1
    assert f"no {MIN_EPOCHS} epochs at 2 at once can be compared" in search.said[-1]
    assert 3 * search.begun >= MAX_EPOCHS


def test_an_epoch_that_had_its_gpu_to_itself_says_nothing_about_sharing():
    """Such as when others are still starting, or a search has no more trials."""
    search = Search({1: 1000, 2: 1100})
    search.round(4)
    assert search.sharing.trials_per_gpu == 2
    for _ in range(5):
        search.round(alone=True)
    assert search.sharing.trials_per_gpu == 2 and search.sharing.measures
    search.round(4)
    assert search.sharing.trials_per_gpu == 1  # 2 x 550, not 2 x 1000


def test_epochs_of_trials_that_began_before_the_number_changed_do_not_count():
    search = Search({1: 1000, 2: 1600})
    search.round(epochs=100)
    assert (search.sharing.trials_per_gpu, len(search.said)) == (2, 1)


# --- Memory -----------------------------------------------------------------------------------------------------------


def test_a_trial_that_runs_out_of_memory_lowers_the_number_for_those_to_come():
    sharing = GpuSharing([6, 3, 1], measures=False)
    assert sharing.trials_per_gpu == 6
    assert sharing.ran_out_of_memory(6) == "1/6 of its memory was not enough for a trial; 3 share it from now on"
    assert sharing.ran_out_of_memory(6) == ""  # of those that began before
    assert sharing.trials_per_gpu == 3
    assert "each trial has one for itself from now on" in sharing.ran_out_of_memory(3)
    assert sharing.ran_out_of_memory(1) == ""  # its batches are split, and no more can be done
    assert sharing.trials_per_gpu == 1


def test_what_memory_is_too_small_for_is_not_tried_again():
    search = Search({1: 1000, 2: 1900, 4: 3600, 8: 6000})
    while search.sharing.trials_per_gpu < 4:
        search.round()
    search.sharing.ran_out_of_memory(4)
    assert search.settled() == 2


def test_a_trial_that_ran_out_with_a_larger_share_says_more_than_one_with_the_present_one():
    sharing = GpuSharing([4, 2, 1], measures=False)
    assert sharing.ran_out_of_memory(2)
    assert sharing.trials_per_gpu == 1
