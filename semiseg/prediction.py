"""A trained network applied to new scans: from a scanner's file to a segmentation on that file's grid."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from torch import Tensor
from tqdm import tqdm

from semiseg.config import overridden
from semiseg.data.description import DatasetDescription
from semiseg.data.preprocessing import BRIGHTEST, EIGHT_BITS
from semiseg.engine.checkpoint import load_checkpoint
from semiseg.engine.run_directory import RunDirectory
from semiseg.engine.trainer import build_method, choose_device
from semiseg.errors import first_line, is_out_of_memory
from semiseg.evaluation.evaluator import class_map, evaluation_batch, probability_slabs
from semiseg.models.folding import fold_batch_norm
from semiseg.preparation.volume import Volume, prepared_channels, resampled_shape, sides
from semiseg.preparation.volume_files import on_one_grid, read_volumes, write_mask, write_nifti
from semiseg_kernels import largest_components

PREDICTED_WITH = ("evaluation", "training.precision", "training.device")
FAR_SPACING = 1.5  # times the training's, beyond which a header is doubted


@dataclass(frozen=True)
class Segmentation:
    """What a network made of a scan, voxel by voxel of the scan's own file."""

    classes: np.ndarray  # [x, y, z] uint8
    probabilities: np.ndarray | None  # [x, y, z, C] float32, where they were asked for
    affine: np.ndarray  # [4, 4], of the scan's file
    class_names: tuple[str, ...]  # background first
    label_values: tuple[int, ...] | None = None  # that stand for the classes in files; None: their numbers

    def save(self, path: str | Path) -> None:
        """Write the labels on the grid of the scan, uint8, or uint16 where a value is above 255.

        As NIfTI (.nii.gz, .nii), MetaImage (.mha) or, of one slice, PNG. A file that exists is replaced. ValueError for a
        name of another ending.
        """
        labels = self.classes
        if self.label_values is not None:
            labels = np.array(self.label_values, np.min_scalar_type(max(self.label_values)))[labels]
        write_mask(Path(path), labels, self.affine)

    def save_probabilities(self, path: str | Path) -> None:
        """Write the probabilities as NIfTI, float32, the classes along a fourth axis. ValueError without them, and for a
        name of another ending."""
        if self.probabilities is None:
            raise ValueError("probabilities is None, accepted are those of predict(..., probabilities=True)")
        write_nifti(Path(path), self.probabilities, self.affine)


