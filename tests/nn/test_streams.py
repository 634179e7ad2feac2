"""The hash: splitmix64 as published, balanced bits, uniform draws."""

from __future__ import annotations

import torch
from torch import Tensor

from xmc.nn import streams

CPU = torch.device("cpu")


def test_mix_is_splitmix64() -> None:
    """The published generator's first outputs for seed 1234567."""
    state = torch.tensor(1234567)
    steps = [state + (i + 1) * torch.tensor(streams._GOLDEN) for i in range(3)]
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [int(streams.mix(step)) % 2**64 for step in steps] == expected


def assert_fair(bits: Tensor) -> None:
    """Draws [..., N, n] of bits set half of the time, within five standard deviations."""
    count = bits.shape[-2]
    assert float((bits.double().mean(-2) - 0.5).abs().max()) < 5 * 0.5 / count**0.5


def test_bits_are_balanced_and_uncorrelated_between_neighbours() -> None:
    keys = streams.substreams(streams.stream(1, 2, CPU), torch.arange(20_000))
    draws = torch.stack([streams.below(2**20, keys, counter) for counter in range(3)])
    bits = (draws.unsqueeze(-1) >> torch.arange(20)) & 1
    assert_fair(bits)
    assert_fair(bits[0] ^ bits[1])
    assert_fair(bits[:, 1:] ^ bits[:, :-1])


def test_steps_seeds_and_purposes_have_unrelated_keys() -> None:
    keys = [
        streams.stream(seed, step, CPU, purpose)
        for seed in range(-3, 20)
        for step in range(20)
        for purpose in (0, 1)
    ]
    values = torch.stack(keys)
    assert len(values.unique()) == len(keys)
    # 20 bits each of 920 keys: neighbours in the grid share no bit more often than chance.
    bits = (values.unsqueeze(-1) >> torch.arange(20)) & 1
    assert_fair(bits)
    assert_fair(bits[1:] ^ bits[:-1])


def test_symmetric_uniform_has_the_moments_of_the_uniform_distribution() -> None:
    drawn = streams.symmetric_uniform(torch.arange(100_000)).double()
    assert drawn.abs().max() < 1
    assert (drawn != 0).all()
    deviations = 5 / 100_000**0.5
    assert abs(float(drawn.mean())) < deviations * (1 / 3) ** 0.5
    assert abs(float(drawn.square().mean()) - 1 / 3) < deviations * (1 / 5 - 1 / 9) ** 0.5
    assert abs(float(drawn.pow(3).mean())) < deviations * (1 / 7) ** 0.5


def test_distinct_draws_do_not_depend_on_the_other_rows() -> None:
    keys = streams.mix(torch.arange(300))
    counts = torch.arange(300) % 8
    together = streams.distinct_below(7, counts, keys)
    for row in range(300):
        count = int(counts[row])
        alone = streams.distinct_below(7, counts[row : row + 1], keys[row : row + 1])[0]
        assert together[row, :count].tolist() == alone.tolist()
        assert len(set(alone.tolist())) == count
        assert all(0 <= value < 7 for value in alone.tolist())
