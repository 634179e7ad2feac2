"""What each rank does in test_sharded_head.py; alone it is what one process does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import scipy.sparse
import torch
from torch import Tensor

from xmc.config import AuxiliaryConfig, HeadConfig, OptimizerConfig, RewireConfig, from_dict
from xmc.distributed.collectives import World
from xmc.heads.arranged import ArrangedHead
from xmc.heads.auxiliary import AuxiliaryHead
from xmc.heads.bag import BagClassifierHead
from xmc.heads.classifier import ClassifierHead
from xmc.model import build_model
from xmc.nn.bag_reps import join_bag
from xmc.nn.clusters import Clusters
from xmc.types import Bag, BagReps, SparseLabels, TopK

D, ROWS = 24, 13


# A head, the steps it takes and what is asked of it.
DEFAULTS: dict[str, Any] = {
    "num_labels": 50,
    "head": {},
    "optimizer": {},
    "arranged": False,
    "weighted": False,  # positives of unlike weight, and label shares
    "rewire": {},
    "double": True,
    "shares": None,  # rows of each rank; None: about equal
    "steps": 3,
}


def train(options: dict[str, Any]) -> dict[str, Any]:
    """Steps of two passes each, rewirings between them, then scores."""
    case = SimpleNamespace(**DEFAULTS | options)
    world = World.current()
    torch.manual_seed(1)
    head = make_head(case, world)
    result: dict[str, Any] = {"next": torch.rand(3), "fresh": named(head.state_dict())}
    if case.double:
        head.double()
    data = torch.Generator().manual_seed(5)
    dtype = torch.float64 if case.double else torch.float32
    own = own_rows(case, world)
    ages = head.slot_ages() if case.rewire else None
    losses, gradients, reports = [], [], []
    for step in range(case.steps):
        passes = [draw_batch(case, data, dtype) for _ in range(2)]
        for number, (reps, labels) in enumerate(passes):
            mine, positives = reps[own], labels.rows(own)
            out = head.loss_and_grad(
                mine, positives, num_rows=2 * ROWS, update=number == 1, weight=0.7
            )
            losses.append(out.loss)
            gradients.append(out.d_reps)
        if case.rewire:
            reps, labels = passes[0]
            report = head.rewire_(
                RewireConfig(**case.rewire),
                seed=4,
                step=step,
                progress=0.2,
                reps=reps[own] if case.rewire["method"] == "rigl" else None,
                labels=labels.rows(own) if case.rewire["method"] == "rigl" else None,
                ages=ages,
            )
            reports.append(report.to_dict() | {"dead": report.dead_labels.tolist()})
    reps, labels = draw_batch(case, data, dtype)
    chosen = torch.randint(-1, case.num_labels, (ROWS, 7), generator=data)
    return result | {
        "losses": torch.stack(losses),
        "d_reps": gradients,
        "reports": reports,
        "state": named(head.state_dict() | head.training_state()),
        "ages": {} if ages is None else named(ages.tensors()),
        "shards": head.row_shards() | ({} if ages is None else ages.row_shards()),
        "best": [pair(head.topk(reps, k, exclude=labels)) for k in (1, 5, 60)],
        "chosen": head.candidate_scores(reps, chosen),
    }


def train_bags(shares: tuple[int, ...] | None) -> dict[str, Any]:
    """Steps of a head that reads bags, whose features differ over ranks."""
    world, num_features, num_labels = World.current(), 40, 30
    case = SimpleNamespace(**DEFAULTS | {"num_labels": num_labels, "shares": shares})
    torch.manual_seed(1)
    head = BagClassifierHead.from_options(
        D,
        num_features,
        num_labels,
        HeadConfig(fan_in=3, bag_fan_in=5),
        OptimizerConfig(kind="adamw", lr=0.1),
        world=world,
    )
    result: dict[str, Any] = {"next": torch.rand(3), "fresh": named(head.state_dict())}
    data = torch.Generator().manual_seed(5)
    words = torch.rand(num_labels, num_features, generator=data)
    head.choose_features_(scipy.sparse.csr_matrix(words.where(words > 0.95, 0).numpy()), 1.5)
    head.double()
    own = own_rows(case, world)
    losses, gradients = [], []
    for _ in range(3):
        reps, labels = draw_batch(case, data, torch.float64)
        bag = draw_bag(num_features, data)
        mine = bag.slice(int(own[0]), int(own[-1]) + 1) if len(own) else bag.slice(0, 0)
        joined = join_bag(reps[own], mine, 2.0, least=8)
        out = head.loss_and_grad(joined, labels.rows(own), num_rows=ROWS)
        losses.append(out.loss)
        assert out.d_reps.shape == joined.values.shape
        gradients.append(out.d_reps[:, :D])
    reps, labels = draw_batch(case, data, torch.float64)
    joined = join_bag(reps, draw_bag(num_features, data), 2.0, least=8)
    chosen = torch.randint(-1, num_labels, (ROWS, 7), generator=data)
    return result | {
        "losses": torch.stack(losses),
        "d_reps": gradients,
        "reports": [],
        "state": named(head.state_dict() | head.training_state()),
        "ages": {},
        "shards": head.row_shards(),
        "best": [pair(head.topk(joined, 5, exclude=labels))],
        "chosen": head.candidate_scores(joined, chosen),
    }


def train_auxiliary() -> dict[str, Any]:
    """Steps of a head over clusters of labels."""
    world, case = World.current(), SimpleNamespace(**DEFAULTS)
    data = torch.Generator().manual_seed(5)
    assignment = torch.randint(9, (case.num_labels,), generator=data).int()
    clusters = Clusters(assignment, 9, assignment.argsort(stable=True))
    shares = torch.rand(9, generator=data)
    head = AuxiliaryHead.from_config(
        D, clusters, AuxiliaryConfig(kind="clusters", lr=0.1), seed=3, shares=shares, world=world
    )
    fresh = named(head.training_state())
    head.classifier.double()
    head.classifier._moments = None  # of the wider weights
    losses, gradients = [], []
    own = own_rows(case, world)
    for _ in range(3):
        reps, labels = draw_batch(case, data, torch.float64)
        out = head.loss_and_grad(reps[own], labels.rows(own), num_rows=ROWS, weight=0.4)
        losses.append(out.loss)
        gradients.append(out.d_reps)
    return {
        "next": torch.rand(3),
        "fresh": fresh,
        "losses": torch.stack(losses),
        "d_reps": gradients,
        "reports": [],
        "state": named(head.training_state()),
        "ages": {},
        "shards": head.row_shards(),
        "best": [],
        "chosen": torch.zeros(1),
    }


def model(options: dict[str, Any], sizes: list[int]) -> dict[str, Any]:
    """A fresh model and its answers for batches of some sizes, every rank with all rows."""
    torch.manual_seed(1)
    features: Any = SimpleNamespace(num_features=40)
    config = from_dict(options, source="test")
    labels = [str(label) for label in range(30)]
    built = build_model(config, features, labels, world=World.current())
    data = torch.Generator().manual_seed(5)
    reps, best = [], []
    for size in sizes:
        bag = draw_bag(40, data).slice(0, size)
        read = built.reps(bag)
        reps.append(read.values if isinstance(read, BagReps) else read)
        best.append(pair(built.topk(bag, 5)))
    return {
        "next": torch.rand(3),
        "weights": named(built.weights()),
        "shards": built.row_shards(),
        "reps": reps,
        "best": best,
    }


def tied(num_labels: int, k: int, exclude: SparseLabels) -> tuple[Tensor, Tensor]:
    """The best of labels of which many have the same score."""
    head = ClassifierHead.from_config(
        4, num_labels, HeadConfig(kind="dense"), world=World.current()
    )
    labels = torch.arange(head.shard.start, head.shard.stop)
    with torch.no_grad():
        head.layer.weight.zero_()
        head.layer.bias.copy_(labels % 3)
    return pair(head.topk(torch.zeros(len(exclude), 4), k, exclude=exclude))


def problem(num_labels: int, options: dict[str, Any]) -> str:
    """What is said of a head that cannot be."""
    try:
        ClassifierHead.from_config(D, num_labels, HeadConfig(**options), world=World.current())
    except ValueError as error:
        return str(error)
    return ""


def wrong_label() -> str:
    """What is said of one rank's label out of range: on every rank, so that none waits."""
    world = World.current()
    head = ClassifierHead.from_config(D, 9, HeadConfig(fan_in=3), world=world)
    label = 9 if world.rank == 0 else 0
    labels = SparseLabels(torch.tensor([0, 1]), torch.tensor([label], dtype=torch.int32), 9)
    try:
        head.loss_and_grad(torch.randn(1, D), labels)
    except ValueError as error:
        return str(error)
    return ""


