"""One side of a dual encoder: from texts to vectors of length one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from xmc.types import Bag, Tokens


class Tower(nn.Module):
    """`normalize(intermediate(encoder(inputs)))`; what the encoder maps to 0 stays 0."""

    def __init__(self, encoder: nn.Module, intermediate: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.intermediate = intermediate

    def forward(self, inputs: Bag | Tokens) -> Tensor:  # [B, D]
        return F.normalize(self.intermediate(self.encoder(inputs)), dim=1)
