"""Keys of random numbers, and generators that are put back."""

from __future__ import annotations

import pytest
import torch

from xmc.distributed.keyed_random import keyed_random, mixed


def test_a_key_gives_the_numbers_of_its_seed_and_leaves_no_trace() -> None:
    expected_inside = torch.rand(5, generator=torch.Generator().manual_seed(42))
    before = torch.get_rng_state()
    with keyed_random(42, [torch.device("cpu")]):
        inside = torch.rand(5)
    assert torch.equal(inside, expected_inside)
    assert torch.equal(torch.get_rng_state(), before)


def test_generators_are_put_back_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="Trying to create tensor with negative"):
        _draw_too_few()
    assert torch.equal(torch.get_rng_state(), before)


def _draw_too_few() -> None:
    with keyed_random(1, []):
        torch.rand(3)
        torch.rand(-1)


def test_keys_are_those_of_splitmix64() -> None:
    # First output of the reference generator for the state 0 (Steele et al. 2014), halved.
    assert mixed(0) == 0xE220A8397B1DCDAF >> 1
    keys = {mixed(seed, micro_batch) for seed in range(-30, 30) for micro_batch in range(60)}
    assert len(keys) == 3600
    assert len({key & 0xFFFFFFFF for key in keys}) > 3590  # torch's CPU generator reads these
    assert mixed(1, 2) != mixed(2, 1)
    assert all(0 <= key < 1 << 63 for key in keys)


def test_devices_are_of_one_type() -> None:
    devices = [torch.device("meta"), torch.device("cuda", 0)]
    with pytest.raises(ValueError, match="one type beside the CPU"), keyed_random(1, devices):
        pass
