"""From folders of images and labels to the files that training reads, and configurations to train with."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import yaml

from semiseg.atomic import write_text
from semiseg.data.augmentation import resize
from semiseg.data.description import DatasetDescription
from semiseg.data.own import DESCRIPTION, OwnData
from semiseg.data.preprocessing import Intensity, Preprocessing
from semiseg.data.volumes import TEST_LIST, TRAINING_LIST, VALIDATION_LIST
from semiseg.preparation.checks import as_classes
from semiseg.preparation.file_names import is_picture
from semiseg.preparation.layout import (
    check_new,
    is_listable,
    note,
    progress,
    whole_folder,
    write_case,
    write_list,
)
from semiseg.preparation.plan import Plan, array_spacing, configurations, plan, trained_axes
from semiseg.preparation.scan_folders import divide, find_scans, join_patients
from semiseg.preparation.splits import LabelledScan, Scan, Splits
from semiseg.preparation.survey import (
    ORIENTATION,
    PICTURE,
    Facts,
    findings,
    guess_modalities,
    read_image,
    read_label,
    survey,
)
from semiseg.preparation.volume import Volume, on_grid_of, prepared_channels, resample_label, sides
from semiseg.preparation.volume_files import read_channel_headers, read_header

FINDINGS = "findings.md"
LIST_NAMES = {VALIDATION_LIST: "for validation", TEST_LIST: "for the test"}
MOST_CLASSES = 255
MANY_CLASSES = 64  # more are rather an image's intensities
FAR_APART = 3  # times their pixels' distance: slices that have little to do with each other
SWAPPED = "is the folder of the labels one of images?"
HEADER = (
    "# Written by `python -m semiseg.prepare own`; every key may be changed, here or on the command line.\n"
)


@dataclass(frozen=True)
class Choices:
    """What can be asked for; None leaves it to the data."""

    test: int | Path | None = None  # patients, or the file of a list of cases
    validation: int | Path | None = None
    labelled: int | Path | None = None  # training cases whose labels are used
    # regular expression: a scan's patient is what it matches at the start of its name
    patient: str | None = None
    classes: Sequence[str] | None = None  # names, in the order of the labels' values
    modality: tuple[str, ...] | None = None  # ct or mr, one for all channels or one a channel
    spacing: tuple[float, ...] | None = None  # mm; of slices down and along their rows
    dimensions: int = 3  # 2: to be trained on slice by slice, as pictures always are
    size: tuple[int, int] | None = None  # rows and columns that pictures are resized to
    mirror: tuple[int, ...] = ()  # axes (right, anterior, superior) to mirror every label along
    check_alignment: bool = True


def prepare_own(
    images: Path,
    labels: Path,
    dest: Path,
    choices: Choices,
) -> None:
    """Check every scan, print what was found and chosen, and write cases, lists and configurations.

    `dest` appears whole or not.
    Raises ValueError or FileNotFoundError for what is missing, malformed or contradicts itself, before anything is
    written.
    """
    check_new(dest)
    if choices.classes is not None:
        check_class_names(choices.classes)
    dest = dest.resolve()
    labelled, unlabelled = find_scans(images, labels, choices.patient)
    scans = [*labelled, *unlabelled]
    choices = checked_for_pictures(choices, is_picture(scans[0].image))
    # Impossible choices, and what headers tell, end here, not after every scan has been read.
    divide(labelled, choices.test, choices.validation, choices.labelled)
    modalities = modality_of_channels(choices.modality, check_headers(scans, choices))
    facts = survey(scans, choices.mirror, choices.check_alignment)
    classes = name_classes([one for one in facts if one.voxels], choices.classes)
    if is_picture(scans[0].image):
        modalities = [PICTURE] * len(facts[0].lowest)
    modalities = modalities or guess_modalities(facts)
    found = findings(facts, classes, modalities)
    print(f"{found}\n")

    division = _division(labelled, unlabelled, facts, choices)
    by_name = {one.name: one for one in facts}
    used = [by_name[scan.name] for scan in division.splits[TRAINING_LIST][: division.labelled]]
    check_classes(used, classes)
    names = {scan.name for scan in division.scans}
    kept = [one for one in facts if one.name in names]
    class_names = ("background", *classes.values())
    chosen = plan(kept, used, class_names, modalities, choices.spacing, choices.dimensions, choices.size)
    origin = "as asked for" if choices.modality else "guessed from the lowest intensities"
    modality = "none, pictures" if chosen.is_resized else f"{', '.join(modalities)} ({origin})"
    decision = _decisions(chosen, modality, kept, division.counts)
    print(f"{decision}\n")

    check_memory(division.scans, chosen.preprocessing, chosen.dimensions)
    with whole_folder(dest) as folder:
        _write_cases(folder, division, chosen, classes, choices.mirror)
        write_text(folder / FINDINGS, f"{found}\n\n{decision}\n")
        validated = VALIDATION_LIST in division.splits
        written = configurations(chosen, dest, division.labelled, division.unlabelled, validated)
        for method, configuration in written.items():
            text = yaml.safe_dump(configuration, sort_keys=False, default_flow_style=None, allow_unicode=True)
            write_text(folder / f"{method}.yaml", HEADER + text)
    commands = [f"python -m semiseg.train --config {shlex.quote(str(path))}" for path in dest.glob("*.yaml")]
    print("\n".join([f"Written to {dest}. Train with one of", *sorted(commands)]))


@dataclass(frozen=True)
class Division:
    """The scans that are written, and the list each goes to."""

    splits: Splits  # the scans with labels, by list
    without_label: Sequence[Scan]  # for the training list too
    labelled: int  # scans of the training list, its first, whose labels are used

    @property
    def scans(self) -> list[Scan]:
        """All of them, those with labels first."""
        return [*(scan for members in self.splits.values() for scan in members), *self.without_label]

    @property
    def unlabelled(self) -> int:
        """Scans to train on whose labels are not used or not there."""
        return len(self.splits[TRAINING_LIST]) - self.labelled + len(self.without_label)

    @property
    def counts(self) -> dict[str, int]:
        """How many scans are for what, in words."""
        evaluated = {LIST_NAMES[name]: len(self.splits[name]) for name in self.splits if name != TRAINING_LIST}
        return {"labelled to train on": self.labelled, "unlabelled": self.unlabelled, **evaluated}


def _division(
    labelled: Sequence[LabelledScan],
    unlabelled: Sequence[Scan],
    facts: Sequence[Facts],  # of both
    choices: Choices,
) -> Division:
    """Divide so that no patient, nor an image under another name, is both trained and evaluated on."""
    patients = join_patients([*labelled, *unlabelled], {one.name: one.fingerprint for one in facts})
    labelled = [replace(scan, patient=patients[scan.name]) for scan in labelled]
    splits, count = divide(labelled, choices.test, choices.validation, choices.labelled)
    evaluated = {scan.patient for name, scans in splits.items() if name != TRAINING_LIST for scan in scans}
    division = Division(splits, [scan for scan in unlabelled if patients[scan.name] not in evaluated], count)
    names = {scan.name for scan in division.scans}
    note(
        [one.name for one in facts if one.name not in names],
        "scans are left out, since another one of their patient is for evaluation",
    )
    return division


def _write_cases(
    folder: Path,
    division: Division,
    plan: Plan,
    classes: Mapping[int, str],  # name of every value of the labels, without background
    mirror: tuple[int, ...],  # turned axes to mirror every label along
) -> None:
    """Write the description, the cases and their lists."""
    numbers = {0: 0, **{value: number for number, value in enumerate(classes, start=1)}}
    class_names = ("background", *classes.values())
    DatasetDescription(class_names, plan.dimensions, plan.preprocessing, tuple(numbers)).save(folder / DESCRIPTION)
    dataset = OwnData(folder)
    vanished = []
    used = {scan.name for scan in division.splits[TRAINING_LIST][: division.labelled]}
    learnt: set[int] = set()
    for scan in progress(division.scans, "writing"):
        lost, left = _write_case(dataset.path(scan.name), scan, plan, numbers, mirror)
        vanished += [f"{scan.name} ({class_names[number]})" for number in lost]
        if scan.name in used:
            learnt.update(left)
    chosen, better = ("size", "larger") if plan.is_resized else ("spacing", "finer")
    note(vanished, f"structures have no voxel left at the {chosen} chosen")
    for number, name in enumerate(classes.values(), start=1):
        if number not in learnt:
            raise ValueError(
                f"--{chosen} leaves no voxel of {name} in the {len(used)} cases to learn from, accepted is a {better} one"
            )
    for list_name, members in division.splits.items():
        others = division.without_label if list_name == TRAINING_LIST else []
        write_list(folder / list_name, (scan.name for scan in (*members, *others)))


def check_headers(
    scans: Sequence[Scan],
    choices: Choices,
) -> int:
    """The number of channels that all images have.

    Raises ValueError, naming the file, for headers that cannot be read, another number of channels than the first image
    has, a label on another grid than its image, or an image that takes more memory at the spacing that is asked for than
    the machine has.
    """
    num_channels = 0
    for scan in scans:
        channels = read_channel_headers(scan.images)
        num_channels = num_channels or len(channels)
        if len(channels) != num_channels:
            raise ValueError(
                f"{scan.image}: the number of channels is {len(channels)}, accepted is that of {scans[0].image}, "
                f"{num_channels}"
            )
        if isinstance(scan, LabelledScan):
            on_grid_of(channels[0], read_header(scan.label))
    if choices.spacing is not None:
        try:
            check_memory(scans, Preprocessing(None, array_spacing(choices.spacing)), choices.dimensions)
        except ValueError as error:
            raise ValueError(f"--spacing is {sides(choices.spacing)}: {error}") from None
    return num_channels


def checked_for_pictures(choices: Choices, are_pictures: bool) -> Choices:
    """What was asked for, of pictures in two dimensions. Raises ValueError for what only volumes or pictures have."""
    of_the_other = {"spacing": choices.spacing, "modality": choices.modality} if are_pictures else {"size": choices.size}
    for name, given in of_the_other.items():
        if given is not None:
            raise ValueError(
                f"--{name} is {' '.join(map(str, given))}, accepted for {'pictures' if are_pictures else 'volumes'} is none"
            )
    return replace(choices, dimensions=2) if are_pictures else choices


def modality_of_channels(modality: Sequence[str] | None, num_channels: int) -> Sequence[str] | None:
    """One a channel, where any was asked for. Raises ValueError for another number than one or that of the channels."""
    if modality is None or len(modality) == num_channels:
        return modality
    if len(modality) > 1:
        raise ValueError(
            f"--modality is {' '.join(modality)}, accepted are one for all channels, or one for each of {num_channels}"
        )
    return list(modality) * num_channels


def check_memory(scans: Sequence[Scan], preprocessing: Preprocessing, dimensions: int) -> None:
    """Raise ValueError, naming the image, where one takes more memory at the spacing than the machine has."""
    for scan in scans:
        image = as_trained(read_channel_headers(scan.images)[0].turned(ORIENTATION), dimensions)
        image.check_memory(preprocessing.spacing_of(image.spacing))


def as_trained(volume: Volume, dimensions: int) -> Volume:
    """A turned scan, or its label: of two dimensions as a stack of its own slices."""
    return volume if dimensions == 3 else volume.turned(volume.slice_orientation)


def check_class_names(names: Sequence[str]) -> None:
    """Raise ValueError where two classes have one name, one has none, or a name is background or no single line."""
    if len({"background", *names}) <= len(names) or not all(name.strip() and is_listable(name) for name in names):
        raise ValueError(
            f"--classes is {shlex.join(names)!r}, accepted are distinct names in UTF-8 without line breaks and control "
            "characters, none of them background"
        )


def name_classes(labelled: Sequence[Facts], names: Sequence[str] | None) -> dict[int, str]:
    """Name of every value of the labels in order, without background.

    Raises ValueError where there are no values, more than a label can have classes, or another number of names than of
    values.
    """
    values = sorted({value for one in labelled for value in one.voxels} - {0})
    if not values:
        raise ValueError(f"the {len(labelled)} labels hold no value besides 0; expected some foreground")
    if len(values) > MOST_CLASSES:
        raise ValueError(
            f"the labels hold {len(values)} values besides 0; expected up to {MOST_CLASSES} classes: {SWAPPED}"
        )
    if names is None:
        names = [f"class {number}" for number in range(1, len(values) + 1)]
    if len(names) != len(values):
        holders = {value: [one.name for one in labelled if value in one.voxels] for value in values}
        rarest = min(values, key=lambda value: len(holders[value]))
        raise ValueError(
            f"--classes names {len(names)} classes, but the labels hold {len(values)} values besides 0: "
            f"{', '.join(map(str, values))}; the rarest is {rarest}, e.g. in {holders[rarest][0]}"
        )
    return dict(zip(values, names, strict=True))


def check_classes(
    used: Sequence[Facts],  # whose labels are trained on
    classes: Mapping[int, str],
) -> None:
    """Raise ValueError where a class is nowhere to be learnt from."""
    remedy = SWAPPED if len(classes) > MANY_CLASSES else "choose them with --labelled and --test"
    for value, name in classes.items():
        if not any(value in one.voxels for one in used):
            raise ValueError(
                f"the {len(used)} cases to learn from hold no voxel of {name} (value {value}), accepted are cases that "
                f"show every class: {remedy}"
            )


def _write_case(
    path: Path,
    scan: Scan,
    plan: Plan,
    numbers: Mapping[int, int],  # value in the label files -> class
    mirror: tuple[int, ...],  # turned axes to mirror the label along
) -> tuple[Sequence[int], Sequence[int]]:
    """Write image and label as they are trained on; return the classes that resampling leaves no voxel of, and the others.

    Raises ValueError where it leaves nothing labelled.
    """
    stored, turned = read_image(scan)
    channels = [as_trained(channel, plan.dimensions) for channel in turned]
    image = channels[0]
    spacing = plan.preprocessing.spacing_of(image.spacing)
    label, lost, left = None, [], []
    if isinstance(scan, LabelledScan):
        values = replace(turned[0], path=scan.label, values=read_label(scan, stored[0], mirror))
        label = as_classes(as_trained(values, plan.dimensions), numbers)
        shown = np.unique(label)
        if plan.is_resized:
            label = resize(torch.from_numpy(label), plan.patch).numpy()
        elif not image.has_spacing(spacing):
            label = resample_label(label, image.spacing, spacing)
        lost, left = np.setdiff1d(shown, label).tolist(), np.unique(label).tolist()
        if not (label.any() or plan.is_resized):
            raise ValueError(f"{scan.label}: nothing labelled is left at {sides(spacing)} mm")
    own_spacing = spacing if plan.dimensions == 2 and not plan.is_resized else None
    prepared = prepared_channels(channels, plan.preprocessing)
    if plan.is_resized:
        prepared = resize(torch.from_numpy(prepared[:, 0]), plan.patch).numpy()[:, None]
    write_case(path, prepared if len(prepared) > 1 else prepared[0], label, own_spacing)
    return lost, left


def _decisions(
    chosen: Plan,
    modality: str,
    cases: Sequence[Facts],  # all that are written
    counts: Mapping[str, int],
) -> str:
    preprocessing = chosen.preprocessing
    spacing = sides(size for size in preprocessing.spacing or () if size is not None)
    voxels = 0.0
    for one in cases:
        given = tuple(one.spacing[axis] for axis in trained_axes(one, chosen.dimensions))
        voxels += math.prod(one.shape) * math.prod(given) / math.prod(preprocessing.spacing_of(given))
    if chosen.is_resized:
        voxels = len(cases) * math.prod(chosen.patch)
    geometry = f"axes to the right, anterior and superior; spacing {spacing} mm, by interpolation"
    if chosen.dimensions == 2:
        geometry = f"slices as they lie, across the coarsest axis; pixels of {spacing} mm, by interpolation"
    if chosen.is_resized:
        geometry = f"all pictures resized to {sides(chosen.patch)} pixels, rows and columns"
    lines = [
        "Chosen:",
        f"- modality: {modality}",
        f"- {geometry}",
        f"- intensities: {'; '.join(dict.fromkeys(map(_scaling, preprocessing.channels)))}",
        f"- patch: {sides(chosen.patch)} voxels, augmentation {chosen.augmentation}",
        f"- cases: {', '.join(f'{count} {what}' for what, count in counts.items())}",
        f"- all cases in memory take {voxels * 4 * len(preprocessing.channels) / 2**30:.2g} GB",
    ]
    *_, middle, coarsest = sorted(np.median([one.spacing for one in cases], axis=0))
    if chosen.dimensions == 3 and coarsest > FAR_APART * middle:
        lines.append(
            f"- slices lie {coarsest / middle:.2g} times as far apart as pixels: --slices prepares for a 2D network"
        )
    return "\n".join(lines)


def _scaling(channel: Intensity) -> str:
    if channel.kind == "standardise":
        return "mean 0 and deviation 1 of every scan"
    if channel.clip is None:
        return f"divided by {channel.deviation:g}"
    return (
        f"cut off at {channel.clip[0]:g} and {channel.clip[1]:g}, the percentiles of the labelled voxels, then less "
        f"{channel.mean:g} and divided by {channel.deviation:g}"
    )
