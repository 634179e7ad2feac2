"""Losses of the rows of all ranks against the whole matrix of joined rows, in one process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xmc.losses import info_nce
from xmc.types import SparseLabels

WORKER = Path(__file__).with_name("ring_worker.py")
D = 6
COUNTS = {  # queries and keys of each rank
    2: [(5, 7), (3, 4)],
    4: [(3, 3), (1, 5), (0, 2), (4, 4)],
}
NO_KEYS = [(5, 6), (3, 0)]  # with positives only


def labels(positive: Tensor) -> SparseLabels:
    """CSR of a matrix's entries above 0."""
    indptr = torch.zeros(len(positive) + 1, dtype=torch.int64)
    indptr[1:] = (positive > 0).sum(1).cumsum(0)
    return SparseLabels(indptr, positive.nonzero()[:, 1].int(), positive.shape[1])


class Case:
    """Rows of all ranks, joined and apart, and the truth about them."""

    def __init__(
        self,
        oracle: Any,
        counts: Sequence[tuple[int, int]],
        *,
        loss: str = "info_nce",
        multiple: bool = False,
        ids: bool = False,
        weighted: bool = False,
        dtype: torch.dtype = torch.float64,
        scale: float = 7.0,
        exchange: str = "ring",
        wire_dtype: torch.dtype | None = None,
        **options: bool,
    ) -> None:
        self.oracle, self.counts, self.loss, self.dtype, self.flags = (
            *(oracle, counts, loss, dtype),
            options,
        )
        rows, keys = zip(*counts, strict=True)
        g = torch.Generator().manual_seed(sum(rows))
        q, k = oracle.features(sum(rows), sum(keys), D)
        if wire_dtype is not None:
            k = k.to(wire_dtype).double()
        # Key i of a rank for query i of the same.
        self.positive = torch.block_diag(*(torch.eye(*c, dtype=torch.float64) for c in counts))
        if multiple:
            shape = self.positive.shape
            chosen = torch.rand(shape, generator=g) < 0.25
            self.positive = torch.where(chosen, 0.5 + torch.rand(shape, generator=g).double(), 0)
            self.positive[0], self.positive[:, 1] = 0, 0  # a row and a column without any
        self.ids = (None, None)
        if ids:
            self.ids = tuple(torch.randint(4, (n,), generator=g) for n in (sum(rows), sum(keys)))
        self.weights = torch.rand(sum(rows), generator=g).double() if weighted else None
        self.numbers = [torch.tensor(scale, dtype=torch.float64)]
        if loss == "sigmoid":
            self.numbers.append(torch.tensor(-3.0, dtype=torch.float64))
        self.tensors = (q, k, *self.numbers)
        self.given = {"exchange": exchange, "wire_dtype": wire_dtype, **options}
        self.multiple = multiple

    def truth(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Loss, gradients of q, k, scale and perhaps bias, of the joined rows."""
        masked = self.oracle.masked_pairs(self.positive, *self.ids)
        function = self.oracle.info_nce if self.loss == "info_nce" else self.oracle.sigmoid_loss

        def loss(*tensors: Tensor) -> Tensor:
            return function(
                *tensors, self.positive, masked=masked, weights=self.weights, **self.flags
            )

        return list(self.oracle.with_gradients(loss, self.tensors, dtype))

    def message(self) -> dict[str, Any]:
        """For the worker: what each rank gives."""
        rows, keys = (list(n) for n in zip(*self.counts, strict=True))
        names = ("q", "k", "scale", "bias")[: len(self.tensors)]
        ranks: list[dict[str, Any]] = []
        for row, key in zip(*(torch.arange(sum(n)).split(n) for n in (rows, keys)), strict=True):
            tensors = [self.tensors[0][row], self.tensors[1][key], *self.numbers]
            own = {n: t.to(self.dtype) for n, t in zip(names, tensors, strict=True)}
            if self.multiple:
                positive = self.positive[row]
                own["positives"] = labels(positive)
                if self.loss == "info_nce":
                    own["positive_weights"] = positive[positive > 0]
            if self.ids[0] is not None:
                own |= {"query_ids": self.ids[0][row], "key_ids": self.ids[1][key]}
            if self.weights is not None:
                own["weights"] = self.weights[row]
            ranks.append(own)
        return {"loss": self.loss, "ranks": ranks, "options": self.given}

    def check(self, results: list[dict[str, Tensor]], *, exact: bool) -> None:
        """Values on every rank, gradients of features by row, of numbers in sum over ranks."""
        truth, naive = self.truth(), self.truth(torch.float32)
        names = ("q", "k", "scale", "bias")[: len(self.tensors)]
        for result in results:
            assert torch.equal(result["loss"], results[0]["loss"])
            assert all(result[name].dtype == self.dtype for name in names)
        ours = [results[0]["loss"]]
        ours += [torch.cat([result[name] for result in results]) for name in names[:2]]
        ours += [sum(result[name].double() for result in results) for name in names[2:]]
        for got, rough, want in zip(ours, naive, truth, strict=True):
            error, top = (got.double() - want).abs().max(), want.abs().max().clamp(min=1)
            # Float32: what the whole matrix costs in it, and some.
            limit = 4 * (rough.double() - want).abs().max() + 3e-6 * top
            assert error <= (1e-10 * top if exact else limit), (self.given, error)


def every_case(oracle: Any, counts: Sequence[tuple[int, int]], **more: Any) -> list[Case]:
    multiple = {"multiple": True, "ids": True, "weighted": True}
    kinds: list[dict[str, Any]] = [
        {},
        {"symmetric": True},
        {"decoupled": True, "weighted": True},
        multiple,
        multiple | {"symmetric": True},
        multiple | {"symmetric": True, "decoupled": True, "scale": 90.0},
        {"loss": "sigmoid"},
        {"loss": "sigmoid", "ids": True, "multiple": True, "weighted": True},
    ]
    both = ("ring", "gather")
    return [Case(oracle, counts, **kind, exchange=e, **more) for kind in kinds for e in both]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", [2, 4])
def test_values_and_gradients_are_those_of_the_joined_rows(
    ranks: Any, contrastive_oracle: Any, size: int, dtype: torch.dtype
) -> None:
    cases = every_case(contrastive_oracle, COUNTS[size], dtype=dtype)
    if size == 2:
        flags = {"multiple": True, "symmetric": True, "dtype": dtype}
        cases += [Case(contrastive_oracle, NO_KEYS, **flags, exchange=e) for e in ("ring", "auto")]
        # Keys rounded on the way are the keys of the loss.
        rounded = {"wire_dtype": torch.bfloat16, "dtype": dtype}
        cases += every_case(contrastive_oracle, COUNTS[size], **rounded)[2:4]
    results = ranks(size, WORKER, "losses", [case.message() for case in cases])
    for case, *of_ranks in zip(cases, *results, strict=True):
        assert not [result for result in of_ranks if isinstance(result, str)], of_ranks
        case.check(of_ranks, exact=dtype == torch.float64)


def test_half_precision_adds_up_unrounded(ranks: Any, contrastive_oracle: Any) -> None:
    """Of bfloat16 features, dq and dk are rounded once: as those of one process are."""
    cases = [
        Case(contrastive_oracle, COUNTS[2], loss=loss, dtype=torch.bfloat16, exchange=exchange)
        for loss in ("info_nce", "sigmoid")
        for exchange in ("ring", "gather")
    ]
    messages = []
    for case in cases:
        case.tensors = tuple(t.bfloat16().double() for t in case.tensors)
        case.numbers = list(case.tensors[2:])
        message = case.message()
        for own in message["ranks"]:
            own |= {name: own[name].float() for name in ("scale", "bias") if name in own}
        messages.append(message)
    for case, *results in zip(cases, *ranks(2, WORKER, "losses", messages), strict=True):
        truth = case.truth()
        for at, name in enumerate("qk", 1):
            got = torch.cat([result[name] for result in results])
            assert got.dtype == torch.bfloat16
            assert (got.double() - truth[at]).norm() < 0.006 * truth[at].norm()
        torch.testing.assert_close(results[0]["loss"].double(), truth[0], rtol=1e-5, atol=1e-6)


def test_wanted_gradients_upstream_and_value_alone(ranks: Any, contrastive_oracle: Any) -> None:
    case = Case(contrastive_oracle, COUNTS[2], symmetric=True)
    wanted: list[tuple[str, ...]] = [("q",), ("k",), ("scale",), ("q", "scale"), ("k", "scale"), ()]
    messages = [case.message() | {"wanted": names, "upstream": 3.0} for names in wanted]
    truth = dict(zip(("loss", "q", "k", "scale"), case.truth(), strict=True))
    for names, *results in zip(wanted, *ranks(2, WORKER, "losses", messages), strict=True):
        for result in results:
            torch.testing.assert_close(result["loss"], truth["loss"])
            assert [n for n in ("q", "k", "scale") if result[n] is not None] == list(names)
        for name in names:
            join = sum if name == "scale" else torch.cat
            torch.testing.assert_close(join([r[name] for r in results]), 3 * truth[name])


def test_backward_may_run_twice(ranks: Any) -> None:
    q, k = (list(torch.randn(8, D, dtype=torch.float64).split([5, 3])) for _ in range(2))
    for first, second in ranks(2, WORKER, "twice", q, k):
        torch.testing.assert_close(first, second)


def test_modules_sum_the_gradients_of_their_parameters(ranks: Any) -> None:
    from xmc.losses import InfoNCE, SigmoidLoss

    q, k = (torch.randn(8, D, dtype=torch.float64) for _ in range(2))
    parts = [list(x.split([5, 3])) for x in (q, k)]
    results = ranks(2, WORKER, "modules", *parts)
    for at, module in enumerate(
        (InfoNCE(14.0, learnable=True, symmetric=True), SigmoidLoss(5.0, -3.0))
    ):
        module.double()
        loss = module(q, k)
        loss.backward()
        for of_rank in results:
            torch.testing.assert_close(of_rank[at][0], loss.detach())
            for got, parameter in zip(of_rank[at][1], module.parameters(), strict=True):
                torch.testing.assert_close(got, parameter.grad)


def test_an_averaging_wrapper_wants_the_loss_times_the_number_of_ranks(ranks: Any) -> None:
    x, y = (torch.randn(8, D, dtype=torch.float64) for _ in range(2))
    results = ranks(2, WORKER, "averaged", *(list(t.split([5, 3])) for t in (x, y)))
    torch.manual_seed(3)
    encoder = torch.nn.Linear(D, 6).double()
    info_nce(encoder(x), encoder(y), scale=2.0, symmetric=True).backward()
    for gradients in results:
        for got, parameter in zip(gradients, encoder.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad)


@pytest.mark.parametrize("size", [2, 4])
def test_what_goes_round_the_ring(ranks: Any, size: int) -> None:
    """The docstrings' numbers of bytes: keys twice, gradients and statistics home as well."""
    rows, dim = 10, 16
    options: list[dict[str, Any]] = [
        {},
        {"symmetric": True},
        {"symmetric": True, "wire_dtype": torch.bfloat16},
    ]
    keys, others = rows * dim, size - 1
    gradients = 4 * size * keys
    statistics = rows * (size * 16 + others * 12)
    expected = [
        2 * others * 4 * keys + gradients,
        2 * others * 4 * keys + gradients + statistics,
        2 * others * 2 * keys + gradients + statistics,
    ]
    for sent in ranks(size, WORKER, "ring_bytes", rows, dim, options):
        assert sent == expected
    assert expected[2] - statistics == (8 * size - 4) * keys


def test_a_ring_holds_no_rows_of_more_than_one_rank(ranks: Any) -> None:
    rows, dim = 48, 256  # a tile of similarities is smaller than that
    for sizes in ranks(4, WORKER, "largest", rows, dim):
        assert sizes["ring"] == rows * dim
        assert sizes["gather"] == 4 * rows * dim


def test_errors_are_raised_on_every_rank(ranks: Any, contrastive_oracle: Any) -> None:
    def case(**of_rank_1: Any) -> dict[str, Any]:
        message = Case(contrastive_oracle, COUNTS[2]).message()
        message["ranks"][1] |= of_rank_1
        return message

    q = torch.randn(3, D, dtype=torch.float64)
    none = SparseLabels(torch.zeros(4, dtype=torch.int64), torch.zeros(0, dtype=torch.int32), 4)
    same = "ValueError: expected the same "
    other = "RuntimeError: expected fitting arguments on every rank of a loss, rank 1 raised an"
    wrong: list[tuple[dict[str, Any], str, str]] = [
        (case(q=torch.full((3, D), torch.nan).double()), other, "ValueError: expected finite q"),
        (case(k=q[:2]), other, "ValueError: expected at least 3 keys for as many queries, got 2"),
        (case(weights=-q[:, 0].abs()), other, "ValueError: expected finite weights of at least 0"),
        (case(query_ids=torch.arange(3)), other, "ValueError: expected key_ids beside query_ids"),
        (case(scale=torch.tensor(8.0).double()), f"{same}scale on every rank, got [7, 8]", ""),
        (case(k=q.float(), q=q.float()), f"{same}dtype (by its number) on every rank", ""),
        (case(k=q[:, :4], q=q[:, :4]), f"{same}number of features on every rank, got [6, 4]", ""),
        (
            case(positives=none),
            "ValueError: expected positives among the 11 keys of all ranks (of [7, 4]), got "
            "[-1, 4], -1 for none",
            "",
        ),
        (
            case() | {"options": {"exchange": "tree"}},
            "ValueError: expected exchange of auto, ring, gather, got 'tree'",
            "",
        ),
        (
            case() | {"options": {"wire_dtype": torch.int8}},
            "ValueError: expected wire_dtype of torch.bfloat16 or None, got torch.int8",
            "",
        ),
    ]
    results = ranks(2, WORKER, "losses", [message for message, _, _ in wrong])
    for (_, first, second), *texts in zip(wrong, *results, strict=True):
        for expected, text in zip((first, second or first), texts, strict=True):
            assert isinstance(text, str)
            assert text.startswith(expected), text
