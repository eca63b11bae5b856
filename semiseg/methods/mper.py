"""Multi-Prototype-based Embedding Refinement (MPER, ICASSP 2025): mean teacher, copy-paste, several prototypes a class.

Stage 1 pre-trains on labelled images pasted into each other. Then the embeddings of the labelled images are clustered
into K prototypes a class, and stage 2 self-trains: the teacher labels the unlabelled images, both kinds are pasted into
each other, and the student learns from a linear and a prototype classifier (eq. 6):

    L = L_cons^l + λ(t) (L_cons^p + γ L_cont)
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from semiseg.config import (
    Config,
    Fraction,
    FractionBelowOne,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from semiseg.data import Case, copy_paste, region_map, zero_box_mask
from semiseg.methods.method import Batch, Method, Stage, add_losses
from semiseg.methods.prototype_initialisation import cluster_embeddings
from semiseg.models import PrototypeClassifier, embedding_width
from semiseg.models.losses import region_weighted_loss, regions_by_image, sigmoid_ramp_up
from semiseg_kernels import PrototypeHead, cluster_mean, dice_ce, largest_components

LABELLED, PSEUDO_LABELLED = 0, 1  # the regions of a mix, as region_map gives them
MOST_REGIONS = 256  # uint8, of all images of a mix (two each) or of a pre-training batch (one each)


@dataclass(frozen=True)
class MPERConfig:
    """The open points of the method, as the presets `paper` and `released` set them."""

    name: str
    pretraining_iterations: NonNegativeInt
    iterations: PositiveInt  # of self-training
    zero_box: tuple[PositiveInt, ...]  # voxels, the part of a mix that comes from the other image
    contrast_weight: NonNegativeFloat  # γ
    ramp_up_iterations: NonNegativeInt  # T of λ(t)
    ramp_up_step: PositiveInt = 1  # λ moves every so many iterations
    ramp_up_weight: NonNegativeFloat = 1.0  # λ at the end of the ramp
    learning_rate_step: PositiveInt | None = None  # iterations of self-training between tenfold cuts
    teacher_decay: Fraction = 0.99  # EMA
    teacher_buffers: bool = True  # BatchNorm statistics follow the student too
    teacher_mode: Literal["train", "eval"] = "train"  # train: with batch statistics and dropout
    num_prototypes: PositiveInt = 3  # K
    class_temperature: PositiveFloat = 0.1  # τ₁
    temperature: PositiveFloat = 0.1  # τ₂
    prototype_momentum: Fraction = 0.999  # η
    # one: from the union of both mixes; four: each mix, labelled then unlabelled
    prototype_steps: Literal["one", "four"] = "one"
    confidence: FractionBelowOne = 0.9  # α
    update_unit_length: bool = False  # cluster means of z / |z|, prototypes kept at unit length
    update_classes: Literal["all", "foreground"] = "all"  # whose prototypes move
    update_requires_agreement: bool = False  # only voxels whose prototype prediction is their label
    contrast_normalize: bool = True  # eq. 5 on unit length z and p
    contrast_positive: Literal["nearest", "label"] = "nearest"  # of all prototypes; label: nearest of its class
    contrast_ignore_first: bool = False  # leave out voxels whose positive is prototype 0 of class 0
    contrast_reduction: Literal["mean", "sum"] = "mean"  # of both mixes' means
    dice_squared: bool = True  # Dice's denominator has squares, V-Net's
    dice_per_image: bool = False  # a Dice loss for each image of a batch, or one for all
    pseudo_label_weight: NonNegativeFloat = 0.5  # of pseudo-labelled voxels in L_cons, labelled ones have 1
    join_mixes: bool = False  # both mixes in one forward pass (joint BatchNorm statistics)
    kmeans_batch: PositiveInt = 8_192  # voxels per step of the clustering


@dataclass(frozen=True)
class Mix:
    """Two images pasted together, with everything the losses need to know about each voxel."""

    image: Tensor  # [B, M, *P]
    label: Tensor  # [B, *P] uint8, truth where labelled, pseudo-label elsewhere
    region: Tensor  # [B, *P] uint8, LABELLED or PSEUDO_LABELLED
    reliable: Tensor  # [B, *P] bool, voxels that may move a prototype


def _halves(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Parts a and b of a batch."""
    return list(zip(*(tensor.chunk(2) for tensor in tensors), strict=True))


