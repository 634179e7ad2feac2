"""Scores of all pairs by a network, in the memory of a tile of pairs: deep distances.

`d_ij = Phi(f(s_i), g(t_j))` with a network Phi that is trained, or with token-wise similarities.
What Phi computes on the way is of size [B, B, hidden] and never there at once: tiles of pairs are
scored without a graph and, once the loss has given the gradient of every score, again with one.
Source: Gao et al., arXiv 2101.06983, section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from xmc.training.autocast import Autocast, without_autocast
from xmc.training.chunks import num_rows, rows_between, tensors, with_tensors
from xmc.training.encoding import modules_of
from xmc.training.gradient_sync import synchronized, synchronizers
from xmc.training.replay import Recorder, State
from xmc.types import Tokens

Distance = Callable[[Any, Any], Tensor]
Masked = tuple[Tensor, Tensor]  # vectors [B, T, D] and mask [B, T], nonzero for a real token


def pair_scores(
    distance: Distance,
    q: Any,
    k: Any,
    *,
    tile: int | tuple[int, int],
    modules: Iterable[nn.Module] = (),
) -> Tensor:
    """`distance(q, k)` [Bq, Bk] from tiles of `tile` rows of q times `tile` rows of k.

    `distance` scores every row of one part of q with every row of a part of k, [m, n]. q and k are
    tensors or any structure `xmc.training.chunks` can cut, say `(vectors, mask)`. Differentiable in
    their tensors and in what `distance` refers to: parameters get their `.grad` in `backward()`.
    Each tile is computed twice, with the same random numbers and buffers. In a loss of
    `cached_step` it makes the three passes of the paper:

    ```python
    def loss(q, k):
        return F.cross_entropy(pair_scores(network, q, k, tile=64), positives)
    cached_step([f, g], [documents, labels], loss, chunk=32)
    ```

    A cross-encoder is a `distance` of the texts themselves, on `pair_tokens` of both parts; late
    interaction is `max_sim`. A wrapped network synchronises its gradients once, in the last tile.
    For modules that `distance` does not refer to by name, see `cached_step`.

    Raises ValueError for tiles of no rows, q or k without rows, and scores of another shape;
    RuntimeError in `torch.autograd.grad`.
    """
    sizes = (tile, tile) if isinstance(tile, int) else tile
    if min(sizes) < 1:
        raise ValueError(f"expected tiles of at least 1 row, got {sizes[0]} x {sizes[1]}")
    found = list(dict.fromkeys([*modules_of(distance), *modules]))
    sources = [t for _, t in tensors((q, k)) if t.requires_grad and not _is_parameter(t)]
    parameters = [parameter for module in found for parameter in module.parameters()]
    # Without a module to look into, a distance may well be trained; known functions are not.
    needs_grad = any(p.requires_grad for p in parameters) or not (found or distance is max_sim)
    pairs = _Pairs(
        distance,
        with_tensors(q, _leaf),
        with_tensors(k, _leaf),
        [(a, b) for a in _ranges(num_rows(q), sizes[0]) for b in _ranges(num_rows(k), sizes[1])],
        found,
        {t.device for t in [*parameters, *(tensor for _, tensor in tensors((q, k)))]},
    )
    anchor = torch.empty(0, requires_grad=needs_grad)
    scores: Tensor = _PairScores.apply(pairs, anchor, *sources)
    return scores


def max_sim(
    q: Masked,  # vectors [m, Tq, D]
    k: Masked,  # vectors [n, Tk, D]
) -> Tensor:  # [m, n]
    """Late interaction: over the tokens of a query the sum of the best `<q, k>` among a key's.

    Holds [m, n, Tq, Tk]. Masked tokens take no part, and a key without tokens scores 0. Source:
    Khattab, Zaharia, ColBERT, arXiv 2004.12832, equation 3.
    """
    (q_vectors, q_mask), (k_vectors, k_mask) = q, k
    similar = torch.einsum("mtd,nsd->mnts", q_vectors, k_vectors)
    no_token = (k_mask == 0)[None, :, None, :]
    best = similar.masked_fill(no_token, -torch.inf).amax(3)
    used = (q_mask != 0)[:, None, :] & (k_mask != 0).any(1)[None, :, None]
    return best.masked_fill(~used, 0.0).sum(2)


def pair_tokens(q: Tokens, k: Tokens) -> Tokens:
    """Every query followed by every key, [m * n, T]: row `i * n + j` is query i with key j.

    The padding between them goes to the end, as a cross-encoder expects it.
    """
    m, n = len(q), len(k)
    ids = torch.cat([_each(q.ids, n), k.ids.repeat(m, 1)], 1)
    mask = torch.cat([_each(q.mask, n), k.mask.repeat(m, 1)], 1)
    order = (mask == 0).byte().argsort(dim=1, stable=True)
    longest = int((mask != 0).sum(1).max())
    order = order[:, : max(longest, 1)]
    return Tokens(ids.gather(1, order), mask.gather(1, order))


@dataclass
class _Pairs:
    distance: Distance
    q: Any  # with tensors that are leaves
    k: Any
    tiles: list[tuple[tuple[int, int], tuple[int, int]]]
    modules: list[nn.Module]
    devices: set[torch.device]

    def score(self, tile: int) -> tuple[Tensor, list[tuple[Tensor, Tensor, int]]]:
        """The scores of a tile; the tensors it read: whole, part as a leaf, first row."""
        (a, a_stop), (b, b_stop) = self.tiles[tile]
        read, parts = [], []
        for whole, start, stop in ((self.q, a, a_stop), (self.k, b, b_stop)):
            part = with_tensors(rows_between(whole, start, stop), _leaf)
            both = zip(tensors(whole), tensors(part), strict=True)
            read += [(source, leaf, start) for (_, source), (_, leaf) in both]
            parts.append(part)
        scores = self.distance(*parts)
        if not isinstance(scores, Tensor) or scores.shape != (a_stop - a, b_stop - b):
            got = (
                f"shape {list(scores.shape)}"
                if isinstance(scores, Tensor)
                else type(scores).__name__
            )
            raise ValueError(
                f"expected scores [{a_stop - a}, {b_stop - b}] of a tile of pairs, got {got}"
            )
        return scores, read


class _PairScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pairs: _Pairs, anchor: Tensor, *sources: Tensor) -> Tensor:
        recorder, states, scores = Recorder(pairs.modules, pairs.devices), [], None
        for tile, ((a, a_stop), (b, b_stop)) in enumerate(pairs.tiles):
            with recorder.recorded() as state:
                part, _ = pairs.score(tile)
            states.append(state)
            if scores is None:
                scores = part.new_empty(pairs.tiles[-1][0][1], pairs.tiles[-1][1][1])
            scores[a:a_stop, b:b_stop] = part
        assert scores is not None
        torch.clear_autocast_cache()
        ctx.pairs, ctx.recorder, ctx.states = pairs, recorder, states
        ctx.autocast = Autocast.now(pairs.devices)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_scores: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.autograd._is_checkpoint_valid():
            raise RuntimeError(
                "expected backward() without inputs= for scores of pairs, because parameters of "
                "their network get gradients in a backward pass of its own, got "
                "torch.autograd.grad or inputs="
            )
        pairs: _Pairs = ctx.pairs
        states: list[State] = ctx.states
        sources = [t for _, t in tensors((pairs.q, pairs.k)) if _wants(t)]
        sums = {source: torch.zeros_like(source) for source in sources}
        wrappers = synchronizers(pairs.modules)
        with ctx.recorder.preserved(), ctx.autocast.again():
            for tile, ((a, a_stop), (b, b_stop)) in enumerate(pairs.tiles):
                ctx.recorder.restore_(states[tile])
                is_last = tile == len(pairs.tiles) - 1
                with synchronized(wrappers, wrappers if is_last else ()), torch.enable_grad():
                    scores, read = pairs.score(tile)
                    if scores.requires_grad:
                        with without_autocast(pairs.devices):
                            torch.autograd.backward(scores, d_scores[a:a_stop, b:b_stop])
                for source, leaf, start in read:
                    if source in sums and leaf.grad is not None:
                        rows = slice(start, start + len(leaf)) if leaf.dim() else ...
                        sums[source][rows] += leaf.grad
        return (None, None, *(sums[source] for source in sources))


def _ranges(total: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, total)) for start in range(0, total, size)]


def _each(x: Tensor, times: int) -> Tensor:
    return x.repeat_interleave(times, 0)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _wants(tensor: Tensor) -> bool:
    return tensor.requires_grad and not _is_parameter(tensor)


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)
