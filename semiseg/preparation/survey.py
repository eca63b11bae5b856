"""What is in a folder of scans: sizes, spacings, classes, and which cases look as if something were wrong."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from semiseg.evaluation.tables import markdown_table
from semiseg.preparation.checks import LabelPlacement, check_image
from semiseg.preparation.file_names import is_picture
from semiseg.preparation.layout import progress
from semiseg.preparation.splits import LabelledScan, Scan
from semiseg.preparation.volume import Volume, on_grid_of, sides
from semiseg.preparation.volume_files import read_channels, read_volume

ORIENTATION = "RAS"  # all scans are turned to it
PICTURE = "picture"  # the modality that is none
# Of the labels of pictures, what looks mirrored although it is not: of 337 slices of ACDC 3 %.
PICTURES_BY_CHANCE = 0.5
LARGEST_LABEL = 65535
WHOLE = 1e-3  # a label's value may differ from a whole number by so much, where its file scales it
FOREGROUND_SAMPLE = 20_000  # intensities a labelled scan
AIR = -500  # Hounsfield units; only computed tomography goes below
FAR = 2.0  # times the median, or half of it, is suspicious for a spacing or an extent
FEWEST_FOR_OUTLIERS = 5
DEVIATIONS = 3.5  # of a label's logarithmic volume from the median, in median absolute deviations scaled to σ


@dataclass(frozen=True)
class Facts:
    """What there is to know of one scan, its axes turned to `ORIENTATION`."""

    name: str
    stored_orientation: str
    shape: tuple[int, ...]
    spacing: tuple[float, ...]  # mm
    lowest: tuple[float, ...]  # intensity of every channel
    highest: tuple[float, ...]
    fingerprint: str  # the same for the same image
    voxels: Mapping[int, int]  # by value of the label, 0 included; empty without a label
    foreground: np.ndarray  # [M, n] float32, intensities of labelled voxels

    @property
    def extent(self) -> tuple[float, ...]:
        """Size in mm along each axis."""
        return tuple(side * size for side, size in zip(self.shape, self.spacing, strict=True))

    def millilitres(self, value: int) -> float:
        """Volume that a label's value takes."""
        return self.voxels.get(value, 0) * float(np.prod(self.spacing)) / 1000


def read_image(scan: Scan) -> tuple[list[Volume], list[Volume]]:
    """The channels as their files have them, on one grid, and turned.

    Raises ValueError for NaN, infinity, a channel of one intensity everywhere, of a picture all of them, and as
    `read_channels` does.
    """
    stored = read_channels(scan.images)
    coloured = [channel for channel in stored if channel.values.min() != channel.values.max()]
    for channel in coloured if coloured and is_picture(scan.image) else stored:
        check_image(channel)
    return stored, [channel.turned(ORIENTATION) for channel in stored]


def read_label(
    scan: LabelledScan,
    image: Volume,  # as its file has it
    mirror: tuple[int, ...],  # turned axes to mirror along
) -> np.ndarray:  # [x, y, z] uint16
    """The label's values on the grid of its image, turned.

    Raises ValueError where the grids differ, a value is no whole number from 0 to 65535 or nothing is labelled, which of
    pictures is nothing unusual.
    """
    # Turned by the affine of the image, as the image is.
    label = replace(on_grid_of(image, read_volume(scan.label)), affine=image.affine).turned(ORIENTATION)
    values = np.rint(label.values) if label.values.dtype.kind == "f" else label.values
    with np.errstate(invalid="ignore"):
        wrong = ~(np.abs(label.values - values) <= WHOLE) | (values < 0) | (values > LARGEST_LABEL)
    if wrong.any():
        raise ValueError(
            f"{scan.label}: holds the label {label.values[wrong][0]}; "
            f"expected whole numbers from 0 to {LARGEST_LABEL}"
        )
    if not (values.any() or is_picture(scan.image)):
        raise ValueError(f"{scan.label}: labels no voxel; expected some foreground")
    return np.flip(values.astype(np.uint16), mirror)


