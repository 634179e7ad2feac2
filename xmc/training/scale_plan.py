"""A plan for several ranks: memory of each, what they tell each other, how long a step takes.

The encoder is replicated (DDP) or divided (FSDP), the classifier divided by labels. All is that of
rank 0, whose shares are the largest; one rank gives the plan of `planner.py`, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from xmc.config import Config, ConfigError
from xmc.training.memory_encoder import Encoder, make_encoder, passes_of
from xmc.training.memory_model import (
    Component,
    Device,
    Sizes,
    make_sizes,
    on_device,
    total,
    training_phases,
)
from xmc.training.plan_changes import Change, find_changes, training_peak, with_settings
from xmc.training.planner import Plan
from xmc.training.scale_network import ETHERNET, INFINIBAND, Network
from xmc.training.scale_time import RankTime, Rates, measure_rates
from xmc.training.scale_traffic import Message, messages, step_messages

Scaling = Literal["strong", "weak"]

MOST_RANKS = 1000  # up to which the smallest number that fits is looked for


@dataclass(frozen=True)
class RankPlan:
    """What was predicted for one number of ranks."""

    ranks: int
    rows: int
    """Of a step, on all ranks."""
    device: Device
    phases: dict[str, list[Component]]
    """Components of training by phase, on a rank."""
    messages: list[Message]
    communication: float
    """Seconds of a step."""
    time: RankTime | None
    """None where nothing was measured."""

    @property
    def peak_phase(self) -> str:
        """The phase that needs most of the memory that decides."""
        return max(self.phases, key=lambda name: total(self.device_part(name)))

    @property
    def peak(self) -> int:
        """Bytes of that phase: of the process on a CPU, of the card on a GPU."""
        return total(self.device_part(self.peak_phase))

    @property
    def host(self) -> int:
        """Bytes in the machine's memory at most: of the process on a CPU too."""
        if self.device == "cpu":
            return self.peak
        return max(sum(p.bytes for p in parts if p.host) for parts in self.phases.values())

    @property
    def sent(self) -> int:
        """Bytes that a rank sends in a step, and receives."""
        return sum(message.bytes for message in step_messages(self.messages))

    def device_part(self, phase: str) -> list[Component]:
        return on_device(self.phases[phase], self.device)


@dataclass(frozen=True)
class ScalePlan:
    """What was predicted for several numbers of ranks."""

    plan: Plan
    """Of one rank."""
    scaling: Scaling
    """strong: the batch of a step stays; weak: that of a rank does."""
    network: Network
    ranks: tuple[RankPlan, ...]
    """Rising in numbers of ranks."""
    alone: RankPlan
    """One rank, asked for or not."""
    smallest: int | None
    """The smallest number of ranks that fits the memory, of those up to `searched`."""
    searched: int
    """0 where no memory was given or known."""
    changes: tuple[Change, ...]
    """What to change on the most ranks asked for, where none of the numbers fits; not for weak
    scaling, whose recipe is another for every number."""

    @property
    def fits(self) -> bool | None:
        """Whether any of the numbers asked for does."""
        answers = [self.fitting(ranks) for ranks in self.ranks]
        return None if None in answers else any(answers)

    def fitting(self, ranks: RankPlan) -> bool | None:
        """Whether this number of ranks fits; None where no memory is given or known."""
        return None if self.plan.memory is None else ranks.peak <= self.plan.memory

    def efficiency(self, ranks: RankPlan) -> float | None:
        """Rows a second and rank, as a share of those of one rank."""
        if ranks.time is None or self.alone.time is None:
            return None
        alone = self.alone.rows / self.alone.time.step
        return ranks.rows / ranks.time.step / ranks.ranks / alone


