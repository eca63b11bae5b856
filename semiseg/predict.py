"""`python -m semiseg.predict --run DIR --input FILE_OR_FOLDER --output FILE_OR_FOLDER`: segment new scans."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

from tqdm import tqdm

from semiseg.commands import EXPECTED, command
from semiseg.data.description import DatasetDescription
from semiseg.destinations import check_destination, check_utf8
from semiseg.engine.allocator import restart_with_tuned_heap
from semiseg.engine.run_directory import RunDirectory
from semiseg.engine.trainer import choose_device
from semiseg.prediction import Predictor, check_channels, check_spacing
from semiseg.preparation.channel_files import FIRST, grouped, has_number, scan_name
from semiseg.preparation.dicom import dicom_files
from semiseg.preparation.file_names import MASK_ENDINGS, SCAN_ENDINGS, has_ending, is_picture, stem
from semiseg.preparation.volume_files import check_mask, read_channel_headers, scans_in, volume_files

Scan = tuple[Path, ...]  # the files of its channels


@command
def main(arguments: list[str] | None = None) -> None:
    """Write the label of every voxel, on the grid of the scan, background 0."""
    options = _parser().parse_args(arguments)
    if options.spacing is not None:
        check_spacing(options.spacing)
    if arguments is None and choose_device("auto").type == "cpu":
        restart_with_tuned_heap()  # before the checks, which would be done and told twice
    warnings.showwarning = lambda message, *_: tqdm.write(f"warning: {message}", file=sys.stderr)

    files = find_scans(options.input)
    for path in files:
        check_utf8(path)
    directory, _ = RunDirectory.open(options.run)
    directory.check_finished()
    num_channels = len(DatasetDescription.load(directory.dataset).preprocessing.channels)
    scans = group_channels(options.input, files, num_channels)
    masks = mask_paths(options.input, scans, options.output)
    wanted = [*masks, *(map(probabilities_path, masks) if options.probabilities else ())]
    check_distinct(wanted, [path for scan in scans for path in scan])
    for path in wanted:
        check_destination(path)
    if options.skip_existing:
        count = len(scans)
        scans, masks = missing_masks(scans, masks)
        print(f"{count - len(scans)} of {count} scans have a mask already", flush=True)
        if not scans:
            return
    else:
        check_new(wanted)
    for scan, mask in zip(scans, masks, strict=True):
        channels = read_channel_headers(scan)
        check_channels(channels, num_channels)
        check_mask(mask, channels[0].values.shape)
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
            failed.append(scan[0].name)
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
        help="a NIfTI, NRRD or MetaImage file, a folder with one DICOM series, a picture, or a folder of such files and "
        "folders; of several channels in one file each, the first, NAME_0000",
    )  # fmt: skip
    parser.add_argument(
        "--output", required=True, type=Path,
        help="a new .nii.gz, .nii or .mha file, of a picture a .png file, or a folder where masks get the names of their "
        "scans; a file that exists is never overwritten",
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
    if any(path.parent == source for path in dicom_files(source)) and not volume_files(source):
        return [source]
    scans = scans_in(source)
    if not scans:
        raise FileNotFoundError(
            f"{source}: holds no scan; expected files that end in {', '.join(SCAN_ENDINGS)}, or a DICOM series"
        )
    return [source] if len(scans) == 1 and scans[0].is_dir() else scans


def group_channels(
    source: Path,
    paths: list[Path],  # the scans' files that were found there
    num_channels: int,
) -> list[Scan]:
    """The files of every scan: one that has all channels, or one for each, called `NAME_0000`, `NAME_0001` and so on.

    Of a single file the others are looked for beside it. Raises ValueError where some are missing.
    """
    if num_channels == 1 or len(read_channel_headers(paths[:1])) == num_channels:
        return [(path,) for path in paths]
    if paths == [source]:
        paths = [path for path in source.parent.iterdir() if has_number(path) and is_like(path, source)]
    for path in paths or [source]:
        if not (paths and has_number(path)):
            raise ValueError(
                f"{path}: the number of channels is {len(read_channel_headers([path]))}, accepted are files that "
                f"all hold {num_channels}, or one each and are called NAME{FIRST} and so on"
            )
    return grouped(paths)


def is_like(path: Path, source: Path) -> bool:
    """Whether a file or a folder is called as another before the channel's number."""
    same_kind = path.is_dir() if source.is_dir() else path.is_file() and has_ending(path, SCAN_ENDINGS)
    return same_kind and scan_name(path) == scan_name(source)


def mask_paths(source: Path, scans: list[Scan], output: Path) -> list[Path]:
    """Where the mask of every scan goes; in a folder those of pictures are pictures.

    Raises ValueError where a file is named for a folder of scans, or one of another kind.
    """
    is_one = len(scans) == 1 and source in scans[0]
    if has_ending(output, MASK_ENDINGS) and not output.is_dir():
        if not is_one:
            raise ValueError(f"{output}: accepted for a folder of scans is a folder")
        return [output]
    if output.is_file() or (is_one and output.suffix and not output.is_dir()):
        raise ValueError(
            f"{output}: accepted are files that end in {', '.join(MASK_ENDINGS)}, folders that exist, and names of new "
            "ones without an ending"
        )
    names = [stem(first) if not others else scan_name(first) for first, *others in scans]
    endings = [".png" if is_picture(first) else ".nii.gz" for first, *_ in scans]
    return [output / f"{name}{ending}" for name, ending in zip(names, endings, strict=True)]


def probabilities_path(mask: Path) -> Path:
    """Beside the mask: case.nii.gz -> case_probabilities.nii.gz"""
    return mask.with_name(f"{stem(mask)}_probabilities.nii.gz")


def missing_masks(scans: list[Scan], masks: list[Path]) -> tuple[list[Scan], list[Path]]:
    """The scans that have no mask yet, and where these go."""
    missing = [(scan, mask) for scan, mask in zip(scans, masks, strict=True) if not mask.exists()]
    return [scan for scan, _ in missing], [mask for _, mask in missing]


def check_distinct(paths: list[Path], sources: list[Path]) -> None:
    """Raise ValueError where a file would be written for two scans, or is one."""
    real_sources = set(map(os.path.realpath, sources))  # a folder may be given by two names
    wanted: set[Path] = set()
    for path in paths:
        if os.path.realpath(path) in real_sources:
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
