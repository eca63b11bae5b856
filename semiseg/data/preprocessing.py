"""What a dataset did to its scans before training, so that a new scan can be brought to the same form."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

INTENSITIES = ("standardise", "unit_range", "fixed")


@dataclass(frozen=True)
class Preprocessing:
    """From a scanner's file to what the network sees: turn the axes, resample, bring intensities to one scale.

    ValueError for an unknown kind of intensity, or a `fixed` one without its numbers.
    """

    orientation: str | None  # where the axes of the array lead, e.g. LPS, first axis first; None: as in the file
    spacing: tuple[float, ...] | None  # mm along each axis of the array; None: every scan's own
    intensity: str = "standardise"  # mean 0, deviation 1 of the scan; unit_range: 0 to 1; fixed: by `mean`, `deviation`
    clip: tuple[float, float] | None = None  # intensities outside are cut off first
    mean: float | None = None  # of a `fixed` intensity
    deviation: float | None = None

    def __post_init__(self) -> None:
        if self.intensity not in INTENSITIES:
            raise ValueError(f"intensity is {self.intensity!r}, accepted are {', '.join(INTENSITIES)}")
        if (self.intensity == "fixed") != (self.mean is not None and self.deviation is not None):
            raise ValueError(
                f"intensity is {self.intensity} with mean {self.mean} and deviation {self.deviation}, "
                "accepted are fixed with both, and the others without"
            )

    def clipped(self, image: np.ndarray) -> np.ndarray:
        """Cut off what lies outside `clip`."""
        return image if self.clip is None else np.clip(image, *self.clip)

    def scaled(
        self,
        image: np.ndarray,  # [*S]
    ) -> np.ndarray:  # [*S] float32
        """Clip and scale the intensities of a whole scan. ValueError where they are all the same."""
        values = self.clipped(image.astype(np.float64))
        if self.intensity == "unit_range":
            shift, scale = values.min(), values.max() - values.min()
        elif self.intensity == "standardise":
            shift, scale = values.mean(), values.std()
        else:
            shift, scale = self.mean, self.deviation
        if not scale > 0:
            raise ValueError(f"the scan is {values.flat[0]} everywhere; expected an image")
        return ((values - shift) / scale).astype(np.float32)
