"""`python -m semiseg.predict --run DIR --input FILE_OR_FOLDER --output FILE_OR_FOLDER`: segment new scans."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

from tqdm import tqdm

from semiseg.commands import EXPECTED, command
from semiseg.destinations import check_destination, check_utf8
from semiseg.engine.allocator import restart_with_tuned_heap
from semiseg.engine.trainer import choose_device
from semiseg.prediction import Predictor, check_spacing
from semiseg.preparation.volume_files import (
    NIFTI_ENDINGS,
    SCAN_ENDINGS,
    dicom_files,
    has_ending,
    read_header,
    scan_files,
    scans_in,
    stem,
)


@command
def main(arguments: list[str] | None = None) -> None:
    """Write the label of every voxel as NIfTI, on the grid of the scan, background 0."""
    options = _parser().parse_args(arguments)
    if options.spacing is not None:
        check_spacing(options.spacing)
    if arguments is None and choose_device("auto").type == "cpu":
        restart_with_tuned_heap()  # before the checks, which would be done and told twice
    warnings.showwarning = lambda message, *_: tqdm.write(f"warning: {message}", file=sys.stderr)

    scans = find_scans(options.input)
    for scan in scans:
        check_utf8(scan)
    masks = mask_paths(options.input, scans, options.output)
    wanted = [*masks, *(map(probabilities_path, masks) if options.probabilities else ())]
    check_distinct(wanted, scans)
    for path in wanted:
        check_destination(path)
    if options.skip_existing:
        found = len(scans)
        scans, masks = missing_masks(scans, masks)
        print(f"{found - len(scans)} of {found} scans have a mask already", flush=True)
        if not scans:
            return
    else:
        check_new(wanted)
    for scan in scans:
        read_header(scan)
    predictor = Predictor(options.run, options.overrides)
    masks[0].parent.mkdir(parents=True, exist_ok=True)

    failed = []
    for scan, mask in zip(scans, masks, strict=True):
        try:
            segmentation = predictor.predict(
                scan, spacing=options.spacing, probabilities=options.probabilities, progress=True
            )
        except EXPECTED as error:
            if len(scans) == 1:
                raise
            tqdm.write(f"error: {error}", file=sys.stderr)
            failed.append(scan.name)
            continue
        if options.probabilities:
            segmentation.save_probabilities(probabilities_path(mask))
        segmentation.save(mask)  # the last, so that where it is a scan has everything
        del segmentation  # its probabilities would take memory while the next scan's are made
        tqdm.write(f"written to {mask}", file=sys.stdout)
    if failed:
        raise ValueError(f"{len(failed)} of {len(scans)} scans have no mask: {', '.join(failed)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m semiseg.predict", description=__doc__)
    parser.add_argument("--run", required=True, type=Path, help="a run directory")
    parser.add_argument(
        "--input", required=True, type=Path,
        help="a NIfTI or NRRD file, a folder with one DICOM series, or a folder of such files and folders",
    )  # fmt: skip
    parser.add_argument(
        "--output", required=True, type=Path,
        help="a new .nii.gz or .nii file, or a folder where masks get the names of their scans; "
        "a file that exists is never overwritten",
    )  # fmt: skip
    parser.add_argument(
        "--probabilities", action="store_true",
        help="also write NAME_probabilities.nii.gz: float32, the classes along a fourth axis",
    )  # fmt: skip
    parser.add_argument(
        "--skip-existing", action="store_true",
        help="leave out scans whose mask exists, to go on where a folder's prediction was stopped",
    )  # fmt: skip
    parser.add_argument(
        "--spacing", nargs=3, type=float, metavar=("X", "Y", "Z"),
        help="mm along each axis of the files, where their headers are wrong",
    )  # fmt: skip
    parser.add_argument(
        "overrides", nargs="*", metavar="evaluation.key=value",
        help="e.g. evaluation.largest_component=true, training.precision=bfloat16, training.device=cpu",
    )  # fmt: skip
    return parser


def find_scans(source: Path) -> list[Path]:
    """A file, the scans of a folder, or a folder around one DICOM series.

    Raises FileNotFoundError where there is none, ValueError for a file of another kind or a DICOM series among files.
    """
    if source.is_file() and has_ending(source, SCAN_ENDINGS):
        return [source]
    if source.is_file():
        raise ValueError(f"{source}: accepted are files that end in {', '.join(SCAN_ENDINGS)}, and folders")
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: missing; expected a scan or a folder")
    if any(path.parent == source for path in dicom_files(source)) and not scan_files(source):
        return [source]
    scans = scans_in(source)
    if not scans:
        raise FileNotFoundError(
            f"{source}: holds no scan; expected files that end in {', '.join(SCAN_ENDINGS)}, or a DICOM series"
        )
    return [source] if len(scans) == 1 and scans[0].is_dir() else scans


def mask_paths(source: Path, scans: list[Path], output: Path) -> list[Path]:
    """Where the mask of every scan goes.

    Raises ValueError where a file is named for a folder of scans, or one that is no NIfTI file.
    """
    if has_ending(output, NIFTI_ENDINGS) and not output.is_dir():
        if scans != [source]:
            raise ValueError(f"{output}: accepted for a folder of scans is a folder")
        return [output]
    if output.is_file() or (scans == [source] and output.suffix and not output.is_dir()):
        raise ValueError(
            f"{output}: accepted are files that end in {' or '.join(NIFTI_ENDINGS)}, folders that exist, and names of "
            "new ones without an ending"
        )
    return [output / f"{stem(scan)}.nii.gz" for scan in scans]


def probabilities_path(mask: Path) -> Path:
    """Beside the mask: case.nii.gz -> case_probabilities.nii.gz"""
    return mask.with_name(f"{stem(mask)}_probabilities.nii.gz")


def missing_masks(scans: list[Path], masks: list[Path]) -> tuple[list[Path], list[Path]]:
    """The scans that have no mask yet, and where these go."""
    missing = [(scan, mask) for scan, mask in zip(scans, masks, strict=True) if not mask.exists()]
    return [scan for scan, _ in missing], [mask for _, mask in missing]


def check_distinct(paths: list[Path], scans: list[Path]) -> None:
    """Raise ValueError where a file would be written for two scans, or is one."""
    sources = set(map(os.path.realpath, scans))  # a folder may be given by two names
    wanted: set[Path] = set()
    for path in paths:
        if os.path.realpath(path) in sources:
            raise ValueError(f"{path} would be written over the scan, accepted is another folder")
        if path in wanted:
            raise ValueError(f"{path} would be written for two scans, accepted are scans of different names")
        wanted.add(path)


def check_new(paths: list[Path]) -> None:
    """Raise ValueError where a file exists already."""
    existing = [path for path in paths if path.exists()]
    if existing:
        others = f" (and {len(existing) - 1} more)" if len(existing) > 1 else ""
        raise ValueError(f"{existing[0]} exists already{others}, accepted are new files")


if __name__ == "__main__":
    main()
