"""Pictures of one's own, from colours and masks to a trained network and masks of new ones."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from challenge_files import LPS, write_nifti
from PIL import Image
from small_runs import MPER, SLICES
from untrained_runs import untrained_run

from semiseg.config import load_config
from semiseg.data import open_dataset
from semiseg.data.preprocessing import EIGHT_BITS, Intensity, Preprocessing
from semiseg.engine.trainer import train
from semiseg.evaluate import evaluate
from semiseg.predict import main as predict_command
from semiseg.preparation.volume_files import read_channels, scans_in
from semiseg.prepare import main as prepare_command

predict = predict_command.__wrapped__  # without the exit status
TINY = [*SLICES[:3], "training.patch_size=[32, 48]", *SLICES[3:5], "evaluation.batch=2"]
Source = tuple[Path, Path]


def painted(random: np.random.Generator, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture of a reddish disc on bluish ground, and its mask, 255 in the disc."""
    y, x = np.mgrid[:rows, :columns]
    radius = min(rows, columns) / 4
    centre = random.uniform(radius, 1.4 * radius, 2)  # not in the middle, so that mirrored it is elsewhere
    disc = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
    colours = np.where(disc[..., None], (200, 60, 50), (40, 70, 150)) + random.normal(0, 8, (rows, columns, 3))
    return colours.clip(0, 255).astype(np.uint8), disc * np.uint8(255)


@pytest.fixture
def source(tmp_path) -> Source:
    """Eight pictures of different sizes, six of them with a mask."""
    random = np.random.default_rng()
    images, labels = tmp_path / "source" / "images", tmp_path / "source" / "labels"
    for folder in (images, labels):
        folder.mkdir(parents=True)
    for number in range(8):
        picture, mask = painted(random, 60 + 4 * number, 90 + 6 * number)
        Image.fromarray(picture).save(images / f"p{number}.{'png' if number % 2 else 'jpg'}", quality=95)
        if number < 6:
            Image.fromarray(mask).save(labels / f"p{number}.png")
    return images, labels


def prepare(source: Source, *options: str) -> Path:
    dest = source[0].parent.parent / "dest"
    prepare_command.__wrapped__(["own", *map(str, source), str(dest), *options])
    return dest


def test_pictures_are_resized_and_scaled(source, capsys):
    dest = prepare(source, "--size", "32", "48")
    dataset = open_dataset("own", dest)
    assert dataset.preprocessing.channels == (Intensity("fixed", None, 0.0, 255.0),) * 3
    assert dataset.dimensions == 2 and dataset.label_values == (0, 255)
    for path in scans_in(source[0]):
        with h5py.File(dest / "cases" / f"{path.stem}.h5") as file:
            image, label = file["image"][()], file["label"][()] if "label" in file else None
            assert "spacing" not in file.attrs
        assert image.shape == (3, 1, 32, 48)
        # As the picture shows, not turned: means of its quarters.
        colours = np.asarray(Image.open(path), float) / 255
        rows, columns = colours.shape[0] // 2, colours.shape[1] // 2
        for y, x in np.ndindex(2, 2):
            given = colours[y * rows : (y + 1) * rows, x * columns : (x + 1) * columns].mean((0, 1))
            kept = image[:, 0, y * 16 : (y + 1) * 16, x * 24 : (x + 1) * 24].mean((1, 2))
            np.testing.assert_allclose(kept, given, atol=0.02)
        if label is not None:
            disc = np.asarray(Image.open(source[1] / f"{path.stem}.png")) > 0
            assert label.shape == (1, 32, 48) and set(np.unique(label)) == {0, 1}
            assert label.mean() == pytest.approx(disc.mean(), rel=0.15)
            assert (image[0, label > 0] > 0.5).mean() > 0.9
    printed = capsys.readouterr().out
    assert "8 images of 3 channels, 6 of them labelled" in printed and "columns, rows" in printed
    assert "all pictures resized to 32 × 48 pixels" in printed and "divided by 255" in printed
    assert " mm" not in printed and " ml" not in printed


def test_by_default_pictures_get_the_shape_of_the_median(source):
    configuration = yaml.safe_load((prepare(source) / "mper.yaml").read_text())
    assert configuration["training"]["patch_size"] == [80, 112]  # 74 and 111, in multiples of 16
    assert configuration["evaluation"]["stride"] is None
    assert configuration["dataset"]["augmentation"] == "rotate_flip_resize"


def test_sides_keep_pictures_as_they_are(source):
    for path in source[1].iterdir():
        mask = np.array(Image.open(path))
        mask[::2] //= 2
        Image.fromarray(mask).save(path)
    configuration = yaml.safe_load((prepare(source, "--classes", "left", "right") / "mper.yaml").read_text())
    assert configuration["dataset"]["augmentation"] == "crop"


