"""Run directories of networks that were never trained, tiny and quick to make."""

from pathlib import Path

import torch

from semiseg.config import load_config
from semiseg.data.description import DatasetDescription
from semiseg.data.preprocessing import Intensity, Preprocessing
from semiseg.engine.checkpoint import save_checkpoint
from semiseg.engine.run_directory import RunDirectory
from semiseg.engine.trainer import build_method
from semiseg.methods import METHODS

TINY = {
    "vnet": ["training.patch_size=[32, 32, 16]", "evaluation.stride=[16, 16, 16]", "network.filters=[2]"],
    "unet": ["training.patch_size=[32, 32]", "network.filters=[2, 2, 2, 2, 2]", "dataset.root=/nowhere"],
}
METHOD_OVERRIDES = {
    "phantom_mper": ["method.zero_box=[20, 20, 10]", "method.num_prototypes=2"],
    "phantom_vclipseg": ["method.prompt_width=8", "method.controller_widths=[4, 4]", "method.text_width=8"],
    "acdc_mper": ["method.zero_box=[20, 20]"],
}
AS_STORED = (Intensity("fixed", mean=0.0, deviation=1.0),)  # intensities as the file has them
RAW = Preprocessing(None, None, AS_STORED)


def untrained_run(
    folder: Path,
    configuration: str = "phantom_supervised",
    preprocessing: Preprocessing = RAW,
    class_names: tuple[str, ...] = ("background", "organ"),
    overrides: tuple[str, ...] = (),
    label_values: tuple[int, ...] | None = None,
) -> Path:
    """What training leaves that prediction needs, with random weights and random prototypes."""
    network = "unet" if configuration.startswith("acdc") else "vnet"
    tiny = [*TINY[network], *METHOD_OVERRIDES.get(configuration, [])]
    config = load_config(configuration, [*tiny, *overrides, f"output={folder}"])
    run = RunDirectory.create(config, torch.device("cpu"))
    description = DatasetDescription(class_names, config.network.dimensions, preprocessing, label_values)
    description.save(run.dataset)
    text = METHODS[config.method.name].text(config, class_names)
    if text is not None:
        text.save(run.text)
    torch.manual_seed(0)
    method = build_method(config, len(class_names), torch.device("cpu"), text, len(preprocessing.channels))
    with torch.no_grad():
        for name, value in method.state_dict().items():
            if name.endswith(("running_mean", "prototypes", "bias")):
                value.normal_(std=0.3)
    save_checkpoint(run.checkpoint(), method, iteration=7)
    return folder
