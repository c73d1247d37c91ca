"""Both loaders give the same batches, in the same order, wherever the pixels are kept."""

import numpy as np
import pytest
import torch

from trainables.batches import augmentation, loader
from trainables.batches.loader import BatchLoader, GpuLoader
from trainables.data.presize import presize
from trainables.recipe import Recipe

CPU = torch.device("cpu")


@pytest.fixture
def plans() -> list[loader.Plan]:
    """Batches of different sizes, with repeats and out of order."""
    rng = np.random.default_rng(0)
    indices = [np.array([5, 0, 35, 5]), np.arange(9), np.array([7]), np.array([2, 1])]
    return [(each, augmentation.draw(rng, len(each), Recipe())) for each in indices]


def batches(loader, plans) -> list[torch.Tensor]:
    made = list(loader.batches(iter(plans), 32, CPU))
    loader.close()
    return made


@pytest.mark.parametrize("where", ["on the device", "fetched for each batch", "fetched from JPEGs"])
def test_the_gpus_loader_gives_the_batches_of_the_cpus(colour_folder, search_cache, plans, monkeypatch, where):
    from trainables.data.layouts import find_images

    storage = "jpeg" if "JPEGs" in where else "memory-map"
    images = presize(find_images(colour_folder), 48, storage=storage)
    monkeypatch.setattr(loader, "free_memory", lambda _: 1 << 40 if where == "on the device" else 0)
    ours, theirs = (batches(kind(images, num_threads=2), plans) for kind in (GpuLoader, BatchLoader))
    assert [batch.shape for batch in ours] == [(len(indices), 3, 32, 32) for indices, _ in plans]
    assert (loader._resident(images, CPU) is not None) == (where == "on the device")
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.uint8 and one.stride() == other.stride()
        assert (one.float() - other.float()).abs().mean() < 0.5


def test_a_problem_in_a_thread_reaches_the_training(colour_images, plans, monkeypatch):
    class Broken:
        shapes, offsets, storage, nbytes = colour_images.shapes, colour_images.offsets, "jpeg", 0

        def __getitem__(self, index):
            raise OSError("the disk is gone")

    for kind in (BatchLoader, GpuLoader):
        with pytest.raises(OSError, match="the disk is gone"):
            batches(kind(Broken(), num_threads=1), plans)


def test_only_a_few_batches_are_made_ahead(colour_images, plans):
    asked = []

    def watched():
        for n, plan in enumerate(plans * 5):
            asked.append(n)
            yield plan

    made = BatchLoader(colour_images, num_threads=1, prefetch=2)
    stream = made.batches(watched(), 32, CPU)
    next(stream)
    assert len(asked) == 3
    made.close()