def make_head(case: SimpleNamespace, world: World) -> ClassifierHead | ArrangedHead:
    config, optimizer = HeadConfig(**case.head), OptimizerConfig(lr=0.1, **case.optimizer)
    options: dict[str, Any] = {"world": world}
    drawn = torch.Generator().manual_seed(3)
    if case.weighted:
        options["label_shares"] = torch.rand(case.num_labels, generator=drawn)
        options["positive_weight"] = 2 * torch.rand(case.num_labels, generator=drawn)
    if case.arranged:
        options["order"] = torch.randperm(case.num_labels, generator=drawn)
        return ArrangedHead.from_config(D, case.num_labels, config, optimizer, **options)
    return ClassifierHead.from_config(D, case.num_labels, config, optimizer, **options)


def own_rows(case: SimpleNamespace, world: World) -> Tensor:
    rows = torch.arange(ROWS)
    if case.shares is None or world.size == 1:
        return rows.tensor_split(world.size)[world.rank]
    return rows.split(list(case.shares))[world.rank]


def draw_batch(
    case: SimpleNamespace, data: torch.Generator, dtype: torch.dtype
) -> tuple[Tensor, SparseLabels]:
    reps = torch.randn(ROWS, D, generator=data, dtype=torch.float64).to(dtype)
    present = torch.rand(ROWS, case.num_labels, generator=data) < 0.08
    lists = [row.nonzero().flatten().tolist() for row in present]
    lists[4] = []
    return reps, SparseLabels.from_lists(lists, case.num_labels)


def draw_bag(num_features: int, data: torch.Generator) -> Bag:
    """Some rows empty, and a feature of weight 0."""
    present = torch.rand(ROWS, num_features, generator=data) < 0.1
    present[3] = False
    weights = torch.rand(int(present.sum()), generator=data)
    weights[2] = 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), present.sum(1).cumsum(0)])
    return Bag(present.nonzero()[:, 1], offsets, weights)


def named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in dtypes that can be put together and compared."""
    copies = {}
    for name, tensor in tensors.items():
        wide = tensor.float() if tensor.dtype == torch.float8_e4m3fn else tensor
        copies[name] = wide.detach().clone() if wide.is_floating_point() else wide.long()
    return copies


def pair(best: TopK) -> tuple[Tensor, Tensor]:
    return best.scores, best.labels
