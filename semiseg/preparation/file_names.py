"""Names of files with scans: endings tell their kinds, and what is before them the scan."""

from pathlib import Path

# In small or large letters, as `has_ending` looks for them.
NIFTI_ENDINGS = (".nii.gz", ".nii")
META_IMAGE_ENDINGS = (".mha", ".mhd")
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
VOLUME_ENDINGS = (*NIFTI_ENDINGS, ".nrrd", *META_IMAGE_ENDINGS)
SCAN_ENDINGS = (*VOLUME_ENDINGS, *PICTURE_ENDINGS)
MASK_ENDINGS = (*NIFTI_ENDINGS, ".mha", ".png")


def has_ending(path: Path, endings: tuple[str, ...]) -> bool:
    """Whether a file's name ends in one of these, in small or large letters."""
    return path.name.lower().endswith(endings)


def is_hidden(path: Path) -> bool:
    """Whether a name begins with a dot, such as of the files that macOS puts beside each one on other file systems."""
    return path.name.startswith(".")


def is_picture(path: Path) -> bool:
    """Whether a scan is a picture, by its ending."""
    return has_ending(path, PICTURE_ENDINGS) and not path.is_dir()


def stem(path: Path) -> str:
    """A scan's name without its ending."""
    path = path.absolute()
    return next((path.name[: -len(end)] for end in SCAN_ENDINGS if has_ending(path, (end,))), path.name)
