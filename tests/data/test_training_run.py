"""A whole training run, both stages and validation included, on made-up files: the test set stays closed."""

import pytest
from small_runs import SLICES, VOLUMES

from semiseg.config import load_config
from semiseg.engine.trainer import train

TWO_AND_TWO = ["method.pretraining_iterations=2", "method.iterations=2"]


@pytest.mark.parametrize(
    ("folder", "config", "overrides", "splits"),
    [
        ("left_atrium", "la_mper", [*VOLUMES, *TWO_AND_TWO, "method.zero_box=[10, 10, 10]"], ["test"]),
        (
            "acdc",
            "acdc_mper",
            [*SLICES, *TWO_AND_TWO, "method.zero_box=[10, 10]"],
            ["validation", "test"],
        ),
        ("left_atrium", "la_supervised", [*VOLUMES, "method.iterations=2"], ["test"]),
    ],
)
def test_training_opens_no_test_file(folder, config, overrides, splits, request, opened, tmp_path):
    root = request.getfixturevalue(folder)
    opened.clear()  # the fixture wrote its files
    test_names = (root / "test.list").read_text().split()
    output = tmp_path / "run"
    run = train(load_config(config, [*overrides, f"dataset.root={root}", f"output={output}"]))
    assert opened and not [path for path in opened for name in test_names if name in path]
    assert run.checkpoint("validation").is_file() == ("validation" in splits)
