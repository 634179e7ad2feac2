"""Layers stored for prediction give the scores of the numbers they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from xmc.nn.compressed import Storage, compress_
from xmc.nn.fan_in import FixedFanInLinear
from xmc_kernels.packing import unpack_index
from xmc_kernels.topk import fan_in_topk


def layer(**options) -> FixedFanInLinear:
    made = FixedFanInLinear(600, 80, 12, **options)
    made.weight.requires_grad_(False)
    return made


@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "error"), [("float32", 0), ("bfloat16", 2**-8), ("int8", 1 / 254), ("int4", 1 / 4)]
)
def test_scores_are_those_of_the_stored_numbers(dtype, error, packed, group) -> None:
    plain = layer(group_size=group)
    weight, index = plain.weight.clone(), plain.index.int()
    compress_(plain, Storage(dtype, packed))
    plain.matrix.validate()
    numbers = plain.matrix.numbers().float()
    largest = weight.abs().amax(1, keepdim=True)
    assert bool(((numbers - weight).abs() <= error * largest + 1e-7).all())
    stored = unpack_index(plain.index, plain.pattern, 12) if packed else plain.index.int()
    assert torch.equal(stored, index)
    x = torch.randn(3, 600)
    ours = fan_in_topk(
        *(x, plain.weight, plain.index, plain.bias, 5),
        pattern=plain.pattern,
        scale=plain.weight_scale,
    )
    theirs = fan_in_topk(x, numbers, index.to(torch.uint16), plain.bias, 5)
    torch.testing.assert_close(ours, theirs)


def test_bytes_of_a_label_at_fan_in_32() -> None:
    """The weights, ten bits an input, a scale: 32 + 40 + 4."""
    big = FixedFanInLinear(1000, 64, 32, bias=False)
    compress_(big, Storage("int8", packed=True))
    tensors = [*big.parameters(), *big.buffers()]
    assert sum(t.numel() * t.itemsize for t in tensors) == 64 * (32 + 40 + 4)


def test_shapes_on_meta_are_those_of_the_stored_layer() -> None:
    for options in ({}, {"group_size": 8}, {"pattern": (2, 100 // 25)}, {"dtype": torch.bfloat16}):
        if "pattern" in options:
            made = [FixedFanInLinear(600, 80, 300, device=d, **options) for d in ("cpu", "meta")]
        else:
            made = [FixedFanInLinear(600, 80, 13, device=d, **options) for d in ("cpu", "meta")]
        for storage in (Storage("int4", packed=True), Storage("bfloat16"), Storage("int8")):
            for one in made:
                compress_(one, storage)
            real, meta = (one.state_dict() for one in made)
            assert {k: (v.shape, v.dtype) for k, v in real.items()} == {
                k: (v.shape, v.dtype) for k, v in meta.items()
            }
            made[1].load_state_dict(real, assign=True)
            made = [
                FixedFanInLinear(600, 80, made[0].fan_in, device=d, **options)
                for d in ("cpu", "meta")
            ]


def test_dense_layers_are_halved_at_most() -> None:
    head = nn.ModuleList([nn.Linear(8, 5), layer()])
    compress_(head, Storage("int8"))
    assert head[0].weight.dtype == torch.bfloat16
    assert head[1].weight.dtype == torch.int8
    with pytest.raises(ValueError, match="float32, bfloat16, int8, int4, got 'int3'"):
        Storage("int3")  # type: ignore[arg-type]


def test_float8_is_stored_anew() -> None:
    narrow = layer(dtype=torch.float8_e4m3fn)
    before = narrow.matrix.numbers()
    compress_(narrow, Storage("float32"))
    assert narrow.weight_scale is None
    torch.testing.assert_close(narrow.weight.data, before)


def test_int4_tells_no_odd_fan_in_of_several_blocks_from_an_even_one() -> None:
    made = FixedFanInLinear(24, 8, 3, pattern=(1, 8))
    with pytest.raises(
        ValueError, match=r"even fan-in for int4 weights of pattern \(1, 8\), got 3"
    ):
        compress_(made, Storage("int4"))
