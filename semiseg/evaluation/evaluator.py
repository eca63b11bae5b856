"""Whole cases through a trained network: class maps, metrics per case, their summary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from semiseg.config import Config
from semiseg.data import Case, Dataset, largest_components
from semiseg.evaluation.metrics import case_metrics, summarise
from semiseg.evaluation.sliding_window import Progress, slice_slabs, volume_slabs
from semiseg.methods import Method


def autocast(config: Config, device: torch.device) -> AbstractContextManager[Any]:
    """The context a network's forward pass runs in, for training and evaluation."""
    if config.training.precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def probability_slabs(
    method: Method,  # its network in eval mode
    image: np.ndarray,  # [*S] float32; [slices, H, W] for a 2D network
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

    volume = torch.from_numpy(image).to(device)
    if evaluation.stride is None:
        return slice_slabs(probabilities, volume, patch_size, evaluation.batch, progress)
    if len(patch_size) == 2:
        sides = (1, *patch_size), (1, *evaluation.stride)
        return volume_slabs(of_thin_windows, volume, *sides, evaluation.batch, progress)
    return volume_slabs(probabilities, volume, patch_size, evaluation.stride, evaluation.batch, progress)


def predict_case(
    method: Method,  # its network in eval mode
    image: np.ndarray,  # [*S] float32; [slices, H, W] for a 2D network
    config: Config,
    device: torch.device,
) -> np.ndarray:  # [*S] uint8
    """Class of every voxel, by the configured head, sliding window and component filter."""
    slabs = probability_slabs(method, image, config, device)
    prediction = torch.cat([slab.argmax(0).to(torch.uint8) for slab in slabs])
    if config.evaluation.largest_component:
        prediction = largest_components(prediction[None], method.num_classes)[0]
    return prediction.cpu().numpy()


def predictions(
    method: Method, dataset: Dataset, split: str, config: Config, device: torch.device
) -> Iterator[tuple[Case, np.ndarray]]:
    """Every case of a split with its predicted class map [*S] uint8, one volume in memory at a time."""
    training = method.network.training
    method.network.eval()
    try:
        for case in tqdm(
            dataset.evaluation_cases(split), desc=split, unit="case", leave=False, dynamic_ncols=True
        ):
            yield case, predict_case(method, case.image, config, device)
    finally:
        method.network.train(training)


def evaluate_cases(
    method: Method, dataset: Dataset, split: str, config: Config, device: torch.device
) -> dict[str, Any]:
    """Metrics per case and class, and their summary, on `validation` or `test`."""
    cases = {
        case.name: case_metrics(prediction, case.label, dataset.class_names, case.spacing)
        for case, prediction in predictions(method, dataset, split, config, device)
    }
    return {"summary": summarise(cases), "cases": cases}
