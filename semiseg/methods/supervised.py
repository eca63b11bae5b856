"""The baseline: labelled images only, (cross-entropy + Dice) / 2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from semiseg.config import PositiveInt
from semiseg.methods.method import Batch, Method, Stage
from semiseg.models.losses import region_weighted_loss
from semiseg_kernels import dice_ce


@dataclass(frozen=True)
class SupervisedConfig:
    """How long the baseline trains."""

    name: str
    iterations: PositiveInt
    learning_rate_step: PositiveInt | None = None


class SupervisedStage(Stage):
    """The only stage."""

    name = "supervised"

    def __init__(self, method: Supervised):
        self.method = method
        self.iterations = method.config.iterations
        self.learning_rate_step = method.config.learning_rate_step

    def losses(self, batch: Batch, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        logits, _ = self.method.network(batch.labelled_image)
        return {"total": region_weighted_loss(dice_ce(logits, batch.labelled_label), self.method.one_region)}


class Supervised(Method):
    """A segmentation network trained on the labelled images alone."""

    Options = SupervisedConfig

    def stages(self, generator: torch.Generator) -> list[Stage]:
        return [SupervisedStage(self)]
