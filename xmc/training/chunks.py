"""Inputs of an encoder cut into chunks of rows, whatever structure they have.

Rows are the first dimension of tensors and arrays, the length of what has `slice(start, stop)`
(`Bag`, `Tokens`) and of lists that hold no tensors (texts, ragged ids). Tuples, mappings,
dataclasses and lists of tensors are structures, cut in all their parts. Everything else goes into
every chunk as it is: flags, None, tensors without dimensions, parameters, modules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from xmc.types import Bag, Tokens


@dataclass(frozen=True)
class TokenBudget:
    """Chunks of consecutive rows that hold at most so many tokens, and at least one row.

    For `Tokens` and for mappings with an `attention_mask` a chunk counts as its rows times its
    longest row, and columns of nothing but padding behind that row are left out; for a `Bag` it
    counts as its entries. Rows of similar length side by side make the best chunks.
    """

    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"expected a budget of at least 1 token, got {self.tokens}")


@dataclass(frozen=True)
class Chunks:
    """Inputs that are cut already, say each chunk padded to its own longest row.

    `parts` is indexed twice for most chunks, in forward and in replay: a sequence that loads a
    chunk when it is asked for keeps one at a time, and has to give the same one again.
    """

    parts: Sequence[Any]


Chunk = int | TokenBudget


def cut(inputs: Any, chunk: Chunk) -> Sequence[Any]:
    """The chunks of `inputs` in order, views where tensors allow; each is made when asked for.

    Raises ValueError where there are no rows, parts differ in their number of rows, or `chunk` is
    no size.
    """
    if isinstance(inputs, Chunks):
        if not len(inputs.parts):
            raise ValueError("expected inputs of at least one row, got none")
        return inputs.parts
    total = num_rows(inputs)
    if isinstance(chunk, TokenBudget):
        return _by_tokens(inputs, chunk.tokens)
    if not isinstance(chunk, int) or isinstance(chunk, bool):
        raise TypeError(f"expected chunk to be a number of rows or a TokenBudget, got {chunk!r}")
    if chunk < 1:
        raise ValueError(f"expected a chunk of at least 1 row, got {chunk}")
    ranges = [(start, min(start + chunk, total)) for start in range(0, total, chunk)]
    return _Slices(ranges, lambda start, stop: rows_between(inputs, start, stop))


def num_rows(inputs: Any) -> int:
    """The number of rows that all parts of `inputs` share; ValueError otherwise, or where 0."""
    sizes = list(_sizes(inputs, ""))
    if not sizes or sizes[0][1] == 0:
        raise ValueError("expected inputs of at least one row, got none")
    first, rows = sizes[0]
    for name, size in sizes:
        if size != rows:
            raise ValueError(
                f"expected inputs of the same number of rows, got {rows} in {first or 'the first'} "
                f"and {size} in {name}"
            )
    return rows


def rows_between(inputs: Any, start: int, stop: int) -> Any:
    """Rows `start` to `stop` of every part, in the same structure."""
    if _is_whole(inputs):
        return inputs
    if isinstance(inputs, Tensor | np.ndarray):
        return inputs[start:stop]
    if _is_sliceable(inputs):
        return inputs.slice(start, stop)
    if isinstance(inputs, list) and not _holds_tensors(inputs):
        return inputs[start:stop]
    return _map(inputs, lambda part: rows_between(part, start, stop))


def call(encoder: Callable[..., Any], inputs: Any) -> Any:
    """`encoder(*inputs)` for tuples and lists of tensors, `(**inputs)` for mappings, else plain."""
    if isinstance(inputs, Mapping):
        return encoder(**inputs)
    if type(inputs) is tuple or (isinstance(inputs, list) and _holds_tensors(inputs)):
        return encoder(*inputs)
    return encoder(inputs)


def tensors(inputs: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a structure with the path to it, such as `input_ids` or `0.mask`."""
    if isinstance(inputs, Tensor):
        yield name, inputs
    else:
        for key, part in _parts(inputs):
            yield from tensors(part, f"{name}.{key}" if name else key)


