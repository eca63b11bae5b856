"""Whole cases through a trained network: class maps, metrics per case, their summary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from semiseg.config import Config
from semiseg.data import Case, Dataset
from semiseg.engine.precision import autocast
from semiseg.evaluation.metrics import CaseMetrics, case_metrics, case_overlaps, mean_dice
from semiseg.evaluation.sliding_window import Progress, slice_slabs, volume_slabs
from semiseg.methods import Method
from semiseg.models.folding import fold_batch_norm
from semiseg.models.predicted_class import predicted_class
from semiseg_kernels import largest_components

BATCH_VOXELS = 2**22  # with fewer, weights of deep layers are read for few voxels; more take memory for nothing


def evaluation_batch(config: Config) -> int:
    """Windows or slices of a forward pass."""
    return config.evaluation.batch or max(1, BATCH_VOXELS // prod(config.training.patch_size))


def probability_slabs(
    method: Method,  # its network in eval mode
    image: np.ndarray,  # [M, *S] float32; [M, slices, H, W] for a 2D network
    config: Config,
    device: torch.device,
    progress: Progress = iter,
) -> Iterator[Tensor]:  # [C, n, *S[1:]] float32, on the device
    """Class probabilities by the configured head and sliding window, slab by slab along the first axis.

    A 2D network goes slice by slice, with a stride through windows of every slice, without one through the
    slices resized to its patch. A slab is valid until the next is asked for.
    """
    evaluation, patch_size = config.evaluation, config.training.patch_size

    def probabilities(windows: Tensor) -> Tensor:
        with autocast(config, device):
            return method.probabilities(windows, evaluation.head)

    def of_thin_windows(windows: Tensor) -> Tensor:
        return probabilities(windows.squeeze(2)).unsqueeze(2)

    volume, batch = torch.from_numpy(image).to(device), evaluation_batch(config)
    if evaluation.stride is None:
        return slice_slabs(probabilities, volume, patch_size, batch, progress)
    if len(patch_size) == 2:
        sides = (1, *patch_size), (1, *evaluation.stride)
        return volume_slabs(of_thin_windows, volume, *sides, batch, progress)
    return volume_slabs(probabilities, volume, patch_size, evaluation.stride, batch, progress)


def class_map(
    probabilities: Tensor,  # [C, *S]
) -> Tensor:  # [*S] uint8
    """The class of the highest probability, the first of several."""
    return predicted_class(probabilities, dim=0).to(torch.uint8)


def predict_case(
    method: Method,  # its network in eval mode
    image: np.ndarray,  # [M, *S] float32; [M, slices, H, W] for a 2D network
    config: Config,
    device: torch.device,
) -> np.ndarray:  # [*S] uint8
    """Class of every voxel, by the configured head, sliding window and component filter."""
    slabs = probability_slabs(method, image, config, device)
    prediction = torch.cat([class_map(slab) for slab in slabs])
    if config.evaluation.largest_component:
        prediction = largest_components(prediction[None], method.num_classes)[0]
    return prediction.cpu().numpy()


def predict_cases(
    method: Method, dataset: Dataset, split: str, config: Config, device: torch.device
) -> Iterator[tuple[Case, np.ndarray]]:
    """Every case of `validation` or `test` and its predicted class map [*S] uint8, one by one.

    The method may be in any mode and stays in it; its weights are those of when the first case is asked for.
    """
    method = fold_batch_norm(method)
    for case in tqdm(
        dataset.evaluation_cases(split), desc=split, unit="case", leave=False, dynamic_ncols=True
    ):
        yield case, predict_case(method, case.image, config, device)


def evaluate_cases(
    method: Method, dataset: Dataset, split: str, config: Config, device: torch.device
) -> Iterator[tuple[Case, np.ndarray, CaseMetrics]]:
    """What `predict_cases` gives, with the metrics of every case."""
    for case, prediction in predict_cases(method, dataset, split, config, device):
        yield case, prediction, case_metrics(prediction, case.label, dataset.class_names, case.spacing)


def split_dice(
    method: Method, dataset: Dataset, split: str, config: Config, device: torch.device
) -> float:
    """Mean Dice over the cases of `validation` or `test`, as the summary of all metrics has it, in less time."""
    dice = [
        mean_dice(case_overlaps(prediction, case.label, dataset.class_names))
        for case, prediction in predict_cases(method, dataset, split, config, device)
    ]
    return float(np.mean(dice))


def validation_config(config: Config) -> Config:
    """Of evaluations during training: windows move by `evaluation.validation_stride`, without one by half a patch."""
    evaluation = config.evaluation
    if evaluation.stride is None:
        return config
    stride = evaluation.validation_stride or tuple(side // 2 for side in config.training.patch_size)
    return replace(config, evaluation=replace(evaluation, stride=stride))