def _mix(mask: Tensor, outside: tuple[Tensor, ...], inside: tuple[Tensor, ...], labelled: str) -> Mix:
    """Paste (image, label, reliable) of one batch into another's."""
    image, label, reliable = (copy_paste(mask, *pair) for pair in zip(outside, inside, strict=True))
    return Mix(image, label, region_map(mask, len(label), labelled), reliable)


class MPER(Method):
    """The student network, its teacher and the prototypes."""

    Options = MPERConfig
    heads = ("linear", "prototype", "mean")
    batch_multiple = 2  # a pair to mix
    region_weights: Tensor  # [2], of labelled and pseudo-labelled voxels

    def __init__(self, config: MPERConfig, network: nn.Module, num_classes: int):
        super().__init__(config, network, num_classes)
        self.teacher = copy.deepcopy(network).requires_grad_(False)
        self.register_buffer(
            "region_weights", torch.tensor([1.0, config.pseudo_label_weight]), persistent=False
        )
        self.classifier = PrototypeClassifier(
            num_classes,
            config.num_prototypes,
            embedding_width(network),
            class_temperature=config.class_temperature,
            temperature=config.temperature,
            squared=config.dice_squared,
            positive=config.contrast_positive,
            normalize=config.contrast_normalize,
            ignore_prototype=0 if config.contrast_ignore_first else None,
            unit_length=config.update_unit_length,
            require_agreement=config.update_requires_agreement,
        )

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        training, box = config.training, config.method.zero_box
        if training.labelled_batch % 2 or training.labelled_batch != training.unlabelled_batch:
            raise ValueError(
                f"training.labelled_batch is {training.labelled_batch} and training.unlabelled_batch "
                f"{training.unlabelled_batch}, accepted for mper are two equal even numbers"
            )
        if config.method.dice_per_image and training.labelled_batch > MOST_REGIONS:
            raise ValueError(
                f"training.labelled_batch is {training.labelled_batch}, accepted with method.dice_per_image are up to "
                f"{MOST_REGIONS}"
            )
        sides = zip(box, training.patch_size, strict=False)
        if len(box) != len(training.patch_size) or any(inner > outer for inner, outer in sides):
            raise ValueError(
                f"method.zero_box is {list(box)}, accepted is a box within the patch {list(training.patch_size)}"
            )

    @property
    def prototypes(self) -> Tensor:
        return self.classifier.prototypes

    def stages(self, generator: torch.Generator) -> list[Stage]:
        return [PreTraining(self, generator), SelfTraining(self, generator)]

    def head_probabilities(self, logits: Tensor, embedding: Tensor, head: str) -> Tensor:
        if head == "prototype":
            return self.classifier.predict(embedding)
        linear = super().head_probabilities(logits, embedding, head)
        return linear if head == "linear" else (linear + self.classifier.predict(embedding)) / 2


