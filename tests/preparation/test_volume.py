"""Scans and their place in space: reading, turning, resampling."""

from pathlib import Path

import challenge_files as files
import nibabel
import nrrd
import numpy as np
import pytest
from scipy.interpolate import RegularGridInterpolator
from scipy.spatial.transform import Rotation

from semiseg.data.preprocessing import Intensity, Preprocessing
from semiseg.preparation.volume import Volume, on_grid_of, prepared_channels, resample, resample_label
from semiseg.preparation.volume_files import read_header, read_nifti, read_nrrd, read_volume

NO_SPACE = dict.fromkeys(("space", "space directions", "space origin"))


def test_resampling_is_exact_for_a_linear_image():
    """Voxel j of the result lies at (j + 0.5) mm, voxel i of the input at (i + 0.5) times its size."""
    spacing = (0.8, 1.25, 2.0)
    positions = np.meshgrid(
        *((np.arange(n) + 0.5) * s for n, s in zip((20, 16, 10), spacing, strict=True)), indexing="ij"
    )
    image = (positions[0] + 10 * positions[1] + 100 * positions[2]).astype(np.float32)
    resampled = resample(image, spacing, (1.0, 1.0, 1.0))
    assert resampled.shape == (16, 20, 20)
    expected = np.meshgrid(*(np.arange(n) + 0.5 for n in resampled.shape), indexing="ij")
    inner = (slice(1, -1),) * 3
    np.testing.assert_allclose(
        resampled[inner], (expected[0] + 10 * expected[1] + 100 * expected[2])[inner], rtol=1e-5
    )


@pytest.mark.parametrize("line", [b"space origin: ", b"space directions: "])
def test_a_damaged_nrrd_header_is_named(tmp_path, line):
    path = tmp_path / "a.nrrd"
    files.write_nrrd(path, np.zeros((2, 3, 4), np.int16))
    key = line.split(b":")[0]
    head, data = path.read_bytes().split(b"\n\n", 1)
    lines = [line if old.startswith(key + b":") else old for old in head.split(b"\n")]
    path.write_bytes(b"\n".join(lines) + b"\n\n" + data)
    for read in (read_nrrd, read_header):
        with pytest.raises(ValueError, match=f"{path}: cannot be read as NRRD") as raised:
            read(path)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("orientation", ["RAS", "LPI", "SPL", "IRA"])
def test_turning_keeps_every_voxel_in_its_place(tmp_path, orientation):
    values = np.random.default_rng(0).random((4, 5, 6))
    files.write_nifti(tmp_path / "a.nii.gz", values, files.LPS @ np.diag([1.0, 2.0, 3.0, 1.0]))
    volume = read_nifti(tmp_path / "a.nii.gz")
    turned = volume.turned(orientation)
    assert turned.orientation == orientation
    for index in np.ndindex(volume.values.shape):
        place = np.linalg.inv(turned.affine) @ volume.affine @ [*index, 1]
        assert turned.values[tuple(np.rint(place[:3]).astype(int))] == volume.values[index]
    np.testing.assert_array_equal(on_grid_of(volume, turned).values, values)


@pytest.mark.parametrize(("stored", "spacing", "expected"), [
    ("LPS", (1.5, 1.5, 8), "SPL"),
    ("SAR", (8, 1.5, 1.4), "SPL"),
    ("PSL", (1.4, 1.4, 8), "LIP"),
    ("LIA", (1.4, 1.4, 8), "PIL"),
    ("ARI", (5, 0.9, 0.9), "PIL"),
    ("PSL", (1, 1, 1), "SPL"),
    ("PSL", (0.9, 1, 1.1), "SPL"),
])  # fmt: skip
def test_slices_are_across_the_axis_that_is_clearly_the_coarsest(stored, spacing, expected):
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for axis, (letter, size) in enumerate(zip(stored, spacing, strict=True)):
        row = next(row for row, pair in enumerate(("RL", "AP", "SI")) if letter in pair)
        affine[row, axis] = size if letter in "RAS" else -size
    volume = Volume(Path("scan"), np.zeros((2, 3, 4)), affine)
    assert (volume.orientation, volume.slice_orientation) == (stored, expected)


@pytest.mark.parametrize(("header", "orientation", "spacing"), [
    ({}, "LPS", (1, 1, 1)),
    ({"space": "right-anterior-superior"}, "RAS", (1, 1, 1)),
    ({"space": "left-anterior-superior", "space directions": np.diag([2, 3, 4.0])}, "LAS", (2, 3, 4)),
    ({"space": "RAS"}, "RAS", (1, 1, 1)),
    ({"space": "Left-Posterior-Superior"}, "LPS", (1, 1, 1)),
    ({"space directions": np.array([[0, 0, 2.0], [0.5, 0, 0], [0, -3.0, 0]])}, "SLA", (2, 0.5, 3)),
    ({**NO_SPACE, "spacings": [2, 3, 4.0]}, "LPS", (2, 3, 4)),
    (NO_SPACE, "LPS", (1, 1, 1)),
])  # fmt: skip
def test_nrrd_geometry(tmp_path, header, orientation, spacing):
    geometry = {
        "space": "left-posterior-superior",
        "space directions": np.eye(3),
        "space origin": np.zeros(3),
    }
    given = {key: value for key, value in {**geometry, **header}.items() if value is not None}
    values = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    nrrd.write(str(tmp_path / "a.nrrd"), values, given)
    volume = read_nrrd(tmp_path / "a.nrrd")
    np.testing.assert_array_equal(volume.values, values)
    assert volume.orientation == orientation and volume.spacing == pytest.approx(spacing)


