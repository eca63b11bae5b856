"""`python -m semiseg.prepare la|acdc|pancreas SOURCE DEST`: write the HDF5 files that training reads."""

from __future__ import annotations

import argparse
from pathlib import Path

from semiseg.commands import command

DATASETS = {
    "la": "2018 Atrial Segmentation Challenge, the folder with <id>/lgemri.nrrd and laendo.nrrd",
    "acdc": "Automated Cardiac Diagnosis Challenge, the folder with patientNNN/",
    "pancreas": "Pancreas-CT, a folder with PANCREAS_NNNN/ (DICOM) and labelNNNN.nii.gz anywhere below",
}


@command
def main(arguments: list[str] | None = None) -> None:
    """Check every scan, then write the cases and their lists."""
    parser = argparse.ArgumentParser("python -m semiseg.prepare", description=__doc__)
    parser.add_argument(
        "dataset", choices=DATASETS, help="; ".join(f"{name}: {what}" for name, what in DATASETS.items())
    )
    parser.add_argument("source", type=Path, help="what the challenge hands out")
    parser.add_argument("dest", type=Path, help="a new folder, e.g. $SEMISEG_DATA/LA")
    parser.add_argument(
        "--lists", type=Path, metavar="FOLDER",
        help="folder of train.list, test.list (ACDC: and val.list) that say which case goes where; "
        "without it patients are divided here, in the usual numbers",
    )  # fmt: skip
    parser.add_argument(
        "--flip-labels", default="", metavar="AXES",
        help="mirror every label along these axes of its image, e.g. y or xy",
    )  # fmt: skip
    parser.add_argument(
        "--skip-flip-check", action="store_true", help="do not compare labels with their images' content"
    )
    options = parser.parse_args(arguments)
    if set(options.flip_labels) - set("xyz") or len(set(options.flip_labels)) < len(options.flip_labels):
        raise ValueError(f"--flip-labels is {options.flip_labels!r}; accepted are x, y, z, each once")
    try:
        from semiseg.preparation import CHALLENGES, prepare
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed; pip install -e '.[prepare]' brings it") from error

    splits = prepare(
        CHALLENGES[options.dataset](),
        options.source,
        options.dest,
        options.lists,
        tuple("xyz".index(axis) for axis in options.flip_labels),
        not options.skip_flip_check,
    )
    counts = ", ".join(f"{len(scans)} in {name}" for name, scans in splits.items())
    origin = (
        "divided here, not the field's lists" if options.lists is None else f"as {options.lists} has them"
    )
    print(f"written to {options.dest}: {counts} ({origin})")


if __name__ == "__main__":
    main()
