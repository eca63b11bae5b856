"""A cohort of synthetic anatomy: no download, no licence, the same everywhere, small enough for a CPU."""

from collections.abc import Collection, Iterator

import numpy as np
from numpy.random import Generator
from scipy import ndimage
from scipy.spatial.transform import Rotation

from semiseg.data.case import Case
from semiseg.data.files import check_labelled
from semiseg.data.preprocessing import Preprocessing

SPLITS = ("training", "validation", "test")
WAVES = 6  # of a smooth random field


class Phantom:
    """A chamber with an appendage, half enclosed by a muscular wall, among look-alikes; 3D, 1 mm voxels.

    What varies from case to case, and makes the cohort hard: pose, size and shape (a smooth random
    deformation), the contrast of chamber and wall against tissue and its sign, a second chamber, a vessel and
    blobs that have the intensities of chamber and wall but belong to the background, a bias field, blur and
    Rician noise. Each case has a random stream of its own, SeedSequence(seed, (split, index)), so only
    evaluation ever generates a test case.
    """

    class_names = ("background", "chamber", "wall")
    dimensions = 3
    has_validation = True
    spacing = (1.0, 1.0, 1.0)  # mm
    preprocessing = Preprocessing(orientation=None, spacing=spacing)
    label_values = None

    def __init__(
        self,
        seed: int = 0,
        shape: tuple[int, int, int] = (64, 64, 48),  # voxels
        training: int = 40,  # cases
        validation: int = 4,
        test: int = 12,
    ) -> None:
        self.seed = seed
        self.shape = shape
        self.counts = {"training": training, "validation": validation, "test": test}

    def training_cases(self, labelled: int) -> tuple[list[Case], list[Case]]:
        """Generate all training cases; the first `labelled` are labelled, the others unlabelled."""
        check_labelled(labelled, self.counts["training"], "volumes", "the phantom")
        cases = list(self._cases("training"))
        return cases[:labelled], cases[labelled:]

    def patient(self, name: str) -> str:
        """Every case is another's."""
        return name

    def evaluation_names(self, split: str) -> list[str]:
        """Names of the cases of "validation" or "test"."""
        if split not in ("validation", "test"):
            raise ValueError(f"split is {split!r}; the phantom has 'validation' and 'test'")
        return self._names(split)

    def evaluation_cases(self, split: str, only: Collection[str] | None = None) -> Iterator[Case]:
        """Generate the cases of "validation" or "test", or only those of some names, one at a time."""
        self.evaluation_names(split)
        return self._cases(split, only)

    def _names(self, split: str) -> list[str]:
        return [f"{split}_{index:02d}" for index in range(self.counts[split])]

    def _cases(self, split: str, only: Collection[str] | None = None) -> Iterator[Case]:
        for index, name in enumerate(self._names(split)):
            if only is not None and name not in only:
                continue
            stream = np.random.SeedSequence(self.seed, spawn_key=(SPLITS.index(split), index))
            image, label = _Anatomy(self.shape, np.random.default_rng(stream)).render()
            yield Case(name, image[np.newaxis], label, self.spacing)