class Predictor:
    """The trained network of a run directory, which is all it needs.

    overrides: `section.key=value`, of the keys of evaluation, training.precision and training.device.
    Raises FileNotFoundError where the run or its checkpoint is missing, ValueError where it is not finished, a file
    is damaged or an override is none of these.
    """

    def __init__(self, run: str | Path, overrides: Iterable[str] = ()):
        directory, config = RunDirectory.open(Path(run))
        directory.check_finished()
        self.config = overridden(config, overrides, PREDICTED_WITH)
        self.description = DatasetDescription.load(directory.dataset)
        self.device = choose_device(self.config.training.device)
        num_classes = len(self.description.class_names)
        num_channels = len(self.description.preprocessing.channels)
        self.method = build_method(self.config, num_classes, self.device, directory.load_text(), num_channels)
        checkpoint = directory.checkpoint(self.config.evaluation.select)
        self.iteration = int(load_checkpoint(checkpoint, self.method, self.device)["iteration"])
        self.method.eval()
        if (
            self.config.dataset.name == "pancreas"
            and self.description.preprocessing.channels[0].kind == "standardise"
        ):
            warnings.warn(
                f"{run}: its training scans were cropped around the organ before their intensities were standardised; "
                "a scan that is not cropped alike comes out wrong, unless the network is trained on what this version "
                "of `python -m semiseg.prepare pancreas` writes",
                stacklevel=2,
            )

    def predict(
        self,
        # A file, or a folder with one DICOM series; of several channels in one file each, all in their order.
        scan: str | Path | Volume | Sequence[str | Path | Volume],
        *,
        spacing: Sequence[float] | None = None,  # mm along each axis of the file, where its header is wrong
        probabilities: bool = False,
        progress: bool = False,
    ) -> Segmentation:
        """Segment a scan. Memory: some bytes a voxel, and 4 a voxel and class with `probabilities`.

        Warns where the scan is resampled from a spacing far from the training's, or smaller than the patch.
        Raises FileNotFoundError where there is no scan, ValueError where it cannot be read, has another number of channels
        than the training's, holds NaN, is brighter than a picture of 8 bits where the training's were such, or takes more
        memory than there is, and for a spacing that is not three positive numbers.
        """
        files = [scan] if isinstance(scan, str | Path | Volume) else list(scan)
        try:
            return self._segmentation(files, spacing, probabilities, progress)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            path = files[0].path if isinstance(files[0], Volume) else files[0]
            batch = evaluation_batch(self.config)
            advice = f"; less is taken by an evaluation.batch below {batch}" if batch > 1 else ""
            raise ValueError(f"{path}: out of memory on {self.device} ({first_line(error)}){advice}") from None

    def _segmentation(
        self,
        files: Sequence[str | Path | Volume],
        spacing: Sequence[float] | None,
        probabilities: bool,
        progress: bool,
    ) -> Segmentation:
        channels = self._channels(files)
        affine = channels[0].affine
        channels = [_with_spacing(channel, spacing) for channel in channels]
        volume = channels[0]
        # Of the affine that is turned: at 45 degrees the other spacing's rounding can name the axes otherwise.
        file_axes = io_orientation(volume.affine)
        orientation = self.description.preprocessing.orientation
        if self.config.network.dimensions == 2:
            # The slices of an oblique stack may be nearest to any plane of the body. Cut along another one, they are
            # nothing a 2D network knows; along its own it shows the picture that was acquired.
            orientation = volume.slice_orientation
        training_axes = file_axes if orientation is None else axcodes2ornt(orientation)
        channels = [channel.turned(orientation) for channel in channels]
        path, shape = channels[0].path, channels[0].values.shape
        image, steps = self._prepared(channels)
        del files, volume, channels  # the intensities of the files are not needed while the network runs

        bar = functools.partial(
            tqdm, desc=path.name, unit="batch", leave=False, dynamic_ncols=True, disable=not progress
        )
        slabs = probability_slabs(fold_batch_norm(self.method), image, self.config, self.device, bar)
        if any(step != 1 for step in steps):
            slabs = resampled_slabs(slabs, image.shape[1:], shape, steps)
        classes, kept = self._collected(slabs, shape, probabilities)
        if self.config.evaluation.largest_component:
            classes = largest_components(torch.from_numpy(classes)[None], self.method.num_classes)[0].numpy()
        turn_back = ornt_transform(training_axes, file_axes)
        return Segmentation(
            apply_orientation(classes, turn_back),
            None if kept is None else apply_orientation(np.moveaxis(kept, 0, -1), turn_back),
            affine,
            self.description.class_names,
            self.description.label_values,
        )

    def _channels(self, files: Sequence[str | Path | Volume]) -> list[Volume]:
        read = ([file] if isinstance(file, Volume) else read_volumes(Path(file)) for file in files)
        channels = on_one_grid([channel for volumes in read for channel in volumes])
        check_channels(channels, len(self.description.preprocessing.channels))
        return channels

    def _prepared(self, channels: Sequence[Volume]) -> tuple[np.ndarray, list[float]]:
        """The image [M, *S] float32 as the network sees it, and its voxels per voxel of the scan along each axis."""
        preprocessing, volume = self.description.preprocessing, channels[0]
        wanted, given = preprocessing.spacing_of(volume.spacing), volume.spacing
        for channel, intensity in zip(channels, preprocessing.channels, strict=True):
            if not np.isfinite(channel.values).all():
                raise ValueError(f"{channel.path}: holds NaN or infinity; expected finite intensities")
            if intensity == EIGHT_BITS and (channel.values.min() < 0 or channel.values.max() > BRIGHTEST):
                raise ValueError(
                    f"{channel.path}: its values go from {channel.values.min():g} to {channel.values.max():g}; expected "
                    f"0 to {BRIGHTEST:g}, as of the pictures of 8 bits that were trained on"
                )
        steps = [1.0] * 3
        shape = volume.values.shape
        if not volume.has_spacing(wanted):
            steps = [old / new for old, new in zip(given, wanted, strict=True)]
            shape = resampled_shape(shape, given, wanted)
        self._warn(volume.path, given, wanted, shape)  # before a wrong header can exhaust the memory
        return prepared_channels(channels, preprocessing), steps

    def _collected(
        self,
        slabs: Iterable[Tensor],  # [C, n, *S[1:]]
        shape: Sequence[int],  # S
        probabilities: bool,
    ) -> tuple[np.ndarray, np.ndarray | None]:  # [*S] uint8, [C, *S] float32
        classes = np.empty(shape, np.uint8)
        kept = np.empty((self.method.num_classes, *shape), np.float32) if probabilities else None
        first = 0
        for slab in slabs:
            planes = slice(first, first + slab.shape[1])
            classes[planes] = class_map(slab).cpu()
            if kept is not None:
                kept[:, planes] = slab.cpu()
            first = planes.stop
        return classes, kept

    def _warn(
        self, path: Path, spacing: Sequence[float], trained: Sequence[float], shape: Sequence[int]
    ) -> None:
        ratios = np.divide(spacing, trained)
        if max(ratios.max(), 1 / ratios.min()) > FAR_SPACING:
            warnings.warn(
                f"{path}: voxels of {sides(spacing)} mm are resampled to the training's {sides(trained)} mm; "
                "if the header is wrong, give the true size as spacing",
                stacklevel=3,
            )
        patch = self.config.training.patch_size
        if self.config.evaluation.stride is not None and any(
            side < least for side, least in zip(shape[-len(patch) :], patch, strict=True)
        ):
            warnings.warn(
                f"{path}: {sides(shape)} voxels at the training's spacing are fewer than a patch, "
                f"{sides(patch)}; the rest is filled with zeros",
                stacklevel=3,
            )