def survey(
    scans: Sequence[Scan],
    mirror: tuple[int, ...] = (),  # turned axes to mirror every label along
    check_alignment: bool = True,
) -> list[Facts]:
    """Read and check every scan and its label, one in memory at a time.

    Raises ValueError for what cannot be right: unreadable files, and what `read_image`, `read_label` and
    `LabelPlacement` refuse.
    """
    by_chance = PICTURES_BY_CHANCE if is_picture(scans[0].image) else 0.0
    placement = LabelPlacement(mirror, check_alignment, by_chance)
    facts: list[Facts] = []
    for scan in progress(scans, "checking"):  # no comprehension: an error in one leaves the bar's line open
        facts.append(_facts(scan, mirror, placement))
    placement.finish()
    return facts


def _facts(scan: Scan, mirror: tuple[int, ...], placement: LabelPlacement) -> Facts:
    """Read and check a scan and its label, of which nothing stays in memory but a sample."""
    stored, channels = read_image(scan)
    image = channels[0]
    voxels: dict[int, int] = {}
    foreground = np.empty((len(channels), 0), np.float32)
    if isinstance(scan, LabelledScan):
        label = read_label(scan, stored[0], mirror)
        counts = np.bincount(label.ravel())
        voxels = {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
        sample = np.flatnonzero(label)
        sample = sample[:: max(1, len(sample) // FOREGROUND_SAMPLE)]
        foreground = np.stack([channel.values.flat[sample].astype(np.float32) for channel in channels])
        numbers = np.cumsum(counts > 0) - (counts[0] > 0)  # of the values in order, background 0
        classes = numbers.astype(np.uint8)[label]
        placement.look_at(scan.name, image, classes, read_volume(scan.label), stored[0].orientation)
    return Facts(
        scan.name,
        stored[0].orientation,
        image.values.shape,
        image.spacing,
        tuple(float(channel.values.min()) for channel in channels),
        tuple(float(channel.values.max()) for channel in channels),
        _fingerprint(channels),
        voxels,
        foreground,
    )


def guess_modalities(facts: Sequence[Facts]) -> list[str]:
    """Of every channel `ct` where most scans reach the density of air, else `mr`."""
    reaching = (np.array([one.lowest for one in facts]) < AIR).mean(axis=0)
    return ["ct" if share > 0.5 else "mr" for share in reaching]


def duplicates(facts: Sequence[Facts]) -> list[list[str]]:
    """Names of the scans that hold the same image, group by group."""
    groups: dict[str, list[str]] = {}
    for one in facts:
        groups.setdefault(one.fingerprint, []).append(one.name)
    return [names for names in groups.values() if len(names) > 1]


def suspicious(
    facts: Sequence[Facts],
    classes: Mapping[int, str],  # name by the label's value, without background
    modalities: Sequence[str],  # one a channel
) -> list[str]:
    """A line for everything that is possible but rarely meant."""
    lines = [f"the same image: {', '.join(names)}" for names in duplicates(facts)]
    spacings, extents = np.array([one.spacing for one in facts]), np.array([one.extent for one in facts])
    are_pictures = PICTURE in modalities
    measured = [("size", "pixels", extents)] if are_pictures else [("spacing", "mm", spacings), ("extent", "mm", extents)]
    for what, unit, values in measured:
        median = np.median(values, axis=0)
        far = (np.maximum(values / median, median / values) > FAR).any(axis=1)
        lines += [
            f"{one.name}: {what} {sides(value)} {unit}, the median is {sides(median)}"
            for one, value, is_far in zip(facts, values, far, strict=True)
            if is_far
        ]
    lines += [
        f"{one.name}{f', channel {number}' if len(modalities) > 1 else ''}: its lowest intensity is {lowest:.4g}, which "
        f"is not what {modality.upper()} looks like"
        for one in facts
        for number, (lowest, modality) in enumerate(zip(one.lowest, modalities, strict=True))
        if (lowest < AIR) != (modality == "ct")
    ]
    labelled = [one for one in facts if one.voxels]
    for value, name in {} if are_pictures else classes.items():  # of which any may show any class, or none
        lines += [f"{one.name}: no voxel of {name}" for one in labelled if value not in one.voxels]
        there = [one for one in labelled if value in one.voxels]
        lines += [
            f"{one.name}: {one.millilitres(value):.3g} ml of {name}, the median is {median:.3g} ml"
            for one, median in _outliers(there, value)
        ]
    return lines


def _outliers(facts: Sequence[Facts], value: int) -> Iterable[tuple[Facts, float]]:
    if len(facts) < FEWEST_FOR_OUTLIERS:
        return []
    volumes = np.log([one.millilitres(value) for one in facts])
    distances = np.abs(volumes - np.median(volumes))
    limit = max(DEVIATIONS * 1.4826 * float(np.median(distances)), np.log(FAR))
    median = float(np.exp(np.median(volumes)))
    return [(one, median) for one, far in zip(facts, distances > limit, strict=True) if far]


def findings(
    facts: Sequence[Facts],
    classes: Mapping[int, str],  # name by the label's value, without background
    modalities: Sequence[str],  # one a channel
) -> str:
    """Tables of sizes, spacings and classes, and the suspicious cases; Markdown."""
    labelled = [one for one in facts if one.voxels]
    orientations = Counter(one.stored_orientation for one in facts)
    are_pictures = PICTURE in modalities
    measures = [["" if are_pictures else "axes to the right, anterior, superior", "smallest", "median", "largest"]]
    shapes = np.array([one.shape for one in facts])
    for what, values in (
        [("columns, rows", shapes[:, :2])]
        if are_pictures
        else [
            ("voxels", shapes),
            ("spacing [mm]", np.array([one.spacing for one in facts])),
            ("extent [mm]", np.array([one.extent for one in facts])),
        ]
    ):
        measures.append([what, *(sides(way(values, axis=0)) for way in (np.min, np.median, np.max))])
    total = sum(sum(one.voxels.values()) for one in labelled)
    unit = "pixels" if are_pictures else "ml"
    rows = [
        ["class", "value", "cases", "share of voxels [%]", *(f"{way} [{unit}]" for way in ("smallest", "median", "largest"))]
    ]
    for value, name in {0: "background", **classes}.items():
        amounts = [
            one.voxels[value] if are_pictures else one.millilitres(value) for one in labelled if value in one.voxels
        ]
        share = 100 * sum(one.voxels.get(value, 0) for one in labelled) / total
        statistics = [f"{way(amounts):.4g}" if amounts else "-" for way in (np.min, np.median, np.max)]
        rows.append([name, str(value), str(len(amounts)), f"{share:.3g}", *statistics])
    odd = suspicious(facts, classes, modalities)
    channels = f" of {len(modalities)} channels" if len(modalities) > 1 else ""
    stored = ", ".join(f"{name} ({count})" for name, count in orientations.most_common())
    axes = "" if are_pictures else f"; axes as stored lead to {stored}"
    return "\n\n".join(
        [
            f"{len(facts)} images{channels}, {len(labelled)} of them labelled{axes}",
            markdown_table(measures),
            markdown_table(rows),
            "\n".join(["Suspicious, look at them:", *(f"- {line}" for line in odd)])
            if odd
            else "Nothing suspicious.",
        ]
    )


def _fingerprint(channels: Sequence[Volume]) -> str:
    digest = hashlib.sha256(str((len(channels), *channels[0].values.shape)).encode())
    for channel in channels:
        digest.update(np.ascontiguousarray(channel.values, np.float32).ravel().data)
    return digest.hexdigest()