def plan_scale(
    plan: Plan,
    ranks: Sequence[int],
    *,
    scaling: Scaling = "strong",
    network: Network | None = None,
    rates: Rates | None = None,
) -> ScalePlan:
    """Plan a recipe, whose plan for one rank this is, for numbers of ranks.

    Args:
        network: None assumes `ETHERNET` for CPUs and `INFINIBAND` for GPUs.
        rates: None measures them for two seconds more, where the plan has a measured time.

    Raises ConfigError for fewer labels, or groups of them, than ranks, and for recipes that do not
    train on several ranks.
    """
    if max(ranks) > 1 and plan.config.train.memory_limit:
        raise ConfigError(
            "train.memory_limit: passes are fitted to the memory of one process, expected none "
            f'with --ranks, got "{plan.config.train.memory_limit}"'
        )
    network = network or (INFINIBAND if plan.device == "cuda" else ETHERNET)
    counts = tuple(sorted(set(ranks)))
    scaler = _Scaler(plan, scaling, network, make_encoder(plan.config, plan.workload))
    scaler.sizes(counts[-1])  # too many ranks are told before anything is measured
    if rates is None and plan.time is not None:
        rates = measure_rates(scaler.sizes(1), plan.time)
    made = {count: scaler.rank_plan(count, rates) for count in {1, *counts}}
    smallest, searched = scaler.smallest(max(MOST_RANKS, counts[-1]))
    return ScalePlan(
        plan=plan,
        scaling=scaling,
        network=network,
        ranks=tuple(made[count] for count in counts),
        alone=made[1],
        smallest=smallest,
        searched=searched,
        changes=scaler.changes(made[count] for count in counts),
    )


@dataclass(frozen=True)
class _Scaler:
    plan: Plan
    scaling: Scaling
    network: Network
    encoder: Encoder

    def sizes(self, count: int) -> Sizes:
        """Raises ConfigError where there are too many ranks."""
        plan = self.plan
        config = plan.config if self.scaling == "strong" else grown(plan.config, count)
        try:
            return make_sizes(
                config, plan.workload, plan.device, world_size=count, encoder=self.encoder
            )
        except ValueError as error:
            raise ConfigError(f"--ranks: {error}") from None

    def rank_plan(self, count: int, rates: Rates | None) -> RankPlan:
        sizes = self.sizes(count)
        found = messages(sizes)
        communication = self.network.seconds(step_messages(found))
        options = sizes.config.train
        return RankPlan(
            ranks=count,
            rows=options.batch_size * options.accumulation,
            device=self.plan.device,
            phases=training_phases(sizes),
            messages=found,
            communication=communication,
            time=None if rates is None else rates.scaled(sizes, communication),
        )

    def smallest(self, most: int) -> tuple[int | None, int]:
        """The smallest number of ranks that fits, and up to which number was looked."""
        if self.plan.memory is None:
            return None, 0
        searched = 0
        for count, peak in self._peaks(most):
            if peak <= self.plan.memory:
                return count, count
            searched = count
        return None, searched

    def changes(self, made: Iterable[RankPlan]) -> tuple[Change, ...]:
        """See `ScalePlan.changes`."""
        memory, plans = self.plan.memory, list(made)
        fits = memory is None or any(plan.peak <= memory for plan in plans)
        if fits or self.scaling == "weak":
            return ()
        return tuple(find_changes(self.sizes(plans[-1].ranks), memory or 0))

    def _peaks(self, most: int) -> Iterator[tuple[int, int]]:
        for count in range(1, most + 1):
            try:
                yield count, training_peak(self.sizes(count))
            except ConfigError:
                return


def grown(config: Config, ranks: int) -> Config:
    """The recipe with as many rows a rank and pass as it says of all ranks together."""
    train = config.train
    wider = {
        f"train.{name}": ranks * getattr(train, name)
        for name in ("batch_size", "micro_batch", "max_tokens")
    }
    return with_settings(config, wider)


def idle_ranks(plan: RankPlan, config: Config) -> int:
    """Ranks that have no row of a pass to encode."""
    rows, _ = passes_of(config)
    return max(plan.ranks - rows, 0)
