"""Pictures are written whole, and show what they should."""

import json

import matplotlib.image
import numpy as np
import pytest

from semiseg.data import Case
from semiseg.evaluation import figures
from semiseg.evaluation.figures import COLOURS, difference_figure, learning_curves, overlay
from semiseg.evaluation.metrics import case_overlaps
from semiseg.reporting.page import Picture

NAMES = ("background", "ball", "shell")


def pixels_of(picture, colour: str) -> int:
    """How many pixels of a picture have exactly a colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    pixels = np.round(matplotlib.image.imread(picture)[..., :3] * 255)
    return int((pixels == wanted).all(axis=2).sum())


def assert_picture(picture, smallest_side: int) -> None:
    pixels = matplotlib.image.imread(picture)
    assert min(pixels.shape[:2]) >= smallest_side
    assert pixels[..., :3].std() > 0.05
    assert [path.name for path in picture.parent.iterdir() if path.suffix == ".png"] == [picture.name]


def case_of(shape: tuple[int, ...], spacing=None) -> Case:
    """A ball in a shell in noise."""
    centre = np.reshape(shape, (-1, *[1] * len(shape))) / 2
    scale = np.reshape(np.minimum(shape, 40), centre.shape)
    distance = np.sqrt((((np.indices(shape) - centre) / scale) ** 2).sum(axis=0))
    label = np.where(distance < 0.25, 1, np.where(distance < 0.4, 2, 0)).astype(np.uint8)
    image = np.random.default_rng().standard_normal(shape).astype(np.float32) * 0.2 + label
    return Case("case", image, label, spacing)


@pytest.mark.parametrize("spacing", [None, (0.6, 0.6, 1.2)])
@pytest.mark.parametrize("shape", [(40, 36, 30), (10, 60, 70), (50, 40), (50, 40, 1), (1, 50, 40)])
def test_overlay(tmp_path, shape, spacing):
    case = case_of(shape, None if spacing is None else spacing[-len(shape) :])
    prediction = np.roll(case.label, 2, axis=-1)
    picture = tmp_path / "overlay.png"
    overlay(case, prediction, case_overlaps(prediction, case.label, NAMES), picture, "shifted", NAMES)
    assert_picture(picture, 400)
    for colour in COLOURS[:2]:
        assert pixels_of(picture, colour) > 50
    assert pixels_of(picture, COLOURS[2]) == 0


@pytest.mark.parametrize(("slices", "shown"), [(1, [0]), (2, [0, 1]), (11, [2, 5, 8])])
def test_slices_of_a_stack_are_spread_over_the_truth_each_once(slices, shown):
    label = np.ones((slices, 60, 50), np.uint8)
    planes = figures._planes(Case("case", np.zeros(label.shape, np.float32), label, None))
    assert [name for name, _, _ in planes] == [f"slice {number}" for number in shown]


@pytest.mark.parametrize("missing", ["prediction", "truth", "both", "one class"])
def test_overlay_of_nothing(tmp_path, missing):
    case = case_of((12, 60, 50))
    truth, prediction = case.label.copy(), case.label.copy()
    if missing in ("truth", "both"):
        truth[:] = 0
    if missing in ("prediction", "both"):
        prediction[:] = 0
    if missing == "one class":
        prediction[prediction == 1] = 2
    metrics = case_overlaps(prediction, truth, NAMES)
    nothing = Case("case", case.image, truth, None)
    overlay(nothing, prediction, metrics, tmp_path / "overlay.png", "nothing", NAMES)
    assert_picture(tmp_path / "overlay.png", 400)


def test_overlay_of_a_constant_image(tmp_path):
    case = case_of((20, 24, 28))
    constant = Case("case", np.zeros_like(case.image), case.label, None)
    metrics = case_overlaps(case.label, case.label, NAMES)
    overlay(constant, case.label, metrics, tmp_path / "overlay.png", "constant", NAMES)
    assert_picture(tmp_path / "overlay.png", 400)


def test_an_overlay_says_the_dice_it_is_given(tmp_path, monkeypatch):
    case, drawn = case_of((20, 24, 28)), []
    monkeypatch.setattr(figures, "save_figure", lambda figure, picture: drawn.append(figure))
    metrics = {"shell": {"dice": 0.25}, "ball": {"dice": 0.75}}
    overlay(case, case.label, metrics, tmp_path / "overlay.png", "given", NAMES)
    texts = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert texts[:2] == ["ball, Dice 0.750", "shell, Dice 0.250"]


def test_dollar_signs_in_names_make_no_formula(tmp_path):
    case = case_of((20, 24, 28))
    names = ("background", "$_$", "b$\\x$")
    metrics = case_overlaps(case.label, case.label, names)
    overlay(case, case.label, metrics, tmp_path / "overlay.png", "best: scan$^$", names)
    assert_picture(tmp_path / "overlay.png", 400)
    assert Picture.of_figure(difference_figure(["a$_$", "b"], {"$_$": np.arange(2.0)}), "").source


def test_learning_curves(tmp_path):
    generator = np.random.default_rng()
    records = [
        {"iteration": i, "stage": "pre-training", "total": generator.random(), "learning_rate": 0.01}
        for i in range(1, 31)
    ]
    for i in range(31, 3001):
        records.append(
            {
                "iteration": i,
                "stage": "self-training",
                "total": generator.random(),
                "ramp_up": i / 3000,
                "learning_rate": 0.01,
            }
        )
        if i % 1000 == 0:
            records.append({"iteration": i, "stage": "self-training", "validation_dice": 0.5})
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    learning_curves(metrics, tmp_path / "curves.png")
    assert_picture(tmp_path / "curves.png", 600)
    assert pixels_of(tmp_path / "curves.png", COLOURS[0]) > 1000


def test_learning_curves_of_one_iteration(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(json.dumps({"iteration": 1, "stage": "supervised", "total": 1.0}) + "\n")
    learning_curves(metrics, tmp_path / "curves.png")
    assert_picture(tmp_path / "curves.png", 300)


def test_learning_curves_of_nothing(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("")
    with pytest.raises(ValueError, match="holds no iteration"):
        learning_curves(metrics, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
