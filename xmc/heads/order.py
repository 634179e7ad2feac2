"""Which label stands in which row of the classifier.

Labels that share their inputs (head.group_size) should be similar, and the most frequent ones may
have dense rows (head.dense_share); users see label ids only, see `xmc.heads.arranged`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from xmc.config import HeadConfig
from xmc.nn.clusters import Clusters
from xmc.nn.streams import stream, substreams
from xmc.types import SparseLabels
from xmc_kernels.checks import check_label_range


def is_arranged(num_labels: int, config: HeadConfig) -> bool:
    """Whether rows are anything but the labels as they come, in one layer."""
    ragged = config.kind == "sparse" and num_labels % config.group_size > 0
    return config.order != "none" or config.dense_share > 0 or ragged


def num_dense(num_labels: int, config: HeadConfig) -> int:
    """Labels with dense rows: head.dense_share in whole groups, at least one; 0 without a share.

    Raises ValueError where no label is left to the sparse rows.
    """
    if not config.dense_share:
        return 0
    group = config.group_size
    dense = group * max(1, round(config.dense_share * num_labels / group))
    if dense >= num_labels:
        raise ValueError(
            f"head.dense_share: expected to leave some of the {num_labels} labels to sparse rows, "
            f"got {config.dense_share}, which is {dense} labels in groups of {group}"
        )
    return dense


def label_order(
    frequencies: Tensor,  # [L], training rows that carry each label
    config: HeadConfig,
    *,
    clusters: Clusters | None = None,
    seed: int = 0,
) -> Tensor:  # [L] int32
    """The label of each row: the most frequent first as far as rows are dense, then by `order`.

    Labels of equal frequency stand by their ids. Raises ValueError where order is "cluster" and
    `clusters` are missing or of other labels.
    """
    num_labels = frequencies.shape[0]
    labels = torch.arange(num_labels)
    by_frequency = frequencies.argsort(descending=True, stable=True)
    if config.order == "frequency":
        labels = by_frequency
    elif config.order == "random":
        # A hash per label: the same whatever else draws, and whatever the version of torch.
        labels = substreams(stream(seed, 0, labels.device), labels).argsort()
    elif config.order == "cluster":
        if clusters is None or clusters.num_labels != num_labels:
            got = "none" if clusters is None else f"those of {clusters.num_labels}"
            raise ValueError(f"expected clusters of {num_labels} labels for the order, got {got}")
        labels = clusters.order
    first = by_frequency[: num_dense(num_labels, config)]
    in_tail = torch.ones(num_labels, dtype=torch.bool)
    in_tail[first] = False
    return torch.cat([first, labels[in_tail[labels]]]).int()


def renumbered(
    labels: SparseLabels,  # B rows of label ids
    row_of: Tensor,  # [L], the new number of each label
    sizes: Sequence[int],  # numbers in each part
) -> list[SparseLabels]:
    """The same B rows by new numbers, cut into parts of consecutive ones, each counted from 0.

    Raises ValueError on labels out of range.
    """
    check_label_range(labels.indices, len(row_of))
    examples = torch.arange(len(labels), device=labels.device)
    owners = torch.repeat_interleave(examples, labels.counts())
    # As sorted keys, so that numbers are sorted within an example.
    keys = (owners << 32 | row_of[labels.indices.long()].long()).sort().values
    owners, numbers = keys >> 32, keys & 0xFFFFFFFF
    parts, start = [], 0
    for size in sizes:
        inside = (numbers >= start) & (numbers < start + size)
        counts = torch.bincount(owners[inside], minlength=len(labels))
        indptr = F.pad(counts.cumsum(0), (1, 0))
        parts.append(SparseLabels(indptr, (numbers[inside] - start).int(), size))
        start += size
    return parts


def order_problem(order: Tensor, num_labels: int) -> str:
    """The rule that an order breaks, or nothing."""
    if order.dtype != torch.int32 or list(order.shape) != [num_labels]:
        return (
            f"expected an order of int32 and shape [{num_labels}], "
            f"got {order.dtype} {list(order.shape)}"
        )
    if order.is_meta:
        return ""
    named = order.sort().values
    if torch.equal(named, torch.arange(num_labels, dtype=torch.int32, device=order.device)):
        return ""
    return f"expected an order that names each of {num_labels} labels once"