@pytest.mark.parametrize(("shape", "header", "message"), [
    ((2, 3, 4), {"space": "scanner-xyz", "space directions": np.eye(3)},
     "its space is 'scanner-xyz'; expected one of left"),
    ((2, 2, 3, 4), {"space": "RAS", "space directions": np.vstack([np.full(3, np.nan), np.eye(3)])},
     "it has 4 axes; expected three"),
    ((3, 4), {"spacings": [1.0, 1.0]}, "it has 2 axes; expected three"),
])  # fmt: skip
def test_an_unknown_space_and_other_axes_are_refused(tmp_path, shape, header, message):
    nrrd.write(str(tmp_path / "a.nrrd"), np.zeros(shape, np.int16), header)
    for read in (read_nrrd, read_header):
        with pytest.raises(ValueError, match=f"a.nrrd: cannot be read as NRRD .{message}"):
            read(tmp_path / "a.nrrd")


@pytest.mark.parametrize("size", [1e-5, 1.0, 1e5])  # mm
def test_a_header_needs_three_directions_and_spacings_of_any_size(tmp_path, size):
    files.write_nifti(tmp_path / "a.nii", np.zeros((2, 3, 4), np.uint8), files.LPS @ np.diag([size, size, size, 1]))
    for read in (read_nifti, read_header):
        assert read(tmp_path / "a.nii").spacing == pytest.approx((size,) * 3)
    flat = np.diag([size, size, size, 1])
    flat[:3, :3] = size * np.array([[0.6, 0.6 + 1e-9, 0], [0.8, 0.8, 0], [0, 0, 1]])
    files.write_nifti(tmp_path / "b.nii", np.zeros((2, 3, 4), np.uint8), flat)
    with pytest.raises(ValueError, match="b.nii: its header gives no direction for some axis"):
        read_nifti(tmp_path / "b.nii")


