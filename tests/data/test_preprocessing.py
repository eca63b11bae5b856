"""How a new scan is brought to the form of a dataset's cases."""

import json
from pathlib import Path

import numpy as np
import pytest

from semiseg.data.acdc import ACDC
from semiseg.data.description import DatasetDescription
from semiseg.data.pancreas import Pancreas
from semiseg.data.preprocessing import Intensity, Preprocessing


def test_intensities_are_scaled_over_the_whole_scan():
    image = np.array([[0, 4], [4, 8]], np.int16)
    root = np.sqrt(2)
    assert Intensity().scaled(image) == pytest.approx(np.array([[-root, 0], [0, root]]))
    assert np.array_equal(Intensity("unit_range").scaled(image), [[0, 0.5], [0.5, 1]])
    assert np.array_equal(
        Intensity("fixed", clip=(2, 6), mean=4, deviation=2).scaled(image), [[-1, 0], [0, 1]]
    )
    assert Intensity().scaled(image).dtype == np.float32


@pytest.mark.parametrize("intensity", ["standardise", "unit_range"])
def test_a_scan_without_content_is_refused(intensity):
    with pytest.raises(ValueError, match="3.0 everywhere"):
        Intensity(intensity).scaled(np.full((4, 4), 3))
    with pytest.raises(ValueError, match="everywhere"):  # its deviation is 4e-16, from rounding
        Intensity(intensity).scaled(np.full((9, 7, 5), 3.1))


def test_an_intensity_that_does_not_exist_or_lacks_its_numbers_is_refused():
    with pytest.raises(ValueError, match="'z' *, accepted are standardise, unit_range, fixed"):
        Intensity("z")
    with pytest.raises(ValueError, match="fixed with mean None"):
        Intensity("fixed", deviation=1.0)
    with pytest.raises(ValueError, match="standardise with mean 1.0"):
        Intensity(mean=1.0, deviation=1.0)


@pytest.mark.parametrize("dataset", [ACDC, Pancreas])
def test_a_description_survives_its_file(dataset, tmp_path):
    description = DatasetDescription.of(dataset(Path("unused")))
    description.save(tmp_path / "dataset.json")
    assert DatasetDescription.load(tmp_path / "dataset.json") == description


def test_a_missing_or_strange_description_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="dataset.json: missing"):
        DatasetDescription.load(tmp_path / "dataset.json")
    described = (
        json.dumps({"class_names": ["a", "b"], "dimensions": 3, "preprocessing": preprocessing})
        for preprocessing in ({"colour": 1}, None, [], ["LPS"], "LPS", 3)
    )
    for text in ("{", "{}", "[]", "null", '"text"', *described):
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(ValueError, match=r"dataset.json: no description of a dataset \(.+\)$"):
            DatasetDescription.load(tmp_path / "dataset.json")


def test_values_of_labels_are_kept_and_no_difference_between_datasets(tmp_path):
    """A description from before they were kept has none."""
    file, scaled = tmp_path / "dataset.json", Preprocessing(None, None)
    description = DatasetDescription(("background", "organ"), 3, scaled, (0, 4))
    description.save(file)
    assert DatasetDescription.load(file) == description
    values = json.loads(file.read_text())
    del values["label_values"]
    file.write_text(json.dumps(values))
    older = DatasetDescription.load(file)
    assert older.label_values is None and older.difference(description) == ""
    assert "class_names" in older.difference(DatasetDescription(("background", "other"), 3, scaled))
    file.write_text(json.dumps({**values, "label_values": [0, 4, 7]}))
    with pytest.raises(ValueError, match="no description of a dataset"):
        DatasetDescription.load(file)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("class_names", "ab"),
        ("class_names", ["background"]),
        ("class_names", ["background", "a", "a"]),
        ("class_names", ["background", 1]),
        ("dimensions", "3"),
        ("label_values", [0, 0]),
        ("label_values", [0, 1, 2]),
        ("label_values", [0, -1]),
        ("label_values", [0, 1.5]),
        ("label_values", 7),
        ("orientation", "RAX"),
        ("orientation", "RLS"),
        ("orientation", 3),
        ("spacing", [1.0, 1.0]),
        ("spacing", [1.0, -1.0, 1.0]),
        ("spacing", [1.0, float("nan"), 1.0]),
        ("spacing", "1 1 1"),
        ("clip", [5.0, -5.0]),
        ("clip", [5.0]),
        ("deviation", 0.0),
        ("mean", "0"),
    ],
)
def test_a_field_that_was_edited_into_nonsense_is_named(field, value, tmp_path):
    file = tmp_path / "dataset.json"
    sound = Preprocessing("RAS", (1.0, 1.0, 2.0), (Intensity("fixed", (-5.0, 5.0), 0.0, 1.0),))
    description = DatasetDescription(("background", "organ"), 3, sound, (0, 4))
    description.save(file)
    assert DatasetDescription.load(file) == description
    values = json.loads(file.read_text())
    (values if field in values else values["preprocessing"])[field] = value
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"no description of a dataset .*{field}"):
        DatasetDescription.load(file)
