"""What a dataset did to its scans before training, so that a new scan can be brought to the same form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

KINDS = ("standardise", "unit_range", "fixed")
ROUNDING = 1e-9  # relative; a deviation below it is none


@dataclass(frozen=True)
class Intensity:
    """How the intensities of one channel are brought to one scale.

    ValueError for an unknown kind, or a `fixed` one without its numbers.
    """

    kind: str = "standardise"  # mean 0, deviation 1 of the scan; unit_range: 0 to 1; fixed: by `mean`, `deviation`
    clip: tuple[float, float] | None = None  # intensities outside are cut off first
    mean: float | None = None  # of a `fixed` one
    deviation: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"intensity is {self.kind!r}, accepted are {', '.join(KINDS)}")
        if (self.kind == "fixed") != (self.mean is not None and self.deviation is not None):
            raise ValueError(
                f"intensity is {self.kind} with mean {self.mean} and deviation {self.deviation}, "
                "accepted are fixed with both, and the others without"
            )

    def clipped(self, image: np.ndarray) -> np.ndarray:
        """Cut off what lies outside `clip`."""
        return image if self.clip is None else np.clip(image, *self.clip)

    def scaled(
        self,
        image: np.ndarray,  # [*S]
    ) -> np.ndarray:  # [*S] float32
        """Clip and scale one channel of a whole scan. ValueError where its intensities are all the same."""

        def planes() -> Iterator[np.ndarray]:  # one by one: a whole scan in float64 may be gigabytes
            return (self.clipped(plane.astype(np.float64)) for plane in image)

        shift, scale = self.mean, self.deviation
        if self.kind == "unit_range":
            shift = min(plane.min() for plane in planes())
            scale = max(plane.max() for plane in planes()) - shift
        elif self.kind == "standardise":
            shift = sum(plane.sum() for plane in planes()) / image.size
            scale = np.sqrt(sum(((plane - shift) ** 2).sum() for plane in planes()) / image.size)
        assert shift is not None and scale is not None  # a fixed one has both
        if not scale > ROUNDING * abs(shift):
            raise ValueError(f"the scan is {shift} everywhere; expected an image")
        scaled = np.empty(image.shape, np.float32)
        for plane, values in zip(scaled, planes(), strict=True):
            plane[...] = (values - shift) / scale
        return scaled


BRIGHTEST = 255.0  # of pictures of 8 bits
EIGHT_BITS = Intensity("fixed", None, 0.0, BRIGHTEST)  # of which a network knows nothing brighter


@dataclass(frozen=True)
class Preprocessing:
    """From a scanner's files to what the network sees: turn the axes, resample, bring intensities to one scale."""

    orientation: str | None  # where the axes of the array lead, e.g. LPS, first axis first; None: as in the file
    spacing: tuple[float | None, ...] | None  # mm along each axis of the array; None, for one or all: every scan's own
    channels: tuple[Intensity, ...] = (Intensity(),)  # of an image

    def spacing_of(
        self,
        given: tuple[float, ...],  # mm along each axis of a scan
    ) -> tuple[float, ...]:
        """The spacing that a scan is brought to."""
        if self.spacing is None:
            return given
        return tuple(own if wanted is None else wanted for own, wanted in zip(given, self.spacing, strict=True))
