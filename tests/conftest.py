"""Skips the tests whose marker asks for something this machine lacks."""

import os

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "no CUDA device"
    if "SEMISEG_DATA" not in os.environ:
        missing["data"] = "SEMISEG_DATA is not set"
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
