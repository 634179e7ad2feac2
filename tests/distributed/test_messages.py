"""Messages: what a header says, and failures as messages."""

from __future__ import annotations

import pytest
import torch

from xmc.distributed.messages import MAX_DIMS, MAX_TENSORS, Kind, Message, _pack, _unpack


def test_a_header_says_what_a_message_holds() -> None:
    tensors = (
        torch.zeros(2, 3, dtype=torch.float64),
        None,
        torch.tensor(True),
        torch.zeros([2] * MAX_DIMS, dtype=torch.bfloat16),
        *[torch.zeros(0, 5, dtype=torch.int16)] * (MAX_TENSORS - 4),
    )
    wants = (True, False, False, True, *[False] * (MAX_TENSORS - 4))
    key = (1 << 63) - 1
    message = Message(Kind.GRADIENT, 4, 70_000, key, tensors, wants)
    kind, index, total, read_key, layouts = _unpack(_pack(message))
    assert (kind, index, total, read_key) == (Kind.GRADIENT, 4, 70_000, key)
    for layout, tensor, wants_grad in zip(layouts, tensors, wants, strict=True):
        assert layout.wants_grad == wants_grad
        assert layout.dtype == (None if tensor is None else tensor.dtype)
        assert list(layout.shape) == ([] if tensor is None else list(tensor.shape))
    assert message.num_bytes == 6 * 8 + 1 + 2 * 2**MAX_DIMS


def test_what_is_no_header_is_refused() -> None:
    header = _pack(Message(Kind.EVALUATION))
    header[0] += 1
    with pytest.raises(ValueError, match="expected the header of a message, got one that starts"):
        _unpack(header)


def test_failures_carry_their_words() -> None:
    assert Message.failure("caf\u00e9 closed").text == "caf\u00e9 closed"
    assert Message.failure("x" * 10_000).text == "x" * 2000
