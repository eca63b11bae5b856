"""Pictures are written whole, and show what they should."""

import json

import matplotlib.image
import numpy as np
import pytest
from matplotlib.text import Text

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
    return Case("case", image[np.newaxis], label, spacing)


@pytest.mark.parametrize("spacing", [None, (0.6, 0.6, 1.2)])
@pytest.mark.parametrize("shape", [(40, 36, 30), (10, 60, 70), (50, 40), (50, 40, 1), (1, 50, 40), (50, 1), (50, 1, 1)])
def test_overlay(tmp_path, shape, spacing):
    case = case_of(shape, None if spacing is None else spacing[-len(shape) :])
    prediction = np.roll(case.label, 2, axis=-1)
    picture = tmp_path / "overlay.png"
    overlay(case, prediction, case_overlaps(prediction, case.label, NAMES), picture, "shifted", NAMES)
    assert_picture(picture, 400)
    if sorted(shape)[-2] == 1:
        return  # a line
    for colour in COLOURS[:2]:
        assert pixels_of(picture, colour) > 50
    assert pixels_of(picture, COLOURS[2]) == 0


@pytest.mark.parametrize(("slices", "shown"), [(1, [0]), (2, [0, 1]), (11, [2, 5, 8])])
def test_slices_of_a_stack_are_spread_over_the_truth_each_once(slices, shown):
    label = np.ones((slices, 60, 50), np.uint8)
    planes = figures._planes(Case("case", np.zeros((1, *label.shape), np.float32), label, None))
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


@pytest.mark.parametrize("orientation", [None, "RAS", "LPS", "SPL", "ASR"])
@pytest.mark.parametrize("channels", [2, 3])
def test_the_first_channel_is_shown(tmp_path, monkeypatch, orientation, channels):
    label = np.random.default_rng(0).integers(0, 3, (20, 24, 28), dtype=np.uint8)
    image = np.stack([label.astype(np.float32), *np.random.default_rng(1).random((channels - 1, *label.shape), np.float32)])
    drawn = []
    monkeypatch.setattr(figures, "_draw_plane", lambda _, image, truth, *__: drawn.append((image, truth)))
    metrics = case_overlaps(label, label, NAMES)
    overlay(Case("case", image, label, None), label, metrics, tmp_path / "overlay.png", "", NAMES, orientation)
    assert len(drawn) == 3
    for shown, truth in drawn:
        np.testing.assert_array_equal(shown, truth)


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "SPL", "ASR"])
def test_volumes_are_shown_as_radiologists_look_at_them(orientation, tmp_path, monkeypatch):
    """What is to the right, anterior and superior lies at the upper left of every plane."""
    shape, spacing = (20, 24, 28), (1.0, 2.0, 1.5)
    label = np.zeros(shape, np.uint8)
    label[tuple(slice(-8, -2) if code in "RAS" else slice(2, 8) for code in orientation)] = 1
    drawn = []
    monkeypatch.setattr(
        figures, "_draw_plane", lambda _, __, truth, ___, ____, aspect: drawn.append((truth, aspect))
    )
    case = Case("case", np.zeros((1, *shape), np.float32), label, spacing)
    metrics = case_overlaps(label, label, NAMES)
    overlay(case, label, metrics, tmp_path / "overlay.png", "turned", NAMES, orientation)
    assert len(drawn) == 3
    for truth, _ in drawn:
        rows, columns = np.nonzero(truth)
        assert len(rows) == 36 and rows.max() < 8 and columns.max() < 8
    left, posterior, superior = (
        next(size for code, size in zip(orientation, spacing, strict=True) if code in codes)
        for codes in ("LR", "AP", "IS")
    )
    expected = [posterior / left, superior / left, superior / posterior]
    assert [aspect for _, aspect in drawn] == pytest.approx(expected)


def test_thick_axial_slices_are_a_stack_whichever_axis_they_lie_along(tmp_path, monkeypatch):
    case, titles = case_of((60, 60, 11), (1.0, 1.0, 8.0)), []
    monkeypatch.setattr(
        figures, "save_figure", lambda figure, _: titles.extend(axis.get_title() for axis in figure.axes)
    )
    metrics = case_overlaps(case.label, case.label, NAMES)
    overlay(case, case.label, metrics, tmp_path / "overlay.png", "stack", NAMES, "RAS")
    assert len(titles) == 3 and all(title.startswith("slice ") for title in titles)


@pytest.mark.parametrize("shape", [(50, 40), (20, 24, 28)])
def test_long_names_stay_in_the_picture(shape, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, _: drawn.append(figure))
    case = case_of(shape)
    vertebrae = [f"vertebra {number} of the thoracic spine" for number in range(1, 13)]
    for names in (("background", "a" * 200, "left lobe of the liver"), ("background", *vertebrae)):
        metrics = case_overlaps(case.label, case.label, names)
        overlay(case, case.label, metrics, tmp_path / "overlay.png", f"best: {'series_' * 30}", names)
    cases = [f"{number}_{'series_' * 20}" for number in range(3)]
    drawn.append(difference_figure(cases, {"key=value, " * 30: np.arange(3.0)}))
    for figure in drawn:
        figure.set_dpi(130)  # as in the file
        figures.draw_figure(figure, tmp_path / "drawn.png")
        shown = [part for part in figure.get_children() if getattr(part, "axison", True)]
        texts = [text for part in shown for text in part.findobj(Text) if text.get_visible() and text.get_text()]
        assert len(texts) > 4
        for text in texts:
            box = text.get_window_extent()
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
        assert min(axis.bbox.height for axis in figure.axes) > 100


def test_characters_that_the_font_lacks_are_no_warnings(tmp_path, recwarn):
    figures.draw_figure(difference_figure(["肝脏", "b"], {"研究": np.arange(2.0)}), tmp_path / "picture.png")
    assert not recwarn.list


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
    metrics.write_text('{"iteration": 1')
    with pytest.raises(ValueError, match="metrics.jsonl is damaged"):
        learning_curves(metrics, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
