"""Where a rank stands in a grid of stages and replicas."""

from __future__ import annotations

from dataclasses import dataclass

from xmc.distributed.collectives import World


@dataclass(frozen=True)
class Place:
    """A rank's stage and replica; neighbouring stages are neighbouring ranks."""

    rank: int
    num_stages: int
    num_replicas: int

    @classmethod
    def of(cls, world: World, num_stages: int) -> Place:
        """Raises ValueError where the ranks are no multiple of the stages."""
        if num_stages < 1 or world.size % num_stages:
            raise ValueError(
                f"expected a number of ranks that is a multiple of {num_stages} stages, "
                f"got {world.size}"
            )
        return cls(world.rank, num_stages, world.size // num_stages)

    @property
    def stage(self) -> int:
        return self.rank % self.num_stages

    @property
    def replica(self) -> int:
        return self.rank // self.num_stages

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.num_stages - 1

    def __str__(self) -> str:
        replica = f", replica {self.replica}" if self.num_replicas > 1 else ""
        return f"rank {self.rank} (stage {self.stage} of {self.num_stages}{replica})"

    def moved(self, stages: int) -> Place:
        """The place so many stages later in the same replica."""
        return Place(self.rank + stages, self.num_stages, self.num_replicas)
