"""`python -m semiseg.prepare la|acdc|pancreas SOURCE DEST`, or `own IMAGES LABELS DEST` for data of one's own: write
the HDF5 files that training reads."""

from __future__ import annotations

import argparse
from pathlib import Path

from semiseg.commands import command
from semiseg.models.vnet import SIDE_MULTIPLE
from semiseg.preparation import CHALLENGES, Choices, prepare, prepare_own

SOURCES = {
    "la": "2018 Atrial Segmentation Challenge, the folder with <id>/lgemri.nrrd and laendo.nrrd",
    "acdc": "Automated Cardiac Diagnosis Challenge, the folder with patientNNN/",
    "pancreas": "Pancreas-CT, a folder with PANCREAS_NNNN/ (DICOM) and labelNNNN.nii.gz anywhere below",
}
OWN = "scans of one's own in NIfTI, NRRD, MetaImage, DICOM or pictures, some of them labelled"


@command
def main(arguments: list[str] | None = None) -> None:
    """Check every scan, then write the cases and their lists."""
    parser = argparse.ArgumentParser("python -m semiseg.prepare", description=__doc__)
    datasets = parser.add_subparsers(dest="dataset", required=True, metavar="la|acdc|pancreas|own")
    for name, what in SOURCES.items():
        _add_challenge(datasets.add_parser(name, help=what, description=what))
    _add_own(datasets.add_parser("own", aliases=["nifti"], help=OWN, description=OWN))
    options = parser.parse_args(arguments)
    if set(options.flip_labels) - set("xyz") or len(set(options.flip_labels)) < len(options.flip_labels):
        raise ValueError(f"--flip-labels is {options.flip_labels!r}, accepted are x, y, z, each once")
    mirror = tuple("xyz".index(axis) for axis in options.flip_labels)
    if options.dataset in CHALLENGES:
        _prepare_challenge(options, mirror)
    else:
        _prepare_own(options, mirror)


def _add_challenge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="what the challenge hands out")
    parser.add_argument("dest", type=Path, help="a new folder, e.g. $SEMISEG_DATA/LA")
    parser.add_argument(
        "--lists", type=Path, metavar="FOLDER",
        help="folder of train.list, test.list (ACDC: and val.list) that say which case goes where; "
        "without it patients are divided here, in the usual numbers",
    )  # fmt: skip
    _add_flip(parser, "x (right to left), y (anterior to posterior), z (inferior to superior)")


def _add_own(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images", type=Path,
        help="folder of images: NIfTI, NRRD or MetaImage files (.nii.gz, .nii, .nrrd, .mha, .mhd), a folder with a DICOM "
        "series for every case, or pictures (.png, .jpg, .bmp, .tif)",
    )  # fmt: skip
    parser.add_argument(
        "labels", type=Path,
        help="folder of labels for some of them, files of the same names; an image may end in _0000 (further channels in "
        "_0001 and so on), a label in _gt, _seg, _label or _mask",
    )  # fmt: skip
    parser.add_argument("dest", type=Path, help="a new folder")
    count_or_list = "NUMBER|FILE"
    parser.add_argument(
        "--labelled", "--labeled", type=_count_or_list, metavar=count_or_list,
        help="how many of the training cases count as labelled, or a file that names them, one a line; default: "
        "all that have a label",
    )  # fmt: skip
    parser.add_argument(
        "--test", type=_count_or_list, metavar=count_or_list,
        help="how many labelled patients to keep for the test, or a file that names the cases; default: one in five",
    )  # fmt: skip
    parser.add_argument(
        "--validation", type=_count_or_list, metavar=count_or_list, help="the same for validation; default: none"
    )  # fmt: skip
    parser.add_argument(
        "--patient", metavar="PATTERN",
        help=r"regular expression for the part of a name that tells the patient, e.g. 'patient\d+', so that scans of "
        "one patient stay together; default: every scan is another patient's",
    )  # fmt: skip
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="in the order of the labels' values above 0")
    parser.add_argument(
        "--modality", nargs="+", choices=("ct", "mr"),
        help="of all channels, or one for each; default: guessed from the intensities",
    )  # fmt: skip
    parser.add_argument(
        "--slices", action="store_true",
        help="train on slices by a 2D network, as on cine MR: where they lie far apart; default: on volumes",
    )  # fmt: skip
    parser.add_argument(
        "--spacing", nargs="+", type=float, metavar="MM",
        help="towards the right, anterior and superior, or with --slices from row to row and along the rows; default: "
        "the median",
    )  # fmt: skip
    parser.add_argument(
        "--size", nargs=2, type=int, metavar=("ROWS", "COLUMNS"),
        help="that pictures are resized to, multiples of 16; default: like the median, about 256 x 256 at most",
    )  # fmt: skip
    _add_flip(parser, "x (left to right), y (posterior to anterior), z (inferior to superior)")


def _add_flip(parser: argparse.ArgumentParser, axes: str) -> None:
    parser.add_argument(
        "--flip-labels", default="", metavar="AXES", help=f"mirror every label along {axes}, e.g. y or xy"
    )
    parser.add_argument(
        "--skip-flip-check", action="store_true", help="do not compare labels with their images' content"
    )


def _count_or_list(text: str) -> int | Path:
    return int(text) if text.isdecimal() else Path(text)


def _prepare_challenge(options: argparse.Namespace, mirror: tuple[int, ...]) -> None:
    splits = prepare(
        CHALLENGES[options.dataset](),
        options.source,
        options.dest,
        options.lists,
        mirror,
        not options.skip_flip_check,
    )
    counts = ", ".join(f"{len(scans)} in {name}" for name, scans in splits.items())
    origin = (
        "divided here, not the field's lists" if options.lists is None else f"as {options.lists} has them"
    )
    print(f"written to {options.dest}: {counts} ({origin})")


def _prepare_own(options: argparse.Namespace, mirror: tuple[int, ...]) -> None:
    for name in ("labelled", "test", "validation"):
        given = getattr(options, name)
        if given == 0 or (isinstance(given, Path) and not given.is_file()):
            raise ValueError(f"--{name} is {given}, accepted are numbers from 1, or a file that exists")
    dimensions, count = (2, "two") if options.slices else (3, "three")
    if options.spacing is not None and not (
        len(options.spacing) == dimensions and all(0 < size < float("inf") for size in options.spacing)
    ):
        raise ValueError(f"--spacing is {options.spacing}, accepted are {count} positive numbers of mm")
    if options.size is not None and not all(side > 0 and side % SIDE_MULTIPLE == 0 for side in options.size):
        raise ValueError(f"--size is {options.size}, accepted are two positive multiples of {SIDE_MULTIPLE}")
    choices = Choices(
        options.test,
        options.validation,
        options.labelled,
        options.patient,
        options.classes,
        None if options.modality is None else tuple(options.modality),
        None if options.spacing is None else tuple(options.spacing),
        dimensions,
        None if options.size is None else tuple(options.size),
        mirror,
        not options.skip_flip_check,
    )
    prepare_own(options.images, options.labels, options.dest, choices)


if __name__ == "__main__":
    main()