@pytest.mark.parametrize("method", ["supervised", "mper", "vclipseg"])
def test_from_training_to_masks(method, source, tmp_path):
    """Results are in pixels, and a mask is a PNG of its picture's size with the values of the labels."""
    dest = prepare(source, "--size", "32", "48")
    overrides = {
        "supervised": ["method.iterations=2"],
        "mper": [*MPER, "method.zero_box=[20, 30]"],
        "vclipseg": ["method.iterations=2", "method.prompt_width=8", "method.text_width=8"],
    }
    config = load_config(str(dest / f"{method}.yaml"), [*TINY, *overrides[method], f"output={tmp_path / 'run'}"])
    run = train(config)
    evaluate(config, run)
    assert json.loads((run.path / "results.json").read_text())["summary"]["unit"] == "voxel"
    assert (run.path / "report.html").is_file()
    predict(["--run", str(run.path), "--input", str(source[0]), "--output", str(tmp_path / "masks")])
    for path in scans_in(source[0]):
        mask = np.asarray(Image.open(tmp_path / "masks" / f"{path.stem}.png"))
        assert mask.shape == np.asarray(Image.open(path)).shape[:2]
        assert set(np.unique(mask)) <= {0, 255}


def test_a_network_learns_what_is_red(source, tmp_path):
    """And its masks lie where the pictures show it."""
    dest = prepare(source, "--size", "32", "48")
    overrides = [*TINY, "network.filters=[4, 4, 4, 4, 4]", "method.iterations=150", f"output={tmp_path / 'run'}"]
    run = train(load_config(str(dest / "supervised.yaml"), overrides))
    name = "p7.png"
    for mask in ("mask.png", "mask.mha", "mask.nii.gz"):
        output = tmp_path / mask
        predict(["--run", str(run.path), "--input", str(source[0] / name), "--output", str(output)])
    picture = np.asarray(Image.open(source[0] / name))
    red = picture[..., 0] > picture[..., 2]
    shown = np.asarray(Image.open(tmp_path / "mask.png")) == 255
    assert 2 * (shown & red).sum() / (shown.sum() + red.sum()) > 0.8
    for mask in ("mask.mha", "mask.nii.gz"):
        (volume,) = read_channels([tmp_path / mask])
        np.testing.assert_array_equal(volume.turned("LPS").values[:, :, 0].T == 255, shown)


def test_pictures_may_show_nothing(source):
    path = source[1] / "p3.png"
    Image.fromarray(0 * np.asarray(Image.open(path))).save(path)
    dest = prepare(source, "--labelled", "4")
    with h5py.File(dest / "cases" / "p3.h5") as file:
        assert not file["label"][()].any()
    assert "p3" not in (dest / "findings.md").read_text()


