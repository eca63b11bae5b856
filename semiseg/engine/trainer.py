"""Training: data, network, method and optimiser put together, and the loop."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from semiseg.config import Config
from semiseg.data import Augmentation, Case, Dataset, TrainingSampler, TrainingTensors, open_dataset
from semiseg.data.description import DatasetDescription
from semiseg.engine.checkpoint import save_checkpoint
from semiseg.engine.determinism import algorithms
from semiseg.engine.distributed import Processes, gradients
from semiseg.engine.interruption import Interrupted, Interruption
from semiseg.engine.metrics_log import MetricsLog
from semiseg.engine.precision import autocast, check_precision
from semiseg.engine.run_directory import RunDirectory
from semiseg.engine.training_state import TrainingState, save_training_state, saved_iteration
from semiseg.evaluation.evaluator import evaluate_cases, validation_config
from semiseg.evaluation.figures import learning_curves
from semiseg.evaluation.metrics import summarise
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


def train(
    config: Config,
    resume: RunDirectory | None = None,  # a run of this configuration to go on with
) -> RunDirectory | None:
    """Train a method through all its stages, leaving metrics, checkpoints and learning curves in a run directory.

    Of several processes that train together (see semiseg.engine.distributed) the first writes; the others return
    None. Test cases are opened only where evaluation.select asks for selection on the test set. Raises ValueError or
    FileNotFoundError for what the data, the configuration or the run to go on with lacks, before anything is written,
    FloatingPointError where the loss stops being finite, ConnectionError where another process ended, and Interrupted
    after Ctrl-C or SIGTERM.
    """
    processes = Processes()
    processes.check(config)
    device = processes.own_device(choose_device(config.training.device))
    check_precision(config, device)
    state = TrainingState(resume.training_state, config) if resume is not None else None
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    dataset = open_configured_dataset(config)
    labelled, unlabelled = dataset.training_cases(config.dataset.labelled)
    _check_classes(labelled, dataset.class_names)
    if resume is not None and resume.text.is_file():
        text: TextEmbeddings | None = TextEmbeddings.load(resume.text)
    else:
        text = METHODS[config.method.name].text(config, dataset.class_names)
    method = build_method(config, len(dataset.class_names), device, text)
    stages = method.stages(generator)
    tensors = TrainingTensors(labelled, unlabelled, device)
    samplers = [_sampler(config, stage, tensors, number, processes) for number, stage in enumerate(stages)]
    selection = Selection(config, dataset, device)

    iteration = 0  # over all stages
    total = sum(stage.iterations for stage in stages)
    if state is not None:
        iteration, selection.best = state.iteration, state.best
        state.restore(method, generator, device)

    run = None  # of the first process alone
    if processes.is_main:
        if resume is None:
            run = RunDirectory.create(config, device)
            DatasetDescription.of(dataset).save(run.dataset)
            if text is not None:
                text.save(run.text)
        else:
            run = resume.reopen(config, device)
        start = f"going on after iteration {iteration}, " if resume is not None else ""
        print(
            f"{config.name}: {config.method.name} on {config.dataset.name}, {start}run directory {run.path}",
            flush=True,
        )
    save_at = 0.0  # the time from which on the next state is due
    with (
        algorithms(config.training.deterministic),
        processes.joined(device),
        Interruption() as interruption,
        _metrics_log(run, state) as log,
        tqdm(
            total=total,
            initial=iteration,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=1.0,
            disable=not processes.is_main,
        ) as progress,
    ):
        processes.seed(config.seed + iteration)
        for number, (stage, sampler) in enumerate(zip(stages, samplers, strict=True)):
            if state is not None and number < state.stage:
                continue
            progress.set_description(stage.name)
            optimiser = build_optimiser(config, method)
            if state is not None and number == state.stage:
                first_step = state.step
                state.restore_stage(sampler, optimiser)
            else:
                first_step = 0
                stage.prepare(labelled, config.training.patch_size)
            processes.broadcast(method)
            method.network.train()
            for step in range(first_step, stage.iterations):
                stopping = processes.any(interruption.signal is not None)
                if log is not None and (stopping or time.monotonic() >= save_at):
                    save_training_state(
                        log.run.training_state,
                        config=config,
                        method=method,
                        generator=generator,
                        device=device,
                        iteration=iteration,
                        stage=number,
                        step=step,
                        sampler=sampler,
                        optimiser=optimiser,
                        best=selection.best,
                        log_sizes=log.sizes(),
                    )
                    save_at = time.monotonic() + 60 * config.training.checkpoint_minutes
                if stopping:
                    processes.wait()  # one that ends ends the others, and the first may still be writing
                    raise _interrupted(interruption, iteration, total, run)

                values = training_step(
                    config, method, stage, optimiser, Batch(*sampler.next()), step, device, processes
                )
                iteration += 1
                if log is not None:
                    log.add(
                        iteration, stage.name, {**values, "learning_rate": optimiser.param_groups[0]["lr"]}
                    )
                    progress.set_postfix(
                        {name: f"{value:.3f}" for name, value in log.latest.items()}, refresh=False
                    )
                    progress.update()
                if selection.due(iteration, total):
                    if log is not None:
                        log.flush()  # a loss that is not finite must not come to a checkpoint
                        dice = selection.evaluate(method, log.run, iteration)
                        log.add(iteration, stage.name, {"validation_dice": dice})
                    processes.wait()
        if log is not None:
            log.flush()
            save_checkpoint(log.run.checkpoint(), method, iteration=iteration)
            learning_curves(log.run.metrics, log.run.learning_curves)
            log.run.training_state.unlink()
    if interruption.signal is not None:
        raise _interrupted(interruption, iteration, total, run)
    return run


def training_step(
    config: Config,
    method: Method,
    stage: Stage,
    optimiser: torch.optim.Optimizer,
    batch: Batch,
    step: int,  # of the stage, from 0
    device: torch.device,
    processes: Processes,
) -> dict[str, Tensor]:
    """One step of the optimiser and of whatever the method moves with it; the losses and what else is logged."""
    for group in optimiser.param_groups:
        group["lr"] = stage.learning_rate(config.training.learning_rate, step)
    with autocast(config, device):
        losses = stage.losses(batch, step)
    optimiser.zero_grad(set_to_none=True)
    losses["total"].backward()
    values = {name: loss.detach() for name, loss in losses.items()}
    processes.average([*gradients(method), *values.values()])
    optimiser.step()
    stage.update()
    return values


def _check_classes(labelled: Sequence[Case], class_names: Sequence[str]) -> None:
    """Raise ValueError where a class is nowhere to be learnt from."""
    histograms = [np.bincount(case.label.ravel(), minlength=len(class_names)) for case in labelled]
    for name, count in zip(class_names, np.sum(histograms, axis=0), strict=True):
        if not count:
            raise ValueError(
                f"the {len(labelled)} labelled cases hold no voxel of the class {name!r}, so it cannot be learnt; "
                "accepted are labelled cases (dataset.labelled) that show every class"
            )


@contextmanager
def _metrics_log(run: RunDirectory | None, state: TrainingState | None) -> Iterator[MetricsLog | None]:
    """The log of the process that writes; a loss that is not finite then also names the checkpoint that is left."""
    if run is None:
        yield None
        return
    with MetricsLog(run, state.log_sizes if state is not None else None) as log:
        try:
            yield log
        except FloatingPointError as error:
            raise FloatingPointError(
                f"{error}; the last good checkpoint is {run.training_state}, "
                f"of iteration {saved_iteration(run.training_state)}"
            ) from None


def _interrupted(
    interruption: Interruption, iteration: int, total: int, run: RunDirectory | None
) -> Interrupted:
    number = interruption.signal or signal.SIGTERM  # another process had the signal
    how = f": go on with `{run.resume_command}`" if run is not None else ""
    return Interrupted(f"stopped by {number.name} after iteration {iteration} of {total}{how}", number)


def _sampler(
    config: Config,
    stage: Stage,
    tensors: TrainingTensors,
    number: int,
    processes: Processes,
) -> TrainingSampler:
    training = config.training
    return TrainingSampler(
        tensors,
        Augmentation(config.dataset.augmentation, training.patch_size),
        training.labelled_batch,
        training.unlabelled_batch if stage.uses_unlabelled else 0,
        seed=config.seed + number * 2**32,
        process=processes.rank,
        processes=processes.count,
    )


def build_optimiser(config: Config, method: Method) -> torch.optim.Optimizer:
    """SGD over everything the method learns."""
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
            if Processes().is_main:
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
        config = validation_config(self.config)
        evaluated = evaluate_cases(method, self.dataset, self.split, config, self.device)
        summary = summarise({case.name: metrics for case, _, metrics in evaluated})
        dice = summary["mean"]["dice"]["mean"]
        if dice > self.best:
            self.best = dice
            save_checkpoint(run.checkpoint(self.split), method, iteration=iteration, dice=dice)
        return dice
