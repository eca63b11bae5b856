"""What is wrong or odd about a scan and its label."""

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from semiseg.preparation.alignment import DECISIVE, best_mirroring
from semiseg.preparation.layout import note
from semiseg.preparation.volume import Volume, on_grid_of, origins_differ

AXES = "xyz"


def check_image(image: Volume) -> None:
    """Raise ValueError if voxels are NaN or infinite or all the same."""
    if not np.isfinite(image.values).all():
        raise ValueError(f"{image.path}: holds NaN or infinity; expected finite intensities")
    if image.values.min() == image.values.max():
        raise ValueError(f"{image.path}: holds {image.values.flat[0]} everywhere; expected an image")


def as_classes(
    label: Volume,
    stored_labels: Mapping[int, int],  # value in the label files -> class
) -> np.ndarray:  # [x, y, z] uint8
    """A label's values as classes. Raises ValueError if a value is unknown."""
    unknown = ~np.isin(label.values, list(stored_labels))
    if unknown.any():
        raise ValueError(
            f"{label.path}: holds the label {label.values[unknown][0]}; "
            f"expected {', '.join(map(str, stored_labels))}"
        )
    classes = np.zeros(label.values.shape, np.uint8)
    for value, number in stored_labels.items():
        classes[label.values == value] = number
    return classes


class LabelPlacement:
    """Looks at how the labels of a dataset lie on their images, and then says what is odd about all of them."""

    def __init__(
        self,
        mirror: tuple[int, ...],  # axes all labels were mirrored along already
        check_alignment: bool,  # whether labels are compared with their images' content
        by_chance: float = 0.0,  # share of the labels that may look mirrored
    ) -> None:
        self._mirror, self._check_alignment, self._by_chance = mirror, check_alignment, by_chance
        self._count = 0
        self._mirrored: dict[str, tuple[tuple[int, ...], float]] = {}  # axes and how much better it then fits
        self._turned: list[str] = []
        self._displaced: list[str] = []
        self._doubtful: list[str] = []

    def look_at(
        self,
        name: str,
        image: Volume,
        label: np.ndarray,  # [x, y, z] uint8, on the image's grid
        stored: Volume,  # the label as its file has it
        stored_orientation: str,  # of the image in its file
    ) -> None:
        """Compare one label with its image."""
        self._count += 1
        if stored.orientation != stored_orientation:
            self._turned.append(f"{name} ({stored.orientation})")
        if origins_differ(image, on_grid_of(image, stored)):
            self._displaced.append(name)
        axes, ratio = best_mirroring(image.values, label) if self._check_alignment else ((), 1.0)
        if ratio > DECISIVE:
            self._mirrored[name] = axes, ratio
        elif axes:
            self._doubtful.append(f"{name} ({_axes(axes)})")

    def finish(self) -> None:
        """Note what is odd; raise ValueError where labels lie mirrored against their images."""
        note(
            self._turned,
            "labels are stored along other axes than their images; their headers say how, so they are turned",
        )
        note(
            self._displaced,
            "headers place the label elsewhere than its image; voxels are matched by their index",
        )
        is_wrong = len(self._mirrored) > self._by_chance * self._count
        if not is_wrong:
            self._doubtful += [f"{name} ({_axes(axes)})" for name, (axes, _) in self._mirrored.items()]
        note(
            self._doubtful,
            "labels fit their images a little better mirrored along the axes in brackets; look at them",
        )
        if is_wrong:
            raise ValueError(self._mirrored_labels())

    def _mirrored_labels(self) -> str:
        name, (axes, ratio) = next(iter(self._mirrored.items()))
        ways = Counter(_axes(way) for way, _ in self._mirrored.values())
        # Mirroring twice along an axis is not mirroring along it.
        remedy = _axes(sorted(set(axes) ^ set(self._mirror)))
        return (
            f"{len(self._mirrored)} of {self._count} labels lie mirrored against their images, whatever their "
            f"headers say ({', '.join(f'{number} along {way}' for way, number in ways.most_common())}): {name} "
            f"fits {ratio:.0f} times better mirrored along {_axes(axes)}; look at it, then "
            + (f"mirror all labels with --flip-labels {remedy}" if remedy else "leave out --flip-labels")
            + ", correct the files that are wrong, or keep the labels as they are with --skip-flip-check"
        )


def _axes(axes: Iterable[int]) -> str:
    return "".join(AXES[axis] for axis in axes)
