"""Training: data, network, method and optimiser put together, and the loop."""

from __future__ import annotations

import sys

import torch
from tqdm import tqdm

from semiseg.config import Config
from semiseg.data import Augmentation, Case, Dataset, TrainingSampler, open_dataset
from semiseg.data.description import DatasetDescription
from semiseg.engine.checkpoint import save_checkpoint
from semiseg.engine.run_directory import MetricsLog, RunDirectory
from semiseg.evaluation.evaluator import autocast, evaluate_cases
from semiseg.evaluation.figures import learning_curves
from semiseg.methods import METHODS, Method, Stage
from semiseg.methods.method import Batch
from semiseg.text import TextEmbeddings


def choose_device(name: str) -> torch.device:
    """The device a configuration asks for; `auto` is the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"training.device is {name!r}, accepted are auto, cpu, cuda, cuda:1 ...") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"training.device is {name!r}, but PyTorch finds no GPU")
    return device


def open_configured_dataset(config: Config) -> Dataset:
    """The dataset of a configuration."""
    return open_dataset(config.dataset.name, config.dataset.root, config.dataset.cohort_seed)


def build_method(
    config: Config,
    num_classes: int,
    device: torch.device,
    text: TextEmbeddings | None = None,  # of a method that learns from text
) -> Method:
    """The method of a configuration around a freshly initialised network (from torch's global generator)."""
    method = METHODS[config.method.name].build(config, num_classes, text).to(device)
    if config.training.channels_last:
        memory_format = torch.channels_last_3d if config.network.name == "vnet" else torch.channels_last
        # the stubs of Module.to lack a memory format alone
        method.to(memory_format=memory_format)  # type: ignore[call-overload]
    return method


def train(config: Config) -> RunDirectory:
    """Train a method through all its stages, leaving metrics, checkpoints and learning curves in a new run directory.

    Test cases are opened only where evaluation.select asks for selection on the test set. Raises ValueError or
    FileNotFoundError for what the data or the configuration lacks, before the run directory is made, and
    FloatingPointError where the loss stops being finite.
    """
    device = choose_device(config.training.device)
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    dataset = open_configured_dataset(config)
    labelled, unlabelled = dataset.training_cases(config.dataset.labelled)
    text = METHODS[config.method.name].text(config, dataset.class_names)
    method = build_method(config, len(dataset.class_names), device, text)
    stages = method.stages(generator)
    samplers = [_sampler(config, stage, labelled, unlabelled, number) for number, stage in enumerate(stages)]
    selection = Selection(config, dataset, device)

    run = RunDirectory.create(config)
    DatasetDescription.of(dataset).save(run.dataset)
    if text is not None:
        text.save(run.text)
    print(
        f"{config.name}: {config.method.name} on {config.dataset.name}, run directory {run.path}", flush=True
    )
    log = MetricsLog(run)
    iteration = 0  # over all stages
    total = sum(stage.iterations for stage in stages)
    with tqdm(total=total, unit="step", file=sys.stderr, dynamic_ncols=True, mininterval=1.0) as progress:
        for stage, sampler in zip(stages, samplers, strict=True):
            progress.set_description(stage.name)
            stage.prepare(labelled, config.training.patch_size)
            optimiser = _optimiser(config, method)
            method.network.train()
            for step in range(stage.iterations):
                for group in optimiser.param_groups:
                    group["lr"] = stage.learning_rate(config.training.learning_rate, step)
                batch = Batch(*sampler.next()).to(device)
                with autocast(config, device):
                    losses = stage.losses(batch, step)
                optimiser.zero_grad(set_to_none=True)
                losses["total"].backward()
                optimiser.step()
                stage.update()

                iteration += 1
                values = {name: loss.detach() for name, loss in losses.items()}
                log.add(iteration, stage.name, {**values, "learning_rate": optimiser.param_groups[0]["lr"]})
                progress.set_postfix(
                    {name: f"{value:.3f}" for name, value in log.latest.items()}, refresh=False
                )
                progress.update()
                if selection.due(iteration, total):
                    log.add(
                        iteration, stage.name, {"validation_dice": selection.evaluate(method, run, iteration)}
                    )
    log.flush()
    log.close()
    save_checkpoint(run.checkpoint(), method, iteration=iteration)
    learning_curves(run.metrics, run.learning_curves)
    return run


def _sampler(
    config: Config, stage: Stage, labelled: list[Case], unlabelled: list[Case], number: int
) -> TrainingSampler:
    training = config.training
    return TrainingSampler(
        labelled,
        unlabelled,
        Augmentation(config.dataset.augmentation, training.patch_size),
        training.labelled_batch,
        training.unlabelled_batch if stage.uses_unlabelled else 0,
        seed=config.seed + number * 2**32,
    )


def _optimiser(config: Config, method: Method) -> torch.optim.Optimizer:
    training = config.training
    return torch.optim.SGD(
        [parameter for parameter in method.parameters() if parameter.requires_grad],
        lr=training.learning_rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        foreach=True,
    )


class Selection:
    """Keeps the checkpoint that does best on the validation split, or, only on request, on the test set."""

    def __init__(self, config: Config, dataset: Dataset, device: torch.device):
        self.config, self.dataset, self.device = config, dataset, device
        self.best = -1.0
        self.split = "validation" if dataset.has_validation else None
        if config.evaluation.select == "test":
            self.split = "test"
            tqdm.write(
                "WARNING: the checkpoint is selected on the test set; its figures are not those of unseen data"
            )
        elif config.evaluation.select == "validation" and self.split is None:
            raise ValueError(
                f"evaluation.select is validation, but {config.dataset.name} has no validation split"
            )

    def due(self, iteration: int, total: int) -> bool:
        interval = self.config.evaluation.validation_interval
        return self.split is not None and (iteration == total or (interval > 0 and iteration % interval == 0))

    def evaluate(self, method: Method, run: RunDirectory, iteration: int) -> float:
        """Mean Dice on the split; writes the checkpoint where it is the best so far."""
        assert self.split is not None
        result = evaluate_cases(method, self.dataset, self.split, self.config, self.device)
        dice = result["summary"]["mean"]["dice"]["mean"]
        if dice > self.best:
            self.best = dice
            save_checkpoint(run.checkpoint(self.split), method, iteration=iteration, dice=dice)
        return dice