class _Anatomy:
    """The shapes of one case: distances to surfaces, in anatomical coordinates.

    The first anatomical axis is the chamber's long axis, from apex (negative) to base (positive). The unit of
    length is half the volume's shortest side.
    """

    def __init__(self, shape: tuple[int, int, int], random: Generator) -> None:
        self.shape, self.random = shape, random
        voxel = 2 / min(shape)
        self.axes = [((np.arange(size) - (size - 1) / 2) * voxel).astype(np.float32) for size in shape]
        self.point = self._anatomical_coordinates()

    def render(self) -> tuple[np.ndarray, np.ndarray]:  # [*S] float32 with mean 0 and variance 1, [*S] uint8
        random = self.random
        radii = np.array([0.7, 0.54, 0.54]) * np.exp(random.uniform(-0.15, 0.15, 3))
        body = self._ellipsoid(np.zeros(3), radii)
        # The appendage sits near the base, anywhere around it.
        angle = random.uniform(0, 2 * np.pi)
        appendage_centre = np.array([0.42, 0.55 * np.cos(angle), 0.55 * np.sin(angle)])
        appendage = self._ellipsoid(appendage_centre, random.uniform(0.2, 0.34, 3))
        chamber = _smooth_minimum(body, appendage, 0.08) + 0.015 * self._field(12) < 0
        # The wall encloses the apex and leaves the base open.
        thickness = random.uniform(0.18, 0.3) * (1 + 0.25 * self._field(4))
        wall = (body < thickness) & (self.point[0] < random.uniform(0.05, 0.3)) & ~chamber

        chamber_value, wall_value = _contrasts(random)
        value = self._surroundings(chamber_value, wall_value, radii, angle)
        value[wall] = wall_value
        value[chamber] = chamber_value
        return self._acquire(value), (chamber + 2 * wall).astype(np.uint8)

    def _surroundings(
        self, chamber_value: float, wall_value: float, radii: np.ndarray, angle: float
    ) -> np.ndarray:  # [*S] float32
        """Tissue, a region without it, and everything that looks like chamber or wall but is neither."""
        random = self.random
        tissue = 0.25 * self._field(5) + 0.15 * self._field(14)
        value = np.where(self._field(3) > random.uniform(0.8, 1.4), -random.uniform(0.6, 1.3), tissue)
        for blob_value in (chamber_value, wall_value, wall_value, chamber_value):
            blob = self._ellipsoid(random.uniform(-1.3, 1.3, 3), random.uniform(0.15, 0.35, 3))
            value[blob + 0.04 * self._field(8) < 0] = blob_value
        # A second chamber with a thin wall lies opposite the appendage; a vessel leaves the base.
        opposite = np.array([0.0, np.cos(angle + 2.4), np.sin(angle + 2.4)])
        second_centre = np.array([0.1, 0.0, 0.0]) + random.uniform(1.05, 1.2) * opposite
        second = self._ellipsoid(second_centre, random.uniform(0.25, 0.4, 3))
        vessel_axis = np.array([1.0, *random.uniform(-0.5, 0.5, 2)])
        vessel = self._vessel(np.array([0.9 * radii[0], 0.0, 0.0]), vessel_axis, random.uniform(0.14, 0.22))
        value[second < 0.08] = wall_value
        value[(second < 0) | (vessel < 0)] = chamber_value
        return value.astype(np.float32)

    def _acquire(self, value: np.ndarray) -> np.ndarray:
        """Fine texture, blur, bias field, Rician noise, normalisation."""
        random = self.random
        blurred = ndimage.gaussian_filter(value + 0.08 * self._field(16), random.uniform(0.5, 1.1))
        signal = (blurred - blurred.min() + 0.3) * np.exp(0.3 * self._field(2))
        noise = random.uniform(0.1, 0.25) * random.standard_normal((2, *self.shape), dtype=np.float32)
        image = np.hypot(signal + noise[0], noise[1])
        return ((image - image.mean()) / image.std()).astype(np.float32)

    def _anatomical_coordinates(self) -> np.ndarray:  # [3, *S] float32
        """Place, rotation, size, and a smooth deformation."""
        random = self.random
        position = np.stack(np.meshgrid(*self.axes, indexing="ij"))
        centre = random.uniform(-0.18, 0.18, 3)
        size = np.exp(random.uniform(-0.22, 0.22))
        rotation = Rotation.from_rotvec(random.normal(0, 0.45, 3)).as_matrix()
        point = np.tensordot((rotation / size).astype(np.float32), position - _vector(centre), 1)
        return point + 0.05 * np.stack([self._field(3) for _ in range(3)])

    def _field(self, frequency: float) -> np.ndarray:  # [*S] float32
        """A smooth random field of mean 0 and variance 1: plane waves of random direction and phase.

        `frequency` is their root mean square angular frequency per unit of length.
        """
        waves = self.random.normal(0, frequency / np.sqrt(3), (3, WAVES))
        phases = [np.exp(1j * np.outer(axis, wave)) for axis, wave in zip(self.axes, waves, strict=True)]
        start = np.sqrt(2 / WAVES) * np.exp(2j * np.pi * self.random.random(WAVES))
        plane = (phases[0][:, None] * phases[1] * start).astype(np.complex64)  # [X, Y, waves]
        depth = phases[2].T.astype(np.complex64)  # [waves, Z]
        return plane.real @ depth.real - plane.imag @ depth.imag

    def _ellipsoid(self, centre: np.ndarray, radii: np.ndarray) -> np.ndarray:
        """About the distance to an ellipsoid's surface, negative inside."""
        scaled = (self.point - _vector(centre)) / _vector(radii)
        return (np.sqrt((scaled**2).sum(0)) - 1) * np.float32(radii.mean())

    def _vessel(self, start: np.ndarray, axis: np.ndarray, radius: float) -> np.ndarray:
        """Distance to the surface of a tube that runs from `start` along `axis`, negative inside."""
        axis = (axis / np.linalg.norm(axis)).astype(np.float32)
        offset = self.point - _vector(start)
        along = np.maximum(np.tensordot(axis, offset, 1), 0)
        return np.sqrt(((offset - along * _vector(axis)) ** 2).sum(0)) - np.float32(radius)


def _contrasts(random: Generator) -> tuple[float, float]:
    """Values of chamber and wall against tissue, of opposite sign; one case in ten has the signs exchanged."""
    sign = -1 if random.random() < 0.1 else 1
    return sign * random.uniform(0.7, 1.4), -sign * random.uniform(0.35, 1.0)


def _smooth_minimum(first: np.ndarray, second: np.ndarray, width: float) -> np.ndarray:
    blend = np.maximum(width - np.abs(first - second), 0)
    return np.minimum(first, second) - blend**2 / (4 * width)


def _vector(values: np.ndarray) -> np.ndarray:  # [3, 1, 1, 1] float32
    return np.asarray(values, dtype=np.float32)[:, None, None, None]
