import numpy as np
import pytest

from semiseg.data import open_dataset, phantom
from semiseg.data.phantom import Phantom
from semiseg_kernels import largest_components


def small(seed: int = 0, **sizes: int) -> Phantom:
    return Phantom(seed, shape=(24, 20, 16), **sizes)


def test_splits_and_sizes():
    dataset = open_dataset("phantom")
    labelled, unlabelled = dataset.training_cases(4)
    assert (len(labelled), len(unlabelled)) == (4, 36)
    assert dataset.class_names == ("background", "chamber", "wall")
    assert (dataset.dimensions, dataset.has_validation) == (3, True)
    for case in labelled + unlabelled:
        assert case.image.shape == (1, *case.label.shape) == (1, 64, 64, 48)
        assert (case.image.dtype, case.label.dtype, case.spacing) == (np.float32, np.uint8, (1.0, 1.0, 1.0))
        assert abs(case.image.mean()) < 1e-3 and abs(case.image.std() - 1) < 1e-3
        fractions = np.bincount(case.label.ravel(), minlength=3) / case.label.size
        assert len(fractions) == 3 and fractions[0] > 0.7 and fractions[1:].min() > 0.005


def test_numbers_of_evaluation_cases():
    dataset = open_dataset("phantom")
    names = {
        split: [case.name for case in dataset.evaluation_cases(split)] for split in ("validation", "test")
    }
    assert [len(names["validation"]), len(names["test"])] == [4, 12]
    assert not set(names["validation"]) & set(names["test"])


def test_the_same_seed_gives_the_same_cohort_in_any_order():
    first, second = small(), small()
    tests = list(first.evaluation_cases("test"))
    labelled, unlabelled = first.training_cases(3)
    other_labelled, other_unlabelled = second.training_cases(30)
    for case, other in zip(labelled + unlabelled, other_labelled + other_unlabelled, strict=True):
        np.testing.assert_array_equal(case.image, other.image)
        np.testing.assert_array_equal(case.label, other.label)
    for case, other in zip(tests, second.evaluation_cases("test"), strict=True):
        np.testing.assert_array_equal(case.image, other.image)


def test_a_larger_cohort_begins_with_the_smaller_one():
    fewer, more = (small(training=count).training_cases(1) for count in (2, 3))
    np.testing.assert_array_equal(fewer[1][0].image, more[1][0].image)


def test_no_two_cases_are_alike():
    cases = [*small().training_cases(40)[0], *small().evaluation_cases("validation")]
    cases += [*small().evaluation_cases("test"), *small(seed=1).training_cases(40)[0]]
    assert (
        len({case.label.tobytes() for case in cases})
        == len({case.image.tobytes() for case in cases})
        == len(cases)
    )


def test_cohort_seed_is_passed_on():
    case = next(open_dataset("phantom", cohort_seed=5).evaluation_cases("test"))
    np.testing.assert_array_equal(case.image, next(Phantom(5).evaluation_cases("test")).image)


def test_some_cases_alone_are_those_of_the_cohort(monkeypatch):
    third = list(small().evaluation_cases("test"))[2]
    generated = []
    render = phantom._Anatomy.render
    monkeypatch.setattr(phantom._Anatomy, "render", lambda self: generated.append(1) or render(self))
    (case,) = small().evaluation_cases("test", [third.name])
    assert case.name == third.name and len(generated) == 1
    np.testing.assert_array_equal(case.image, third.image)


def test_training_generates_no_test_case(monkeypatch):
    splits = []
    cases = Phantom._cases
    monkeypatch.setattr(Phantom, "_cases", lambda self, split, *only: splits.append(split) or cases(self, split, *only))
    dataset = small()
    dataset.training_cases(2)
    list(dataset.evaluation_cases("validation"))
    assert splits == ["training", "validation"]


@pytest.mark.parametrize("seed", [0, 1])
def test_structures_are_nearly_connected_and_contrast_has_both_signs(seed):
    import torch

    signs = []
    for case in Phantom(seed, training=20).training_cases(20)[0]:
        kept = largest_components(torch.from_numpy(case.label)[None], 3)[0].numpy()
        for value in (1, 2):
            assert (kept == value).sum() > 0.8 * (case.label == value).sum()
        signs.append(case.image[0][case.label == 1].mean() > case.image[0][case.label == 0].mean())
    assert 0 < sum(signs) < len(signs)
