"""Metrics against medpy, to the last digit, and against numbers worked out by hand."""

import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from medpy.metric import binary
from scipy import ndimage

from semiseg.evaluation.metrics import DISTANCES, METRICS, case_metrics, case_overlaps, summarise

NAMES = ("background", "inner", "outer", "third")
MEDPY = {"dice": binary.dc, "jaccard": binary.jc, "hd95": binary.hd95, "asd": binary.asd}


def blobs(
    generator: np.random.Generator, shape: tuple[int, ...], classes: int, smoothness: float
) -> np.ndarray:
    """A label map of smooth random structures, all classes present."""
    field = ndimage.gaussian_filter(generator.standard_normal(shape), smoothness)
    return np.digitize(field, np.quantile(field, np.linspace(0, 1, classes + 1)[1:-1])).astype(np.uint8)


def assert_equals_medpy(prediction: np.ndarray, truth: np.ndarray, names: tuple[str, ...]) -> None:
    result = case_metrics(prediction, truth, names)
    assert list(result) == list(names[1:])
    for label, name in enumerate(names[1:], start=1):
        for metric, function in MEDPY.items():
            assert result[name][metric] == function(prediction == label, truth == label), (name, metric)


@pytest.mark.parametrize("shape", [(37, 41), (23, 30, 17), (1, 12, 9), (5, 40, 36)])
@pytest.mark.parametrize("smoothness", [0.5, 2.0])
def test_medpy_on_blobs(shape, smoothness):
    generator = np.random.default_rng()
    truth = blobs(generator, shape, 4, smoothness)
    assert_equals_medpy(blobs(generator, shape, 4, smoothness), truth, NAMES)
    assert_equals_medpy(np.roll(truth, 2, axis=-1), truth, NAMES)
    assert_equals_medpy(truth, truth, NAMES)


def test_medpy_on_small_structures_in_a_corner():
    prediction, truth = np.zeros((2, 30, 28, 26), np.uint8)
    prediction[0, 0, 0] = 1
    truth[25:, 20:, 18:] = 1
    assert_equals_medpy(prediction, truth, ("background", "inner"))
    assert_equals_medpy(truth, prediction, ("background", "inner"))


def test_medpy_with_spacing():
    generator = np.random.default_rng()
    truth, prediction = blobs(generator, (14, 25, 22), 2, 2.0), blobs(generator, (14, 25, 22), 2, 2.0)
    for spacing in [(0.625, 0.625, 0.625), (8.0, 1.4, 1.2)]:
        metrics = case_metrics(prediction, truth, NAMES[:2], spacing)["inner"]
        assert metrics["unit"] == "mm"
        expected = binary.hd95(prediction == 1, truth == 1, voxelspacing=spacing)
        assert metrics["hd95_mm"] == pytest.approx(expected, rel=1e-12)
        sides = [
            binary.asd(a == 1, b == 1, voxelspacing=spacing)
            for a, b in ((prediction, truth), (truth, prediction))
        ]
        sizes = [(a ^ ndimage.binary_erosion(a)).sum() for a in (prediction == 1, truth == 1)]
        assert metrics["assd_mm"] == pytest.approx(np.average(sides, weights=sizes), rel=1e-12)
        assert metrics["hd95"] == binary.hd95(prediction == 1, truth == 1)


@pytest.mark.data
@pytest.mark.parametrize(
    "pattern, names", [("LA/*/*/mri_norm2.h5", ("background", "atrium")), ("ACDC/data/*.h5", NAMES)]
)
def test_medpy_on_real_labels(pattern, names):
    files = sorted(Path(os.environ["SEMISEG_DATA"]).glob(pattern))
    if not files:
        pytest.skip(f"no {pattern} below SEMISEG_DATA")
    generator = np.random.default_rng()
    with h5py.File(files[generator.integers(len(files))]) as file:
        truth = file["label"][:]
    shift = generator.integers(-4, 5, size=truth.ndim)
    shift[0] = min(shift[0], 1)
    assert_equals_medpy(np.roll(truth, shift, axis=range(truth.ndim)), truth, names)


def test_worked_by_hand():
    # Two 3-voxel bars, one voxel apart along the bar: 2 voxels in common, of 3 + 3, and 4 in the union.
    prediction, truth = np.zeros((2, 5, 9), np.uint8)
    truth[2, 1:4] = 1
    prediction[2, 2:5] = 1
    metrics = case_metrics(prediction, truth, ("background", "bar"), spacing=(2.0, 3.0))["bar"]
    assert metrics["dice"] == 2 * 2 / 6
    assert metrics["jaccard"] == 2 / 4
    assert metrics["asd"] == pytest.approx(1 / 3)  # prediction to truth: 0, 0, 1
    assert metrics["assd_mm"] == pytest.approx(3 * 2 / 6)  # both ways: 0, 0, 3 mm and 3, 0, 0 mm
    assert metrics["hd95"] == pytest.approx(1.0)  # 4.75th of 0, 0, 0, 0, 1, 1
    assert metrics["hd95_mm"] == pytest.approx(3.0)
    assert metrics["unit"] == "mm"
    assert not metrics["empty_prediction"] and not metrics["empty_truth"]


