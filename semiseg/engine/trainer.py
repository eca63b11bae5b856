"""Training: data, network, method and optimiser put together, and the loop."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from tqdm import tqdm

from semiseg.atomic import write_text
from semiseg.config import Config
from semiseg.data import Augmentation, Case, Dataset, TrainingSampler, TrainingTensors, open_dataset
from semiseg.data.description import DatasetDescription
from semiseg.engine.checkpoint import save_checkpoint
from semiseg.engine.determinism import deterministic_algorithms
from semiseg.engine.distributed import Processes
from semiseg.engine.interruption import Interrupted, Interruption
from semiseg.engine.metrics_log import MetricsLog
from semiseg.engine.precision import check_precision
from semiseg.engine.run_directory import RunDirectory
from semiseg.engine.seeds import STAGES, derived_seed
from semiseg.engine.training_state import TrainingState, save_training_state, saved_iteration
from semiseg.engine.training_step import TrainingStep, check_cuda_graph
from semiseg.evaluation.evaluator import split_dice, validation_config
from semiseg.methods import METHODS, Method, Stage
from semiseg.methods.method import Batch
from semiseg.text import TextEmbeddings


def choose_device(name: str) -> torch.device:
    """The device a configuration asks for; `auto` is the GPU where there is one.

    One asked for by number becomes current. Raises ValueError for any other than the CPU and the GPUs PyTorch finds.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    accepted = re.fullmatch("cpu|cuda(?::(0|[1-9][0-9]*))?", name)
    if not accepted:
        raise ValueError(f"training.device is {name!r}, accepted are auto, cpu, cuda, cuda:0, cuda:1 ...")
    if name != "cpu" and int(accepted[1] or 0) >= torch.cuda.device_count():
        gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        devices = ["auto", "cpu", *(["cuda", *gpus] if gpus else [])]
        raise ValueError(
            f"training.device is {name!r}, accepted with the {len(gpus)} GPUs that PyTorch finds are "
            + ", ".join(devices)
        )
    device = torch.device(name)
    if device.index is not None:
        torch.cuda.set_device(device)  # else what names no device would take memory of the first
    return device


def open_configured_dataset(config: Config) -> Dataset:
    """The dataset of a configuration."""
    return open_dataset(config.dataset.name, config.dataset.root, config.dataset.cohort_seed)


def build_method(
    config: Config,
    num_classes: int,
    device: torch.device,
    text: TextEmbeddings | None = None,  # of a method that learns from text
    channels: int = 1,  # of an image
) -> Method:
    """The method of a configuration around a freshly initialised network (from torch's global generator)."""
    method = METHODS[config.method.name].build(config, num_classes, text, channels).to(device)
    if config.training.channels_last:
        memory_format = torch.channels_last_3d if config.network.name == "vnet" else torch.channels_last
        # the stubs of Module.to lack a memory format alone
        method.to(memory_format=memory_format)  # type: ignore[call-overload]
    return method


def train(
    config: Config,
    resume: RunDirectory | None = None,  # a run of this configuration to resume
) -> RunDirectory | None:
    """Train a method through all its stages, leaving metrics, checkpoints and learning curves in a run directory.

    Of several processes that train together (see semiseg.engine.distributed) the first writes; the others return
    None. Test cases are opened only where evaluation.select asks for selection on the test set. Raises ValueError or
    FileNotFoundError for what the data, the configuration or the run to resume lacks, before anything is written,
    FloatingPointError where the loss stops being finite, ConnectionError where another process ended, and Interrupted
    after Ctrl-C or SIGTERM.
    """
    with ExitStack() as held:
        training = Training(config, resume, held)
        try:
            training.run()
        except KeyboardInterrupt:  # the second one
            raise training.stopped_at_once() from None
    return training.directory


