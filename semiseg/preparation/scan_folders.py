"""Scans in a folder of images and a folder of labels for some of them, matched by name, and their division."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from semiseg.data.volumes import TEST_LIST, TRAINING_LIST, VALIDATION_LIST
from semiseg.preparation.channel_files import FIRST, NUMBER, grouped, has_number, scan_name
from semiseg.preparation.file_names import SCAN_ENDINGS, stem
from semiseg.preparation.layout import check_name, note
from semiseg.preparation.splits import LabelledScan, Scan, Splits, listed, split
from semiseg.preparation.volume_files import scans_in

LABEL_ENDING = re.compile(r"[_.-](gt|seg|label|mask)$")  # behind the name of a label
TEST_SHARE = 0.2  # of the labelled patients


def find_scans(
    images: Path,
    labels: Path,  # may be the same folder, where labels are then the files with a label's ending
    patient: str | None = None,  # regular expression: what it matches at the start of a name is the patient
) -> tuple[list[LabelledScan], list[Scan]]:
    """Labelled and unlabelled scans, ordered by name, each a patient of its own unless `patient` says otherwise.

    Scans are what `scans_in` finds. A case is called as its file without the ending or as its folder, a label also without
    `_gt`, `_seg`, `_label` or `_mask` (`.seg`, `-label`). Where all images end in `_0000`, or in `_0000`, `_0001` and so on
    and labels are called as they are without, these are the channels of a case called without the number; labels of one
    channel may end in `_0000` too. Names are in Unicode's composed form.
    Raises FileNotFoundError where there are no images or no labels, ValueError where two files have one name or one
    that lists cannot hold, a case lacks a channel that others have, a label has no image, or `patient` matches nothing.
    """
    together = images.resolve() == labels.resolve()
    image_files = [path for path in _scans(images) if not (together and LABEL_ENDING.search(stem(path)))]
    label_files = [path for path in _scans(labels) if not together or LABEL_ENDING.search(stem(path))]
    channel = FIRST if _are_channels(image_files, label_files) else ""
    groups = grouped(image_files) if channel else [(path,) for path in image_files]
    images_of = _by_name({files: stem(files[0]).removesuffix(channel) for files in groups})
    label_of = _by_name({(path,): _label_name(path, images_of, channel) for path in label_files})
    for kind, folder, found in (("images", images, images_of), ("labels", labels, label_of)):
        if not found:
            called = ", called NAME_gt, NAME_seg, NAME_label or NAME_mask" if together and kind == "labels" else ""
            raise FileNotFoundError(
                f"{folder}: holds no {kind}; expected files that end in {', '.join(SCAN_ENDINGS)}, or a folder for every "
                f"DICOM series{called}"
            )
    for name, (path,) in label_of.items():
        if name not in images_of:
            known = label_of.keys() | set(map(scan_name, label_files))
            swapped = "; are the folders swapped?" if images_of.keys() <= known else ""
            raise ValueError(f"{path}: there is no image called {name} in {images} for this label{swapped}")
    labelled, unlabelled = [], []
    for name, files in images_of.items():
        if name in label_of:
            labelled.append(LabelledScan(name, _patient(name, patient), files, *label_of[name]))
        else:
            unlabelled.append(Scan(name, _patient(name, patient), files))
    if all(name.endswith(FIRST) for name in label_of):
        note(
            [scan.name for scan in unlabelled if NUMBER.sub(FIRST, scan.name) in label_of],
            "images count as scans without a label; of channels the label is called without their numbers",
        )
    return labelled, unlabelled


def join_patients(
    scans: Sequence[Scan],
    fingerprints: Mapping[str, str],  # by the scan's name: the same for the same image
) -> dict[str, str]:
    """Patient of every scan by its name, where those who share an image are taken for one."""
    patients = {scan.name: scan.patient for scan in scans}
    first: dict[str, str] = {}
    for name, fingerprint in fingerprints.items():
        same = patients[first.setdefault(fingerprint, name)]
        other = patients[name]
        patients = {scan: same if patient == other else patient for scan, patient in patients.items()}
    return patients


def divide(
    scans: Sequence[LabelledScan],
    test: int | Path | None = None,  # patients, or a list of cases; None: one in five
    validation: int | Path | None = None,
    labelled: int | Path | None = None,  # training cases whose labels are to be used; those of a list come first
) -> tuple[Splits, int]:
    """Labelled scans by the list they go to, and how many of the training list's are to count as labelled.

    Patients go where a list says, or in an order that only their names decide; those of whom a list names some
    scans only appear with these. Raises ValueError where nothing is left to train on or more is asked for than
    there is.
    """
    wanted = {TEST_LIST: test, VALIDATION_LIST: validation, TRAINING_LIST: labelled}
    lists = {name: path for name, path in wanted.items() if isinstance(path, Path)}
    splits = dict(listed(scans, lists, "labelled scans"))
    first = splits.pop(TRAINING_LIST, [])
    evaluated = {scan.patient for members in splits.values() for scan in members}
    trained = {scan.patient for scan in first}
    open_to_all = [scan for scan in scans if scan.patient not in evaluated | trained]
    patients = len({scan.patient for scan in open_to_all})
    counts = {name: n for name, n in wanted.items() if isinstance(n, int) and name != TRAINING_LIST}
    if test is None:
        counts[TEST_LIST] = max(1, round(TEST_SHARE * (patients + len(trained))))
    remaining = patients - sum(counts.values())
    if remaining < (0 if first else 1):
        raise ValueError(
            f"--test and --validation take {sum(counts.values())} of {patients} labelled patients, "
            f"accepted are {'up to all of them' if first else 'fewer, so that one is left to train on'}"
        )
    divided = split(open_to_all, {**({TRAINING_LIST: remaining} if remaining else {}), **counts})
    others = [scan for scan in scans if scan.patient in trained and scan not in first]
    training = [*first, *others, *divided.get(TRAINING_LIST, [])]
    splits |= {**divided, TRAINING_LIST: training}
    if isinstance(labelled, int) and labelled > len(training):
        raise ValueError(
            f"--labelled is {labelled}, accepted are 1 to {len(training)}, the labelled cases that are left to train on"
        )
    if isinstance(labelled, int):
        return splits, labelled
    return splits, len(first) or len(training)


def _scans(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected one with scans")
    return scans_in(folder)


def _are_channels(images: Sequence[Path], labels: Sequence[Path]) -> bool:
    """Whether numbers behind the names of images are those of channels: labels have the names without, or all are 0."""
    if all(stem(path).endswith(FIRST) for path in images):
        return True
    return all(map(has_number, images)) and {LABEL_ENDING.sub("", stem(path)) for path in labels} <= set(
        map(scan_name, images)
    )


def _label_name(path: Path, images_of: Mapping[str, object], channel: str) -> str:
    name = LABEL_ENDING.sub("", stem(path))
    # The last is for images whose own names end as those of labels may.
    likely = (name, name.removesuffix(channel), stem(path))
    return next((one for one in likely if unicodedata.normalize("NFC", one) in images_of), likely[1])


def _by_name(names: Mapping[tuple[Path, ...], str]) -> dict[str, tuple[Path, ...]]:
    found: dict[str, tuple[Path, ...]] = {}
    for files, stored_name in names.items():
        path = files[0]
        check_name(stored_name, path)
        # The same name may be composed for an image and decomposed for its label, such as on a Mac.
        name = unicodedata.normalize("NFC", stored_name)
        if name in found:
            raise ValueError(f"{path} and {found[name][0].name} are both called {name!r}; expected one of them")
        found[name] = files
    return dict(sorted(found.items()))


def _patient(name: str, pattern: str | None) -> str:
    if pattern is None:
        return name
    try:
        match = re.match(pattern, name)
    except re.error as error:
        raise ValueError(f"--patient is {pattern!r}, which is no regular expression ({error})") from None
    if not match or not match.group():
        raise ValueError(f"--patient is {pattern!r}, which matches nothing at the start of {name!r}")
    return match.group()