def resampled_slabs(
    slabs: Iterable[Tensor],  # [C, n, *S[1:]], one behind the other along the first axis
    source: Sequence[int],  # S
    shape: Sequence[int],  # G
    steps: Sequence[float],  # voxels of the source from one voxel to the next of the grid, along each axis
) -> Iterator[Tensor]:  # [C, 1, *G[1:]]
    """Interpolate linearly at the voxels of another grid with the same first corner, plane by plane."""
    along, *in_plane = (
        ((np.arange(count) + 0.5) * step - 0.5).clip(0, side - 1)
        for count, step, side in zip(shape, steps, source, strict=True)
    )
    wanted = 0
    previous: Tensor | None = None
    for index, plane in enumerate(plane for slab in slabs for plane in slab.unbind(1)):
        while wanted < len(along) and along[wanted] <= index:
            between = plane if previous is None else torch.lerp(previous, plane, along[wanted] - index + 1)
            for axis, positions in enumerate(in_plane, start=1):
                between = _interpolated(between, axis, positions)
            yield between.unsqueeze(1)
            wanted += 1
        previous = plane.clone()  # its slab may be overwritten


def _interpolated(values: Tensor, axis: int, positions: np.ndarray) -> Tensor:
    low = torch.from_numpy(np.floor(positions).astype(np.int64))
    high = (low + 1).clamp(max=values.shape[axis] - 1)
    weight = (torch.from_numpy(positions) - low).float().reshape(-1, *[1] * (values.ndim - axis - 1))
    low, high, weight = (part.to(values.device) for part in (low, high, weight))
    return torch.lerp(values.index_select(axis, low), values.index_select(axis, high), weight)


def check_channels(channels: Sequence[Volume], num_channels: int) -> None:
    """Raise ValueError unless a scan has the training's number of channels."""
    if len(channels) != num_channels:
        raise ValueError(
            f"{channels[0].path}: the number of channels is {len(channels)}, accepted is that of the training, {num_channels}"
        )


def check_spacing(spacing: Sequence[float]) -> None:
    """Raise ValueError unless a spacing is three positive numbers."""
    if len(spacing) != 3 or not all(0 < size < float("inf") for size in spacing):
        raise ValueError(f"spacing is {tuple(spacing)}, accepted are three positive numbers of mm")


def _with_spacing(volume: Volume, spacing: Sequence[float] | None) -> Volume:
    if spacing is None:
        return volume
    check_spacing(spacing)
    affine = volume.affine.copy()
    affine[:3, :3] *= np.divide(spacing, volume.spacing)
    return replace(volume, affine=affine)
