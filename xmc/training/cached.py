"""The gradient cache for steps of one's own: an encoding function that is replayed in backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from xmc.training.autocast import Autocast
from xmc.training.chunks import Chunk, Chunks
from xmc.training.encoding import Encoder, Encoding, Getter, modules_of
from xmc.training.gradient_sync import check_same_passes, synchronized


def cached(
    *, chunk: Chunk, rep: Getter = None, modules: Iterable[nn.Module] = ()
) -> Callable[[Encoder], Callable[..., Tensor]]:
    """Make an encoding function run in chunks, now without a graph and in backward with one.

    ```python
    @cached(chunk=64)
    def encode(batch: dict[str, Tensor]) -> Tensor:
        return F.normalize(model(**batch).last_hidden_state[:, 0])

    loss = info_nce(encode(queries), encode(keys), scale=20.0)
    loss.backward()
    ```

    computes the gradient of `xmc.training.grad_cache.cached_step`, with as little memory, whatever
    stands between the representations and the loss. All arguments are cut into `chunk` rows, as
    `xmc.training.chunks` says; modules and flags go into every chunk. `cached(chunk=64)(model)`
    does the same for a module. A `Chunks` as the only argument is cut already; each of its parts
    goes into `encode` as in `cached_step`.

    The differences to `cached_step`: no kept graphs; each call synchronises the gradients of a
    wrapped module once, two calls twice; `backward()` fills the parameters, while
    for `torch.autograd.grad` they are no part of the graph. Errors are those of `cached_step`.
    """
    modules = list(modules)

    def decorate(encode: Encoder) -> Callable[..., Tensor]:
        def encode_in_chunks(*args: Any, **kwargs: Any) -> Tensor:
            given = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, nn.Module)]
            is_cut = len(args) == 1 and not kwargs and isinstance(args[0], Chunks)
            encoding = Encoding(
                encode if is_cut else lambda args, kwargs: encode(*args, **kwargs),
                args[0] if is_cut else (args, kwargs),
                chunk=chunk,
                rep=rep,
                modules=[*modules_of(encode), *given, *modules],
            )
            anchor = torch.empty(0, requires_grad=encoding.needs_grad)
            return _Replayed.apply(encoding, anchor)

        if not isinstance(encode, nn.Module):
            update_wrapper(encode_in_chunks, encode)
        return encode_in_chunks

    return decorate


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, encoding: Encoding, anchor: Tensor) -> Tensor:
        check_same_passes({wrapper: len(encoding) for wrapper in encoding.wrappers})
        # The anchor is what the representations' graph hangs on; encoders are no tensors.
        for index in range(len(encoding)):
            encoding.forward(index, graph=False)
        torch.clear_autocast_cache()
        rep, ctx.rows = encoding.take_representations()
        ctx.encoding, ctx.autocast = encoding, Autocast.now(encoding.devices)
        return rep.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rep: Tensor) -> tuple[None, None]:
        encoding: Encoding = ctx.encoding
        with encoding.recorder.preserved(), ctx.autocast.again():
            for index, d_chunk in enumerate(d_rep.split(ctx.rows)):
                is_last = index == len(encoding) - 1
                with synchronized(encoding.wrappers, encoding.wrappers if is_last else ()):
                    encoding.backward(index, d_chunk)
        return None, None