def map_tensors(inputs: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with each of its tensors replaced, those inside of a `Bag` too."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    return _map(inputs, lambda part: map_tensors(part, function))


def with_tensors(inputs: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with `function` of every tensor but parameters in the tensor's place."""
    if isinstance(inputs, Tensor):
        return inputs if isinstance(inputs, nn.Parameter) else function(inputs)
    return _map(inputs, lambda part: with_tensors(part, function))


class _Slices(Sequence[Any]):
    def __init__(self, ranges: list[tuple[int, int]], between: Callable[[int, int], Any]) -> None:
        self._ranges = ranges
        self._between = between

    def __len__(self) -> int:
        return len(self._ranges)

    def __getitem__(self, index: Any) -> Any:
        return self._between(*self._ranges[index])


def _by_tokens(inputs: Any, budget: int) -> Sequence[Any]:
    if isinstance(inputs, Bag):
        ranges = _fill(inputs.offsets.diff().tolist(), budget, padded=False)
        return _Slices(ranges, inputs.slice)
    mask = _mask(inputs)
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    lengths = ((mask != 0) * columns).amax(1).clamp(min=1).tolist()

    def between(start: int, stop: int) -> Any:
        part = rows_between(inputs, start, stop)
        return _narrow(part, mask.shape[1], max(lengths[start:stop]))

    return _Slices(_fill(lengths, budget, padded=True), between)


def _mask(inputs: Any) -> Tensor:
    if isinstance(inputs, Tokens):
        return inputs.mask
    if isinstance(inputs, Mapping) and isinstance(inputs.get("attention_mask"), Tensor):
        mask = cast(Tensor, inputs["attention_mask"])
        if mask.dim() == 2:
            return mask
    raise TypeError(
        "expected Tokens, a Bag or a mapping with an attention_mask [B, T] for a token budget, "
        f"got {type(inputs).__name__}"
    )


def _narrow(inputs: Any, width: int, tokens: int) -> Any:
    """The first `tokens` columns of every tensor [B, width, ...]."""
    if isinstance(inputs, Tensor):
        is_wide = inputs.dim() > 1 and inputs.shape[1] == width
        return inputs[:, :tokens] if is_wide else inputs
    return _map(inputs, lambda part: _narrow(part, width, tokens))


def _fill(lengths: list[int], budget: int, *, padded: bool) -> list[tuple[int, int]]:
    ranges, start, longest, total = [], 0, 0, 0
    for row, length in enumerate(lengths):
        longest, total = max(longest, length), total + length
        cost = longest * (row + 1 - start) if padded else total
        if cost > budget and row > start:
            ranges.append((start, row))
            start, longest, total = row, length, length
    return [*ranges, (start, len(lengths))]


def _sizes(inputs: Any, name: str) -> Iterator[tuple[str, int]]:
    if isinstance(inputs, Chunks):
        raise TypeError(f"expected Chunks as the whole inputs of an encoder, got them in {name}")
    if _is_whole(inputs):
        return
    if isinstance(inputs, Tensor | np.ndarray):
        yield name, inputs.shape[0]
    elif _is_sliceable(inputs) or (isinstance(inputs, list) and not _holds_tensors(inputs)):
        yield name, len(inputs)
    else:
        for key, part in _parts(inputs):
            yield from _sizes(part, f"{name}.{key}" if name else key)


def _parts(inputs: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(inputs, Mapping):
        yield from ((str(key), part) for key, part in inputs.items())
    elif isinstance(inputs, list | tuple):
        yield from ((str(key), part) for key, part in enumerate(inputs))
    elif _is_dataclass(inputs):
        yield from ((f.name, getattr(inputs, f.name)) for f in dataclasses.fields(inputs))


def _map(inputs: Any, function: Callable[[Any], Any]) -> Any:
    """The same structure over `function` of its parts."""
    if isinstance(inputs, Mapping):
        parts = {key: function(part) for key, part in inputs.items()}
        return parts if type(inputs) is dict else type(inputs)(parts)  # type: ignore[call-arg]
    if isinstance(inputs, tuple) and hasattr(inputs, "_fields"):
        return type(inputs)(*map(function, inputs))
    if isinstance(inputs, list | tuple):
        return type(inputs)(map(function, inputs))
    if _is_dataclass(inputs):
        return dataclasses.replace(inputs, **{key: function(part) for key, part in _parts(inputs)})
    return inputs


def _is_whole(inputs: Any) -> bool:
    if isinstance(inputs, Tensor | np.ndarray):
        return inputs.ndim == 0 or isinstance(inputs, nn.Parameter)
    return isinstance(inputs, nn.Module)


def _is_sliceable(inputs: Any) -> bool:
    return hasattr(inputs, "slice") and hasattr(inputs, "__len__")


def _is_dataclass(inputs: Any) -> bool:
    return dataclasses.is_dataclass(inputs) and not isinstance(inputs, type)


def _holds_tensors(inputs: Any) -> bool:
    if isinstance(inputs, Tensor | np.ndarray) or _is_sliceable(inputs):
        return True
    return any(_holds_tensors(part) for _, part in _parts(inputs))