class Training:
    """Everything a training consists of, and how far it is. Nothing is written before `run`."""

    def __init__(
        self,
        config: Config,
        resume: RunDirectory | None,  # a run to resume
        held: ExitStack,  # holds the run's lock until the caller closes it
    ) -> None:
        self.config, self.resume, self.held = config, resume, held
        self.processes = Processes()
        if resume is not None and self.processes.is_main:
            # Before its state is read, which another process may be replacing.
            held.enter_context(resume.locked())
        self.processes.check(config)
        self.device = self.processes.own_device(choose_device(config.training.device))
        check_precision(config, self.device)
        check_cuda_graph(config, self.device, self.processes)
        self.state = TrainingState(resume.training_state, config) if resume is not None else None
        if resume is None and self.processes.is_main:
            RunDirectory.check_new(config)
        torch.manual_seed(config.seed)
        self.generator = torch.Generator().manual_seed(config.seed)
        # What needs no data may be wrong too, and reading takes minutes.
        augmentation = Augmentation(config.dataset.augmentation, config.training.patch_size)
        self.dataset = open_configured_dataset(config)
        _check_dimensions(config, self.dataset)
        if resume is not None:
            resume.check_dataset(self.dataset)
        self.text = self._text()
        channels = len(self.dataset.preprocessing.channels)
        self.method = build_method(config, len(self.dataset.class_names), self.device, self.text, channels)
        self.stages = self.method.stages(self.generator)
        self.selection = Selection(config, self.dataset, self.device)
        self.labelled, unlabelled = self.dataset.training_cases(config.dataset.labelled)
        _check_classes(self.labelled, self.dataset.class_names)
        self.training_names = [case.name for case in (*self.labelled, *unlabelled)]
        if resume is not None:
            resume.check_training_cases(self.training_names)
        tensors = TrainingTensors(self.labelled, unlabelled, self.device)
        if tensors.on_disk and self.processes.is_main:
            print(
                "images without labels stay in their files: in memory they would take too much of what is available",
                flush=True,
            )
        self.samplers = [
            _sampler(config, stage, tensors, augmentation, number, self.processes)
            for number, stage in enumerate(self.stages)
        ]
        self.directory: RunDirectory | None = None  # of the first process alone
        self.save_at = 0.0  # the time from which on the next state is due
        self.iteration = 0  # over all stages
        self.total = sum(stage.iterations for stage in self.stages)
        if self.state is not None:
            self.iteration, self.selection.best = self.state.iteration, self.state.best
            self.state.restore(self.method, self.generator, self.device)

    def run(self) -> None:
        """Train from where it stands to the end."""
        if self.processes.is_main:
            self.directory = self._open_directory()
        first_stage, log_sizes = (self.state.stage, self.state.log_sizes) if self.state is not None else (0, None)
        with (
            deterministic_algorithms(self.config.training.deterministic),
            self.processes.joined(self.device),
            Interruption() as interruption,
            _metrics_log(self.directory, log_sizes) as log,
            tqdm(
                total=self.total,
                initial=self.iteration,
                unit="step",
                file=sys.stderr,
                dynamic_ncols=True,
                mininterval=1.0,
                disable=not self.processes.is_main,
            ) as progress,
        ):
            self.processes.seed(self.config.seed + self.iteration)
            for number in range(first_stage, len(self.stages)):
                self._run_stage(number, interruption, log, progress)
            if log is not None:
                log.flush()
                save_checkpoint(log.run.checkpoint(), self.method, iteration=self.iteration)
                # Here, because a start need not wait for what draws.
                from semiseg.evaluation.figures import learning_curves

                learning_curves(log.run.metrics, log.run.learning_curves)
                log.run.training_state.unlink()
        if interruption.signal is not None:
            raise self._interrupted(interruption)

    def stopped_at_once(self) -> BaseException:
        """What says so, and, where there is something to resume, how."""
        if self.directory is None or not self.directory.training_state.is_file():
            return KeyboardInterrupt()
        saved = saved_iteration(self.directory.training_state)
        return Interrupted(
            f"stopped by SIGINT within a step: resume it after iteration {saved} of {self.total} with "
            f"`{self.directory.resume_command}`",
            signal.SIGINT,
        )

    def _run_stage(
        self, number: int, interruption: Interruption, log: MetricsLog | None, progress: tqdm
    ) -> None:
        config, method, stage, sampler = self.config, self.method, self.stages[number], self.samplers[number]
        progress.set_description(stage.name)
        optimiser = build_optimiser(config, method)
        first_step = 0
        if self.state is not None:
            first_step = self.state.step
            self.state.restore_stage(sampler, optimiser)
            self.state = None  # the other stages start afresh, and its tensors need not stay in memory
        else:
            if log is not None:
                log.flush()  # a loss that is not finite explains more than what comes of it here
            stage.prepare(self.labelled, config.training.patch_size)
        self.processes.broadcast(method)
        method.network.train()
        take_step = TrainingStep(config, method, stage, optimiser, self.device, self.processes)
        for step in range(first_step, stage.iterations):
            stopping = self.processes.any(interruption.signal is not None)
            if log is not None and (stopping or time.monotonic() >= self.save_at):
                self._save_state(log, number, step, optimiser)
            if stopping:
                self.processes.wait()  # one that ends ends the others, and the first may still be writing
                raise self._interrupted(interruption)
            values = take_step(Batch(*sampler.next()), step)
            self.iteration += 1
            if log is not None:
                log.add(self.iteration, stage.name, {**values, "learning_rate": optimiser.param_groups[0]["lr"]})
                progress.set_postfix({name: f"{value:.3f}" for name, value in log.latest.items()}, refresh=False)
                progress.update()
            # Before the last stage there is no trained method, however well the network does.
            if stage is self.stages[-1] and self.selection.due(self.iteration, self.total):
                self._select(stage, log)

    def _save_state(
        self,
        log: MetricsLog,
        stage: int,
        step: int,  # the next one
        optimiser: torch.optim.Optimizer,
    ) -> None:
        save_training_state(
            log.run.training_state,
            config=self.config,
            method=self.method,
            generator=self.generator,
            device=self.device,
            iteration=self.iteration,
            stage=stage,
            step=step,
            sampler=self.samplers[stage],
            optimiser=optimiser,
            best=self.selection.best,
            log_sizes=log.sizes(),
        )
        self.save_at = time.monotonic() + 60 * self.config.training.checkpoint_minutes

    def _select(self, stage: Stage, log: MetricsLog | None) -> None:
        if log is not None:
            log.flush()  # a loss that is not finite must not come to a checkpoint
            best = self.selection.best
            dice = self.selection.evaluate(self.method, log.run, self.iteration)
            if self.selection.best > best:
                self.save_at = 0.0  # a resumed run has to know of this checkpoint
            log.add(self.iteration, stage.name, {"validation_dice": dice})
        self.processes.wait()

    def _text(self) -> TextEmbeddings | None:
        if self.resume is not None:
            return self.resume.load_text()  # no other: a file may hold something else by now
        return METHODS[self.config.method.name].text(self.config, self.dataset.class_names)

    def _open_directory(self) -> RunDirectory:
        config, resuming = self.config, ""
        if self.resume is not None:
            directory = self.resume.reopen(config, self.device)
            resuming = f"resuming after iteration {self.iteration}, "
        else:
            directory = RunDirectory.create(config, self.device)
            self.held.enter_context(directory.locked())
            DatasetDescription.of(self.dataset).save(directory.dataset)
            write_text(directory.training_cases, "".join(f"{name}\n" for name in self.training_names))
            if self.text is not None:
                self.text.save(directory.text)
        print(
            f"{config.name}: {config.method.name} on {config.dataset.name}, {resuming}run directory {directory.path}",
            flush=True,
        )
        return directory

    def _interrupted(self, interruption: Interruption) -> Interrupted:
        number = interruption.signal or signal.SIGTERM  # another process had the signal
        how = f": resume it with `{self.directory.resume_command}`" if self.directory is not None else ""
        return Interrupted(
            f"stopped by {number.name} after iteration {self.iteration} of {self.total}{how}", number
        )


