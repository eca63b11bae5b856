"""VCLIPSeg (MICCAI 2024): voxel-wise prompts from text, consistency with text, dynamic pseudo-labels.

Two decoders on one encoder. The labelled images teach both by Dice loss; on the unlabelled ones both learn
the mix of their two predictions, in which the decoder with the lower Dice loss has more say. The features of
the bottleneck, with a mix of the classes' text embeddings fused into them, are drawn towards the text of
their class (eq. 11):

    L = L_l + λ_u(t) L_u + λ_r L_reg

The paper's ablations are keys: `voxel_prompt` (VWPM), `text_consistency` (VTCM) and `pseudo_label` (DLB, or
what it takes the place of: mutual consistency of two decoders, cross pseudo supervision of two networks).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from semiseg.config import Config, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range, Seed
from semiseg.methods.method import Batch, Method, Stage
from semiseg.models import (
    TWO_DECODERS,
    TwoDecoders,
    TwoNetworks,
    VisionTextConsistency,
    VoxelPrompt,
    agreement_map,
    branch_weights,
    build_network,
    cross_pseudo_supervision,
    dynamic_pseudo_label,
    mutual_consistency,
    predicted_class,
    pseudo_label_loss,
    sigmoid_ramp_up,
)
from semiseg.models.initialisation import initialise
from semiseg.text import (
    CLASS_PLACEHOLDER,
    TextEmbeddings,
    class_prompts,
    clip_text,
    file_text,
    random_text,
)
from semiseg_kernels import dice_ce


@dataclass(frozen=True)
class VCLIPSegConfig:
    """The open points of the method, as the presets `paper` and `released` set them."""

    name: str
    iterations: PositiveInt
    ramp_up_iterations: NonNegativeInt  # T of λ_u(t)
    ramp_up_step: PositiveInt = 1  # λ_u moves every so many iterations
    learning_rate_step: PositiveInt | None = None  # iterations between tenfold cuts
    # two_networks: with neither prompt nor text consistency
    branches: Literal["two_decoders", "two_networks"] = "two_decoders"
    voxel_prompt: bool = True  # VWPM
    text_consistency: bool = True  # VTCM
    # dynamic: DLB; mutual: mutual consistency; cross: cross pseudo supervision
    pseudo_label: Literal["dynamic", "mutual", "cross"] = "dynamic"
    pseudo_label_form: Literal["soft", "hard"] = "soft"  # of the dynamic one, P as it is; hard: its arg max
    unlabelled_loss_over: Literal["unlabelled", "all"] = "unlabelled"  # images that L_u sees
    labelled_weight: NonNegativeFloat = 1.0  # of L_l
    dice_squared: bool = True  # Dice's denominator has squares, V-Net's
    dice_background: bool = True  # Dice's mean is over all classes, or over all but the background
    consistency_weight: NonNegativeFloat = 0.5  # λ_r
    sharpening_temperature: PositiveFloat = 0.1  # of mutual consistency
    # of the voxels where decoders and truth agree, to the bottleneck
    mask_resampling: Literal["area", "nearest"] = "area"
    projection_heads: Annotated[int, Range(1, 2)] = 1  # on the bottleneck; 2: one a decoder, with one mean of both
    prompt_width: PositiveInt = 256  # of the text embeddings when they are mixed
    controller_widths: tuple[PositiveInt, ...] = (64, 16)  # of the convolution and the hidden layer
    fusion_kernel: PositiveInt = 3  # side of the convolution that fuses features and prompt
    text: Literal["clip", "file", "random"] = "clip"  # where the embeddings come from
    text_prompt: str = "A pixel of [CLS]"  # [CLS] is the class's name
    clip_model: str = "openai/clip-vit-base-patch32"  # a name on the Hugging Face hub, or a folder
    text_file: str | None = None  # .npz, .safetensors or .pt with one embedding a class, background first
    text_width: PositiveInt = 512  # of random embeddings
    text_seed: Seed = 0  # of random embeddings

    def __post_init__(self) -> None:
        if len(self.controller_widths) != 2:
            raise ValueError(
                f"method.controller_widths is {list(self.controller_widths)}, accepted are two widths"
            )
        if self.fusion_kernel % 2 != 1:
            raise ValueError(f"method.fusion_kernel is {self.fusion_kernel}, accepted are odd sides")
        if CLASS_PLACEHOLDER not in self.text_prompt:
            raise ValueError(
                f"method.text_prompt is {self.text_prompt!r}, accepted are texts with {CLASS_PLACEHOLDER}"
            )
        if (self.text == "file") != (self.text_file is not None):
            raise ValueError(
                f"method.text is {self.text} and method.text_file {self.text_file}, "
                "accepted are text=file with a text_file, and clip or random without"
            )
        if self.branches == "two_networks" and self.uses_text:
            raise ValueError(
                "method.branches is two_networks, accepted with method.voxel_prompt and "
                "method.text_consistency false"
            )

    @property
    def uses_text(self) -> bool:
        return self.voxel_prompt or self.text_consistency


class VCLIPSeg(Method):
    """Two branches, and the projection head of their consistency with text."""

    Options = VCLIPSegConfig
    network: TwoDecoders | TwoNetworks

    def __init__(
        self,
        config: VCLIPSegConfig,
        network: TwoDecoders | TwoNetworks,
        num_classes: int,
        consistency: VisionTextConsistency | None,
    ):
        super().__init__(config, network, num_classes)
        self.consistency = consistency

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        if config.training.unlabelled_batch < 1:
            raise ValueError(
                f"training.unlabelled_batch is {config.training.unlabelled_batch}, "
                "accepted by vclipseg are values above 0"
            )

    @classmethod
    def text(cls, config: Config, class_names: Sequence[str]) -> TextEmbeddings | None:
        method: VCLIPSegConfig = config.method
        if not method.uses_text:
            return None
        if method.text == "clip":
            return clip_text(method.clip_model, class_prompts(method.text_prompt, class_names))
        if method.text_file is not None:
            return file_text(method.text_file, len(class_names))
        return random_text(len(class_names), method.text_width, method.text_seed)

    @classmethod
    def build(cls, config: Config, num_classes: int, text: TextEmbeddings | None, channels: int) -> VCLIPSeg:
        method: VCLIPSegConfig = config.method
        sizes = {**config.network.sizes, "in_channels": channels, "num_classes": num_classes}
        if method.branches == "two_networks":
            networks = [build_network(config.network.name, **sizes) for _ in range(2)]
            for network in networks:
                initialise(network, config.network.initialisation)
            return cls(method, TwoNetworks(*networks), num_classes, None)
        prompt = consistency = None
        if method.uses_text:
            if text is None:
                raise ValueError("vclipseg learns from text, but the run's text.safetensors is missing")
            bottleneck = {"width": config.network.bottleneck_width, "dimensions": config.network.dimensions}
            if method.voxel_prompt:
                prompt = VoxelPrompt(
                    text.embeddings,
                    prompt_width=method.prompt_width,
                    controller_widths=method.controller_widths,
                    fusion_kernel=method.fusion_kernel,
                    **bottleneck,
                )
            if method.text_consistency:
                consistency = VisionTextConsistency(
                    text.embeddings, heads=method.projection_heads, **bottleneck
                )
                initialise(consistency, config.network.initialisation)
        network = TWO_DECODERS[config.network.name](prompt=prompt, **sizes)
        initialise(network, config.network.initialisation)
        return cls(method, network, num_classes, consistency)

    def stages(self, generator: torch.Generator) -> list[Stage]:
        return [TwoBranchTraining(self)]

    def training_forward(self, image: Tensor) -> Sequence[Tensor]:
        logits_a, logits_b, bottleneck = self.network.branches(image)
        if self.consistency is None or bottleneck is None:
            return logits_a, logits_b
        return logits_a, logits_b, *(projection(bottleneck) for projection in self.consistency.projections)


class TwoBranchTraining(Stage):
    """The only stage: eqs. 4 to 11 on a batch of labelled and unlabelled images."""

    name = "training"
    uses_unlabelled = True

    def __init__(self, method: VCLIPSeg):
        self.method = method
        self.iterations = method.config.iterations
        self.learning_rate_step = method.config.learning_rate_step
        self.dice = {
            "squared": method.config.dice_squared,
            "include_background": method.config.dice_background,
        }

    def inputs(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        config = self.method.config
        ramp_up = sigmoid_ramp_up(iteration, config.ramp_up_iterations, config.ramp_up_step)
        return {"ramp_up": batch.labelled_image.new_full((), ramp_up)}

    def losses(self, batch: Batch, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        config, consistency = self.method.config, self.method.consistency
        labels, count = batch.labelled_label, len(batch.labelled_image)
        logits_a, logits_b, bottleneck = self.method.network.branches(
            torch.cat([batch.labelled_image, batch.unlabelled_image])
        )
        labelled_a, labelled_b = logits_a[:count], logits_b[:count]
        dice_a, dice_b = (
            dice_ce(logits, labels, **self.dice).dice[0] for logits in (labelled_a, labelled_b)
        )

        first = 0 if config.unlabelled_loss_over == "all" else count
        unlabelled = self.unlabelled_loss(logits_a[first:], logits_b[first:], dice_a, dice_b)
        ramp_up = inputs["ramp_up"]
        total = config.labelled_weight * (dice_a + dice_b) + ramp_up * unlabelled
        losses = {
            "dice_a": dice_a,
            "dice_b": dice_b,
            "unlabelled": unlabelled,
            "ramp_up": ramp_up,
        }
        if consistency is not None and bottleneck is not None:
            features = bottleneck[:count]
            weight = agreement_map(labelled_a, labelled_b, labels, features.shape[2:], config.mask_resampling)
            losses["consistency"] = consistency(features, weight)
            total = total + config.consistency_weight * losses["consistency"]
        return {"total": total, **losses}

    def unlabelled_loss(
        self,
        logits_a: Tensor,  # [B, C, *P]
        logits_b: Tensor,  # [B, C, *P]
        dice_a: Tensor,  # scalar, on the labelled images
        dice_b: Tensor,  # scalar
    ) -> Tensor:
        """L_u of the configured kind of pseudo-label."""
        config = self.method.config
        if config.pseudo_label == "cross":
            return cross_pseudo_supervision(logits_a, logits_b)
        if config.pseudo_label == "mutual":
            return mutual_consistency(logits_a, logits_b, config.sharpening_temperature)
        pseudo_label = dynamic_pseudo_label(logits_a, logits_b, *branch_weights(dice_a, dice_b))
        if config.pseudo_label_form == "hard":
            pseudo_label = predicted_class(pseudo_label).to(torch.uint8)
        return pseudo_label_loss(logits_a, logits_b, pseudo_label, **self.dice)
