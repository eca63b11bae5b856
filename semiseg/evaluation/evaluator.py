"""Whole cases through a trained network: class maps, metrics per case, their summary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from semiseg.config import Config
from semiseg.data import Case, Dataset, largest_components
from semiseg.evaluation.metrics import case_metrics, summarise
from semiseg.evaluation.sliding_window import predict_slices, predict_volume
from semiseg.methods import Method


def autocast(config: Config, device: torch.device):
    """The context a network's forward pass runs in, for training and evaluation."""
    if config.training.precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def predict_case(
    method: Method,  # its network in eval mode
    image: np.ndarray,  # [*S] float32; [slices, H, W] for a 2D network
    config: Config,
    device: torch.device,
) -> np.ndarray:  # [*S] uint8
    """Class of every voxel, by the configured head, sliding window and component filter."""
    evaluation, patch_size = config.evaluation, config.training.patch_size

    def probabilities(windows: Tensor) -> Tensor:
        with autocast(config, device):
            return method.probabilities(windows, evaluation.head)

    volume = torch.from_numpy(image).to(device)
    if evaluation.stride is None:
        prediction = predict_slices(probabilities, volume, patch_size, evaluation.batch)
    else:
        averaged = predict_volume(probabilities, volume, patch_size, evaluation.stride, evaluation.batch)
        prediction = averaged.argmax(0).to(torch.uint8)
    if evaluation.largest_component:
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
