"""What every method is to the training loop and to the evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from semiseg.data import Case
from semiseg.models import build_network
from semiseg.models.initialisation import initialise
from semiseg.text import TextEmbeddings

if TYPE_CHECKING:
    from semiseg.config import Config


@dataclass(frozen=True)
class Batch:
    """One step's images: labelled ones with their labels, unlabelled ones without."""

    labelled_image: Tensor  # [Bl, M, *P] float32
    labelled_label: Tensor  # [Bl, *P] uint8
    unlabelled_image: Tensor  # [Bu, M, *P] float32, Bu = 0 in a stage without unlabelled images


class Stage:
    """A part of a method's training with its own losses, optimiser and length."""

    name: str
    iterations: int
    uses_unlabelled: bool = False
    learning_rate_step: int | None = None  # iterations between tenfold cuts of the learning rate

    def prepare(self, labelled: Sequence[Case], patch_size: tuple[int, ...]) -> None:
        """Called once before the first iteration."""

    def inputs(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        """What the losses of an iteration (counted from 0) need beside its images, as new tensors on their device.

        Random choices that are made on the CPU, and weights that move with the iteration: everything that differs from
        one step to the next. The losses then are the same operations each time, which a GPU can replay.
        """
        return {}

    def losses(self, batch: Batch, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scalars of a step from its batch and `inputs`; the one called `total` is minimised, the others are logged."""
        raise NotImplementedError

    def parts(self, batch: Batch, inputs: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """The losses as summands that share nothing but the network, each with its `total`.

        Each is minimised before the next is computed, so that only one of them keeps its activations in memory.
        """
        yield self.losses(batch, inputs)

    def update(self) -> None:
        """Called after every optimiser step."""

    def learning_rate(self, base: float, iteration: int) -> float:
        """Learning rate of an iteration (counted from 0): the base, cut tenfold every `learning_rate_step`."""
        if self.learning_rate_step is None:
            return base
        return base * 0.1 ** (iteration // self.learning_rate_step)


def add_losses(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The sums of losses of the same name; one that a part lacks counts as 0 there."""
    sums: dict[str, Tensor] = {}
    for part in parts:
        for name, loss in part.items():
            sums[name] = sums[name] + loss if name in sums else loss
    return sums


class Method(nn.Module):
    """A network, whatever the method keeps beside it, and the stages that train it.

    The state_dict is the checkpoint. `network(x [B, M, *P])` returns (logits [B, C, *P], embedding [B, d, *P]).
    """

    Options: ClassVar[type]  # the dataclass of the configuration's section `method`
    heads: ClassVar[tuple[str, ...]] = ("linear",)  # classifiers `probabilities` knows
    batch_multiple: ClassVar[int] = 1  # of several processes each must have a multiple of so many images
    one_region: Tensor  # [1], the weights of an image that is no mix

    def __init__(self, config: Any, network: nn.Module, num_classes: int):
        super().__init__()
        self.config = config
        self.network = network
        self.num_classes = num_classes
        self.register_buffer("one_region", torch.ones(1), persistent=False)

    @classmethod
    def check(cls, config: Config) -> None:
        """Raise ValueError where the method cannot work with the rest of the configuration."""
        if config.evaluation.head not in cls.heads:
            raise ValueError(
                f"evaluation.head is {config.evaluation.head!r}, accepted here are {', '.join(cls.heads)}"
            )

    @classmethod
    def text(cls, config: Config, class_names: Sequence[str]) -> TextEmbeddings | None:
        """Text embeddings of the classes, where a method learns from them. ValueError if they cannot be had."""
        return None

    @classmethod
    def build(
        cls,
        config: Config,
        num_classes: int,
        text: TextEmbeddings | None,  # of a method that learns from text
        channels: int,  # M, of an image
    ) -> Method:
        """The method of a configuration around a fresh network (from torch's global generator)."""
        sizes = {**config.network.options, "in_channels": channels, "num_classes": num_classes}
        network = build_network(config.network.name, **sizes)
        initialise(network, config.network.initialisation)
        return cls(config.method, network, num_classes)

    def stages(self, generator: torch.Generator) -> list[Stage]:
        """The stages in order; `generator` is where their random choices come from."""
        raise NotImplementedError

    @property
    def prototypes(self) -> Tensor | None:
        """What embeddings are compared with [C, K, d], where a method has such."""
        return None

    @torch.no_grad()
    def probabilities(
        self,
        image: Tensor,  # [B, M, *P]
        head: str = "linear",
    ) -> Tensor:  # [B, C, *P] float32
        """Class probabilities of the trained network by one of `heads`."""
        logits, embedding = self.network(image)
        return self.head_probabilities(logits, embedding, head)

    def training_forward(
        self,
        image: Tensor,  # [B, M, *P]
    ) -> Sequence[Tensor]:
        """Everything a training step computes of its images before the losses, for counting what it costs."""
        return self.network(image)

    def head_probabilities(
        self,
        logits: Tensor,  # [B, C, *P]
        embedding: Tensor,  # [B, d, *P]
        head: str,
    ) -> Tensor:  # [B, C, *P] float32
        """Class probabilities of one of `heads` from what the network returned."""
        return logits.float().softmax(1)