def test_one_direction_differs_from_both():
    prediction, truth = np.zeros((2, 4, 12), np.uint8)
    prediction[1, 1] = 1
    truth[1, [1, 9]] = 1
    metrics = case_metrics(prediction, truth, ("background", "dots"))["dots"]
    assert metrics["asd"] == 0.0
    assert metrics["assd_mm"] == pytest.approx(8 / 3)
    assert metrics["unit"] == "voxel"


def test_distances_to_an_empty_map_are_the_diagonal_and_two_empty_maps_agree():
    nothing = np.zeros((3, 4, 12), np.uint8)
    something = nothing.copy()
    something[1, 2, 3] = 1
    for prediction, truth in ((nothing, something), (something, nothing)):
        metrics = case_metrics(prediction, truth, ("background", "dot"), spacing=(4.0, 3.0, 1.0))["dot"]
        assert metrics["dice"] == metrics["jaccard"] == 0.0
        assert metrics["hd95"] == metrics["asd"] == 13.0
        assert metrics["hd95_mm"] == metrics["assd_mm"] == pytest.approx((144 * 3) ** 0.5)
        assert metrics["empty_prediction"] == (prediction is nothing)
        assert metrics["empty_truth"] == (truth is nothing)
    metrics = case_metrics(nothing, nothing, ("background", "dot"))["dot"]
    assert metrics["dice"] == metrics["jaccard"] == 1.0
    assert all(metrics[distance] == 0.0 for distance in ("hd95", "asd", "hd95_mm", "assd_mm"))
    assert metrics["empty_prediction"] and metrics["empty_truth"]


def test_overlaps_alone_are_those_among_all_metrics():
    generator = np.random.default_rng()
    for shape in ((37, 41), (23, 30, 17)):
        truth, prediction = blobs(generator, shape, 3, 1.0), blobs(generator, shape, 3, 1.0)
        prediction[prediction == 2] = 0
        expected = case_metrics(prediction, truth, NAMES)
        assert expected["outer"]["empty_prediction"] and expected["third"]["dice"] == 1
        for metrics in expected.values():
            for key in ("unit", *DISTANCES):
                del metrics[key]
        assert case_overlaps(prediction, truth, NAMES) == expected


def test_a_summary_is_of_cases_for_a_class_and_of_class_means_for_all():
    generator = np.random.default_rng()
    truth = blobs(generator, (12, 14, 10), 3, 1.5)
    predictions = {str(shift): np.roll(truth, shift, axis=1) for shift in range(3)}
    predictions["empty"] = np.where(truth == 1, 0, truth)
    cases = {name: case_metrics(prediction, truth, NAMES[:3]) for name, prediction in predictions.items()}
    summary = summarise(cases)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert json.loads(json.dumps(cases, allow_nan=False)) == cases
    assert summary["num_cases"] == 4 and summary["unit"] == "voxel"
    assert summary["empty_prediction"] == 1 and summary["empty_truth"] == 0
    assert summary["classes"]["inner"]["empty_prediction"] == 1
    assert summary["classes"]["outer"]["empty_prediction"] == 0
    for metric in METRICS:
        inner, outer = (np.array([case[name][metric] for case in cases.values()]) for name in NAMES[1:3])
        statistics = summary["classes"]["inner"][metric]
        assert statistics == pytest.approx({"mean": inner.mean(), "sd": inner.std()})
        mean = (inner + outer) / 2
        assert summary["mean"][metric] == pytest.approx({"mean": mean.mean(), "sd": mean.std()})


def test_summary_of_mixed_units():
    truth = np.ones((4, 4), np.uint8)
    with_spacing, without = (case_metrics(truth, truth, NAMES[:2], spacing) for spacing in ((1.0, 1.0), None))
    assert summarise({"a": with_spacing, "b": without})["unit"] == "mixed"


def test_shapes_and_spacings_that_differ_and_no_cases_are_refused():
    for function in (case_metrics, case_overlaps):
        with pytest.raises(ValueError, match="prediction has shape"):
            function(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8), NAMES)
    with pytest.raises(ValueError, match="spacing has 1 values"):
        case_metrics(np.zeros((2, 3), np.uint8), np.zeros((2, 3), np.uint8), NAMES, spacing=(1.0,))
    with pytest.raises(ValueError, match="at least one"):
        summarise({})