def test_resampling_keeps_what_lies_at_a_point_of_the_world(tmp_path):
    """An image that is a linear function of the place, under an oblique affine."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", (12, -20, 33), degrees=True).as_matrix() * (0.8, 1.25, 2.0)
    affine[:3, 3] = (-31, 14, 5)
    weights = np.array([1.0, -0.5, 0.25])
    indices = np.stack(np.meshgrid(*map(np.arange, (20, 16, 10)), indexing="ij"), -1)
    values = (indices @ affine[:3, :3].T + affine[:3, 3]) @ weights
    resampled = Volume(tmp_path, values, affine).resampled((1.0, 1.0, 1.5))
    assert resampled.spacing == pytest.approx((1.0, 1.0, 1.5)) and resampled.values.shape == (16, 20, 13)
    for index in np.ndindex(14, 18, 11):
        index = np.add(index, 1)  # beyond the centres of the outermost voxels there is nothing to interpolate
        place = (resampled.affine @ [*index, 1])[:3]
        assert resampled.values[tuple(index)] == pytest.approx(place @ weights, abs=1e-4)


def test_intensities_are_cut_off_before_they_are_interpolated():
    image = Volume(Path("scan"), np.array([0.0, 1000]).reshape(2, 1, 1), np.diag([2.0, 1, 1, 1]))
    preprocessing = Preprocessing("RAS", (1.0, 1, 1), (Intensity("fixed", clip=(0, 100), mean=0.0, deviation=1.0),))
    np.testing.assert_allclose(prepared_channels([image], preprocessing).ravel(), [0, 25, 75, 100])


def test_a_label_becomes_the_class_that_has_most_of_a_voxel():
    random = np.random.default_rng(0)
    label = random.integers(0, 4, (9, 8, 7), dtype=np.uint8)
    spacing, wanted = (1.0, 1.5, 2.0), (0.7, 1.0, 1.2)
    resampled = resample_label(label, spacing, wanted)
    steps = np.divide(wanted, spacing)
    expected_shape = tuple(round(side / step) for side, step in zip(label.shape, steps, strict=True))
    assert resampled.shape == expected_shape and resampled.dtype == np.uint8
    axes = [np.clip((np.arange(side) + 0.5) * step - 0.5, 0, most - 1)
            for side, step, most in zip(expected_shape, steps, label.shape, strict=True)]  # fmt: skip
    places = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    shares = np.stack(
        [RegularGridInterpolator(tuple(map(np.arange, label.shape)), label == k)(places) for k in range(4)]
    )
    ordered = np.sort(shares, axis=0)
    clear = ordered[-1] - ordered[-2] > 1e-5
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(resampled[clear], shares.argmax(0)[clear])


@pytest.mark.parametrize("classes", [(0, 2), (2, 0), (1, 3), (3, 1)])
def test_of_two_classes_with_equal_shares_a_label_becomes_the_higher(classes):
    label = np.array(classes, np.uint8).reshape(2, 1, 1)
    assert resample_label(label, (1.0, 1.0, 1.0), (2.0, 1.0, 1.0)).tolist() == [[[max(classes)]]]


@pytest.mark.parametrize(("degrees", "same"), [(1, True), (2, False)])
def test_axes_of_a_label_may_differ_from_its_image_s_by_one_degree(degrees, same):
    image, label = (Volume(Path(name), np.zeros((2, 3, 4)), np.eye(4)) for name in ("image", "label"))
    label.affine[:3, :3] = Rotation.from_euler("z", degrees, degrees=True).as_matrix()
    if same:
        assert on_grid_of(image, label).values.shape == image.values.shape
    else:
        with pytest.raises(ValueError, match="label: the label has directions"):
            on_grid_of(image, label)


@pytest.mark.parametrize("axis", "xyz")
def test_axes_half_way_between_two_of_the_body_are_those_of_the_image(axis):
    """Rounding decides by which of the two names an axis is called, for an image otherwise than for its label."""
    values = np.arange(24).reshape(2, 3, 4)
    affines = []
    for degrees in (44.9999, 45.0001):
        affine = np.eye(4)
        affine[:3, :3] = Rotation.from_euler(axis, degrees, degrees=True).as_matrix() * (0.7, 0.7, 5)
        affines.append(affine)
    image, label = (Volume(Path("scan"), values, affine) for affine in affines)
    assert image.orientation != label.orientation
    np.testing.assert_array_equal(on_grid_of(image, label).values, values)
    turned = on_grid_of(image, label.turned("LIP"))
    np.testing.assert_array_equal(turned.values, values)
    np.testing.assert_allclose(turned.affine, label.affine, atol=1e-12)


def test_axes_of_length_one_behind_those_of_space_are_dropped(tmp_path):
    values = np.arange(24, dtype=np.int16).reshape(2, 3, 4, 1, 1)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "a.nii")
    np.testing.assert_array_equal(read_nifti(tmp_path / "a.nii").values, values[..., 0, 0])


def write_label(path: Path) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 4, (12, 10, 8)).astype(np.uint8)
    if path.suffix == ".nrrd":
        nrrd.write(str(path), values)
    else:
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    return values


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd"])
def test_a_flipped_bit_is_noticed(tmp_path, name):
    path = tmp_path / name
    write_label(path)
    whole = path.read_bytes()
    for position in range(len(whole) - 300, len(whole) - 10, 20):
        damaged = bytearray(whole)
        damaged[position] ^= 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name}: cannot be read as (NIfTI|NRRD)"):
            read_volume(path)


@pytest.mark.parametrize("damage", [lambda content: content[:-3], lambda content: content[:-4] + b"long"])
def test_the_length_behind_the_voxels_is_checked(tmp_path, damage):
    path = tmp_path / "a.nii.gz"
    write_label(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        ValueError, match="a.nii.gz: cannot be read as NIfTI .(Compressed file ended|Incorrect length)"
    ):
        read_nifti(path)


# number of axes, first side, type and place of the voxels
@pytest.mark.parametrize("position", [40, 43, 70, 111])
def test_a_damaged_header_is_named(tmp_path, position):
    path = tmp_path / "a.nii"
    write_label(path)
    damaged = bytearray(path.read_bytes())
    damaged[position] ^= 0xA0
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="a.nii: (cannot be read as NIfTI|has shape)"):
        read_nifti(path)


def test_a_side_that_no_memory_holds_is_refused_in_one_line(tmp_path):
    path = tmp_path / "a.nii.gz"
    header = nibabel.Nifti1Image(np.zeros((2, 2, 2)), np.eye(4)).header
    header.set_data_shape((32767, 32767, 32767))
    nibabel.openers.Opener(path, "wb").write(header.binaryblock + bytes(4))
    with pytest.raises(ValueError, match="a.nii.gz: cannot be read as NIfTI"):
        read_nifti(path)


@pytest.mark.parametrize("name", ["a.NII.GZ", "a.Nii.gz", "a.NII"])
def test_endings_in_large_letters(tmp_path, name):
    values = write_label(tmp_path / name.lower())
    (tmp_path / name.lower()).rename(tmp_path / name)
    np.testing.assert_array_equal(read_volume(tmp_path / name).values, values)
    assert read_header(tmp_path / name).values.shape == values.shape


def test_what_takes_more_memory_than_there_is_is_refused_before_it_is_taken(monkeypatch):
    monkeypatch.setattr("semiseg.preparation.volume.machine_memory", lambda: 8 * 20**3)
    scan = Volume(Path("scan"), np.zeros((10, 10, 10), np.float32), np.eye(4))
    assert scan.resampled((0.5, 0.5, 0.5)).values.shape == (20, 20, 20)
    with pytest.raises(
        ValueError, match="scan: 10 × 10 × 10 voxels of 1 × 1 × 1 mm are 20 × 20 × 40 of .* GB"
    ):
        scan.resampled((0.5, 0.5, 0.25))
