"""A share of a GPU, as Ray counts it, as people read it, and as its memory is limited."""

import pytest
import torch

from trainables.system.gpu_share import gpu_share, limit_memory, memory_fraction, num_sharing, reserved


def test_a_share_and_the_number_that_share_are_the_same():
    assert [num_sharing(gpu_share(n)) for n in range(1, 49)] == list(range(1, 49))
    assert [num_sharing(gpus) for gpus in (0, 1, 4)] == [1, 1, 1]


def test_what_a_worker_reserves_reads_like_a_sentence():
    assert reserved(2, 0) == "2 CPUs"
    assert reserved(8, 1) == "8 CPUs and 1 GPUs"
    assert reserved(2.5, 0.3333) == "2.5 CPUs and 1/3 of a GPU"


@pytest.mark.parametrize("total", [8e9, 24e9, 80e9])
@pytest.mark.parametrize("count", [2, 4, 8, 48])
def test_the_workers_on_a_gpu_never_take_more_than_its_memory(total, count):
    fraction = memory_fraction(gpu_share(count), total)
    assert 0 < fraction * count < 1
    if total / count > 1.2e9:  # room for what a process takes besides its tensors
        assert count * (fraction * total + 0.6e9) <= total


def test_each_worker_gets_its_share_of_the_memory_and_one_alone_gets_all(monkeypatch):
    """Played without a GPU: torch's own calls are what a worker makes."""
    limits = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: _Properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *call: limits.append(call))
    gpu = torch.device("cuda", 1)
    limit_memory(0.25, gpu)
    assert limits == [(pytest.approx(0.25 - 0.6 / 80), gpu)]
    for share, device in ((1, gpu), (0, torch.device("cpu")), (0.25, torch.device("cpu"))):
        limit_memory(share, device)
    assert len(limits) == 1


class _Properties:
    total_memory = 80e9