def _check_dimensions(config: Config, dataset: Dataset) -> None:
    """Raise ValueError where the network takes volumes and the dataset has slices, or the other way round."""
    taken, given = config.network.dimensions, dataset.dimensions
    if taken != given:
        raise ValueError(
            f"network.name={config.network.name} takes {taken}D images, but dataset.name={config.dataset.name} gives "
            f"{given}D ones, accepted is {'vnet' if given == 3 else 'unet'}"
        )


def _check_classes(labelled: Sequence[Case], class_names: Sequence[str]) -> None:
    """Raise ValueError where a class is nowhere to be learnt from."""
    histograms = [np.bincount(case.label.ravel(), minlength=len(class_names)) for case in labelled]
    for name, count in zip(class_names, np.sum(histograms, axis=0), strict=True):
        if not count:
            raise ValueError(
                f"the {len(labelled)} labelled cases hold no voxel of the class {name!r}, so it cannot be learnt, "
                "accepted are labelled cases (dataset.labelled) that show every class"
            )


@contextmanager
def _metrics_log(
    run: RunDirectory | None,
    sizes: Mapping[str, int] | None,  # of its files where it is resumed
) -> Iterator[MetricsLog | None]:
    """The log of the process that writes; a loss that is not finite then also names the checkpoint that is left."""
    if run is None:
        yield None
        return
    with MetricsLog(run, sizes) as log:
        try:
            yield log
        except FloatingPointError as error:
            if not run.training_state.is_file():  # before the first step
                raise
            raise FloatingPointError(
                f"{error}; the last good checkpoint is {run.training_state}, "
                f"of iteration {saved_iteration(run.training_state)}"
            ) from None


def _sampler(
    config: Config,
    stage: Stage,
    tensors: TrainingTensors,
    augmentation: Augmentation,
    number: int,
    processes: Processes,
) -> TrainingSampler:
    training = config.training
    return TrainingSampler(
        tensors,
        augmentation,
        training.labelled_batch,
        training.unlabelled_batch if stage.uses_unlabelled else 0,
        seed=derived_seed(config.seed, STAGES, number),
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
        fused=True,
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
        if self.split is not None:
            dataset.evaluation_cases(self.split)  # what is missing is found here

    def due(self, iteration: int, total: int) -> bool:
        """Whether to evaluate after an iteration (counted from 1) of `total`: every so many, and after the last."""
        interval = self.config.evaluation.validation_interval
        return self.split is not None and (iteration == total or (interval > 0 and iteration % interval == 0))

    def evaluate(self, method: Method, run: RunDirectory, iteration: int) -> float:
        """Mean Dice on the split; writes the checkpoint where it is the best so far."""
        assert self.split is not None
        config = validation_config(self.config)
        dice = split_dice(method, self.dataset, self.split, config, self.device)
        if dice > self.best:
            self.best = dice
            save_checkpoint(run.checkpoint(self.split), method, iteration=iteration, dice=dice)
        return dice