def test_grey_pictures_of_sixteen_bits_are_standardised(tmp_path):
    random = np.random.default_rng()
    for number in range(4):
        picture, mask = painted(random, 64, 64)
        for folder, values in (("images", picture[..., 0].astype(np.uint16) * 200), ("labels", mask // 255)):
            (tmp_path / "source" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(tmp_path / "source" / folder / f"p{number}.png")
    dest = prepare((tmp_path / "source" / "images", tmp_path / "source" / "labels"))
    assert open_dataset("own", dest).preprocessing.channels == (Intensity(),)
    with h5py.File(dest / "cases" / "p0.h5") as file:
        assert file["image"].shape == (1, 64, 64) and file["image"][()].mean() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("deep", ["floating point up to 1", "one of 16 bits without a mask"])
def test_only_pictures_of_eight_bits_are_divided_by_255(deep, source):
    for folder in source:
        for path in folder.iterdir():
            grey = np.asarray(Image.open(path).convert("L"))
            path.unlink()
            if folder == source[0] and deep.startswith("floating"):
                grey = grey.astype(np.float32) / 255
            elif path.stem == "p7":
                grey = grey.astype(np.uint16) * 200
            Image.fromarray(grey).save(path.with_suffix(".tif"))
    assert open_dataset("own", prepare(source)).preprocessing.channels == (Intensity(),)


@pytest.mark.parametrize("names", [[], ["--classes", "disc"]])
def test_masks_that_all_show_nothing_are_refused(names, source):
    for path in source[1].iterdir():
        Image.fromarray(0 * np.asarray(Image.open(path))).save(path)
    with pytest.raises(ValueError, match="the 6 labels hold no value besides 0; expected some foreground"):
        prepare(source, *names)


def test_a_size_that_leaves_nothing_of_a_class_is_refused(source, tmp_path):
    for path in source[1].iterdir():
        mask = np.array(Image.open(path))
        mask[0, 0] = 7
        Image.fromarray(mask).save(path)
    with pytest.raises(ValueError, match="--size leaves no voxel of dot in the 5 cases to learn from, accepted is a larger"):
        prepare(source, "--size", "16", "16", "--skip-flip-check", "--classes", "dot", "disc")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_masks_beside_their_pictures_have_an_ending(source):
    for path in source[1].iterdir():
        path.rename(source[0] / f"{path.stem}_truth.png")
    with pytest.raises(FileNotFoundError, match="holds no labels; .*called NAME_gt, NAME_seg, NAME_label or NAME_mask"):
        prepare((source[0], source[0]))
    for path in source[0].glob("*_truth.png"):
        path.rename(source[0] / path.name.replace("_truth", "_mask"))
    assert len(list((prepare((source[0], source[0])) / "cases").iterdir())) == 8


def test_a_network_of_eight_bits_refuses_brighter_scans(tmp_path):
    """Such as pictures of 16 bits, or a CT: it knows nothing like them."""
    run = untrained_run(tmp_path / "run", "acdc_supervised", Preprocessing("SPL", None, (EIGHT_BITS,)))
    grey = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / "eight.png")
    predict(["--run", str(run), "--input", str(tmp_path / "eight.png"), "--output", str(tmp_path / "mask.png")])
    Image.fromarray(grey).save(tmp_path / "sixteen.png")
    with pytest.raises(ValueError, match="sixteen.png: its values go from 0 to 1023; expected 0 to 255"):
        predict(["--run", str(run), "--input", str(tmp_path / "sixteen.png"), "--output", str(tmp_path / "other.png")])


def test_a_colour_that_is_nowhere_is_no_error_but_no_colour_at_all_is(source):
    path = source[0] / "p1.png"
    picture = np.array(Image.open(path))
    picture[..., 1] = 0
    Image.fromarray(picture).save(path)
    prepare(source)
    Image.fromarray(np.full_like(picture, 7)).save(source[0] / "p7.png")
    (source[0].parent.parent / "dest").rename(source[0].parent.parent / "earlier")
    with pytest.raises(ValueError, match="p7.png: holds 7 everywhere"):
        prepare(source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--spacing", "1", "1", "1"], "--spacing is 1.0 1.0 1.0, accepted for pictures is none"),
        (["--modality", "mr"], "--modality is mr, accepted for pictures is none"),
        (["--size", "30", "48"], r"--size is \[30, 48\], accepted are two positive multiples of 16"),
    ],
)
def test_what_pictures_do_not_have_is_refused(options, message, source):
    with pytest.raises(ValueError, match=message):
        prepare(source, *options)


def test_masks_of_other_sizes_or_colours_are_refused(source):
    path = source[1] / "p2.png"
    mask = np.asarray(Image.open(path))
    Image.fromarray(mask[:-1]).save(path)
    with pytest.raises(ValueError, match="p2.png: the label has shape"):
        prepare(source)
    Image.fromarray(np.stack([mask, 0 * mask, mask], -1)).save(path)
    with pytest.raises(ValueError, match="p2.png: .*it has 2 colours; expected a number for each class"):
        prepare(source)


def test_masks_that_lie_mirrored_are_found_where_most_do(source):
    """One alone, of a picture, may look so by chance."""
    def mirror(name):
        path = source[1] / name
        Image.fromarray(np.asarray(Image.open(path))[::-1, ::-1]).save(path)

    mirror("p0.png")
    prepare(source)
    (source[0].parent.parent / "dest").rename(source[0].parent.parent / "earlier")
    for number in range(1, 6):
        mirror(f"p{number}.png")
    with pytest.raises(ValueError, match="labels lie mirrored against their images"):
        prepare(source)
    prepare(source, "--flip-labels", "xy")


def test_pictures_beside_volumes_are_no_scans(source, tmp_path):
    (source[0] / "volume.nii.gz").write_text("never read")
    assert scans_in(source[0]) == [source[0] / "volume.nii.gz"]


def test_a_mask_of_a_volume_is_no_picture(tmp_path, monkeypatch):
    run = untrained_run(tmp_path / "run")
    monkeypatch.setattr("semiseg.predict.Predictor", None)
    write_nifti(tmp_path / "scan.nii.gz", np.random.default_rng().normal(size=(32, 32, 16)), LPS)
    arguments = ["--run", str(run), "--input", str(tmp_path / "scan.nii.gz"), "--output", str(tmp_path / "mask.png")]
    with pytest.raises(ValueError, match="mask.png: accepted for a mask of 16 slices are .nii.gz, .nii, .mha"):
        predict(arguments)