class CopyPasteStage(Stage):
    """A stage whose images are pasted into each other with a random zero-box mask."""

    def __init__(self, method: MPER, generator: torch.Generator):
        self.method, self.generator = method, generator

    def inputs(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        image = batch.labelled_image
        mask = zero_box_mask(
            tuple(image.shape[2:]), self.method.config.zero_box, self.generator, image.device
        )
        return {"mask": mask}


class PreTraining(CopyPasteStage):
    """Stage 1: two halves of the labelled batch pasted into each other, (cross-entropy + Dice) / 2."""

    name = "pre-training"

    def __init__(self, method: MPER, generator: torch.Generator):
        super().__init__(method, generator)
        self.iterations = method.config.pretraining_iterations

    def losses(self, batch: Batch, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mask = inputs["mask"]
        image, label = (
            torch.cat([copy_paste(mask, a, b), copy_paste(mask, b, a)])
            for a, b in (batch.labelled_image.chunk(2), batch.labelled_label.chunk(2))
        )
        logits, _ = self.method.network(image)
        regions, weights, config = None, self.method.one_region, self.method.config
        if config.dice_per_image:
            regions, weights = regions_by_image(torch.zeros_like(label), weights)
        losses = dice_ce(
            logits, label, regions=regions, num_regions=len(weights), squared=config.dice_squared
        )
        return {"total": region_weighted_loss(losses, weights)}


class SelfTraining(CopyPasteStage):
    """Stage 2: eqs. 1 to 6 on two mixes of labelled and pseudo-labelled images."""

    name = "self-training"
    uses_unlabelled = True

    def __init__(self, method: MPER, generator: torch.Generator):
        super().__init__(method, generator)
        self.iterations = method.config.iterations
        self.learning_rate_step = method.config.learning_rate_step
        self.cluster_updates: list[tuple[Tensor, Tensor]] = []  # (sum, count) of the parts of this step

    def prepare(self, labelled: Sequence[Case], patch_size: tuple[int, ...]) -> None:
        method = self.method
        method.teacher.load_state_dict(method.network.state_dict())
        method.teacher.train(method.config.teacher_mode == "train")
        prototypes = cluster_embeddings(
            method.network,
            labelled,
            method.num_classes,
            method.config.num_prototypes,
            patch_size,
            method.config.kmeans_batch,
            self.generator.initial_seed() % 2**32,
        )
        method.classifier.start_at_(prototypes)

    def inputs(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        config = self.method.config
        ramp_up = config.ramp_up_weight * sigmoid_ramp_up(
            iteration, config.ramp_up_iterations, config.ramp_up_step
        )
        return {**super().inputs(batch, iteration), "ramp_up": batch.labelled_image.new_full((), ramp_up)}

    def losses(self, batch: Batch, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return add_losses(self.parts(batch, inputs))

    def parts(self, batch: Batch, inputs: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        mixes, ramp_up = self.mix(batch, inputs["mask"]), inputs["ramp_up"]
        network = self.method.network
        self.cluster_updates = []
        logged = {"ramp_up": ramp_up}
        if self.method.config.join_mixes:
            logits, embedding = (
                output.chunk(2) for output in network(torch.cat([mix.image for mix in mixes]))
            )
            both = [
                self.mix_losses(*arguments, ramp_up)
                for arguments in zip(mixes, logits, embedding, strict=True)
            ]
            yield {**add_losses(both), **logged}
            return
        for mix in mixes:
            logits, embedding = network(mix.image)
            losses = self.mix_losses(mix, logits, embedding, ramp_up)
            del logits, embedding  # they must not outlive the backward pass
            yield {**losses, **logged}
            logged = {}

    def mix_losses(
        self,
        mix: Mix,
        logits: Tensor,  # [B, C, *P]
        embedding: Tensor,  # [B, d, *P]
        ramp_up: Tensor,  # scalar, λ(t)
    ) -> dict[str, Tensor]:
        """What one of the two mixes adds to the losses; its cluster sums wait for `update`."""
        config = self.method.config
        regions, weights = mix.region, self.method.region_weights
        if config.dice_per_image:
            regions, weights = regions_by_image(regions, weights)
        linear = dice_ce(
            logits, mix.label, regions=regions, num_regions=len(weights), squared=config.dice_squared
        )
        head = self.method.classifier(embedding, mix.label, regions, mix.reliable, num_regions=len(weights))
        self.cluster_updates += self.prototype_steps(mix, embedding, head)
        consistency_linear = region_weighted_loss(linear, weights)
        consistency_prototype = region_weighted_loss(head, weights)
        contrastive = head.info_nce / (2 if config.contrast_reduction == "mean" else 1)
        return {
            "total": consistency_linear
            + ramp_up * (consistency_prototype + config.contrast_weight * contrastive),
            "consistency_linear": consistency_linear,
            "consistency_prototype": consistency_prototype,
            "contrastive": contrastive,
        }

    @torch.no_grad()
    def mix(
        self,
        batch: Batch,
        mask: Tensor,  # [*P] bool
    ) -> tuple[Mix, Mix]:
        """Bidirectional copy-paste of labelled and pseudo-labelled images, with one zero-box mask M.

        Mix 1 is labelled_a M + unlabelled_a (1 - M), mix 2 is unlabelled_b M + labelled_b (1 - M).
        """
        pseudo_label, reliable = self.pseudo_label(batch.unlabelled_image)
        trusted = torch.ones_like(batch.labelled_label, dtype=torch.bool)
        labelled_a, labelled_b = _halves(batch.labelled_image, batch.labelled_label, trusted)
        unlabelled_a, unlabelled_b = _halves(batch.unlabelled_image, pseudo_label, reliable)
        return _mix(mask, labelled_a, unlabelled_a, "outside"), _mix(mask, unlabelled_b, labelled_b, "inside")

    def pseudo_label(
        self,
        image: Tensor,  # [B, M, *P]
    ) -> tuple[Tensor, Tensor]:  # [B, *P] uint8, [B, *P] bool
        """The teacher's largest component of each class, and where its confidence exceeds α and the filter kept it."""
        logits, _ = self.method.teacher(image)
        confidence, prediction = logits.float().softmax(1).max(1)
        prediction = prediction.to(torch.uint8)
        pseudo_label = largest_components(prediction, self.method.num_classes)
        return pseudo_label, (confidence > self.method.config.confidence) & (pseudo_label == prediction)

    def prototype_steps(
        self, mix: Mix, embedding: Tensor, head: PrototypeHead
    ) -> list[tuple[Tensor, Tensor]]:
        """Cluster sums and counts of one mix: one pair, or one of the labelled and one of the unlabelled voxels."""
        config = self.method.config
        if config.prototype_steps == "one":
            assert head.cluster_sum is not None and head.cluster_count is not None  # there are labels
            return [(head.cluster_sum, head.cluster_count)]
        return [
            cluster_mean(
                embedding.detach(),
                self.method.classifier.prototypes,
                mix.label,
                weight=mix.reliable & (mix.region == region),
                unit_length=config.update_unit_length,
                require_agreement=config.update_requires_agreement,
            )
            for region in (LABELLED, PSEUDO_LABELLED)
        ]

    @torch.no_grad()
    def update(self) -> None:
        """The prototypes' momentum step (eq. 2), then the teacher's exponential moving average."""
        config, method = self.method.config, self.method
        updates = self.cluster_updates
        if config.prototype_steps == "one":
            sums, counts = zip(*updates, strict=True)
            updates = [(sum(sums), sum(counts))]
        for cluster_sum, cluster_count in updates:
            method.classifier.update_(
                cluster_sum,
                cluster_count,
                config.prototype_momentum,
                foreground_only=config.update_classes == "foreground",
            )
        pairs: list[tuple[Iterable[Tensor], Iterable[Tensor]]]
        pairs = [(method.teacher.parameters(), method.network.parameters())]
        if config.teacher_buffers:
            pairs.append((method.teacher.buffers(), method.network.buffers()))
        for teacher, student in pairs:
            averaged = [(t, s) for t, s in zip(teacher, student, strict=True) if t.is_floating_point()]
            torch._foreach_lerp_([t for t, _ in averaged], [s for _, s in averaged], 1 - config.teacher_decay)
