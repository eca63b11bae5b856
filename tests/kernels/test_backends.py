"""The choice of backend: forced, automatic, by environment, and without the compiled extension."""

import logging
import subprocess
import sys
import warnings

import pytest
import torch

from semiseg_kernels import available_backends, backends, dice_ce, prototype_similarity, use_backend

Z, PROTOTYPES = torch.randn(1, 16, 9), torch.randn(2, 3, 16)


@pytest.fixture
def without_extension(monkeypatch):
    reason = "the compiled extension for cpu is missing (No module named 'semiseg_kernels._C')"
    monkeypatch.setitem(backends._missing_reasons, "cpu", reason)
    backends._warn_once.cache_clear()
    yield
    backends._warn_once.cache_clear()


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def test_reference_is_always_available():
    assert "reference" in available_backends()
    assert set(available_backends()) <= set(backends.BACKENDS)


def test_unknown_name():
    accepted = r"accepted are 'auto', 'cpu', 'cuda', 'triton', 'reference'$"
    with pytest.raises(ValueError, match=rf"^the backend is 'gpu', {accepted}"), use_backend("gpu"):
        pass


def test_environment():
    code = "import semiseg_kernels.backends as b; print(b._requested)"
    assert python(code, SEMISEG_BACKEND="reference").stdout == "reference\n"
    assert python(code).stdout == "auto\n"
    failed = python(code, SEMISEG_BACKEND="gpu")
    accepted = "'auto', 'cpu', 'cuda', 'triton', 'reference'"
    expected = f"ValueError: SEMISEG_BACKEND is 'gpu', accepted are {accepted}"
    assert failed.returncode != 0 and failed.stderr.splitlines()[-1] == expected


@pytest.mark.parametrize(("device", "expected"), [("cuda", False), ("cuda:0", True), ("cuda:1", False)])
def test_a_gpu_without_a_number_is_the_current_one(monkeypatch, device, expected):
    monkeypatch.setattr(backends, "missing", lambda backend: None)
    monkeypatch.setattr(backends, "device_type", lambda backend: "cuda")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", [(9, 0), (7, 5)].__getitem__)
    assert backends.has_gpu_kernels(torch.device(device)) == expected


def test_use_backend_nests_and_restores():
    assert backends._requested == "auto"
    with use_backend("reference"):
        with use_backend("auto"):
            assert backends._requested == "auto"
        assert backends._requested == "reference"
        with pytest.raises(KeyError), use_backend("cpu"):
            raise KeyError
        assert backends._requested == "reference"
    assert backends._requested == "auto"


@pytest.mark.parametrize(
    ("z", "prototypes", "reason"),
    [
        (Z.double(), PROTOTYPES, "it takes torch.float32, torch.bfloat16, torch.float16, the input is torch.float64"),
        (Z, torch.randn(171, 3, 16), "it keeps at most 512 prototypes or classes, the input has 513"),
        (
            torch.randn(1, 4097, 2),
            torch.randn(1, 1, 4097),
            "it takes at most 4096 channels, the input has 4097",
        ),
        (Z.to("meta"), PROTOTYPES.to("meta"), "the tensors are on meta"),
    ],
    ids=["dtype", "clusters", "width", "device"],
)
def test_what_cpu_cannot_run(z, prototypes, reason, caplog):
    if "cpu" not in available_backends():
        pytest.skip("backend 'cpu' is not available here")
    with use_backend("cpu"), pytest.raises(ValueError) as error:
        prototype_similarity(z, prototypes)
    assert str(error.value) == f"backend 'cpu' cannot run prototype_similarity: {reason}"
    with caplog.at_level(logging.DEBUG, logger="semiseg_kernels"):
        similarity, _ = prototype_similarity(z, prototypes)
    assert similarity.shape == (1, prototypes.shape[0], z.shape[2])
    assert caplog.messages == [str(error.value)]


def test_dice_ce_has_limits_too():
    if "cpu" not in available_backends():
        pytest.skip("backend 'cpu' is not available here")
    with (
        use_backend("cpu"),
        pytest.raises(ValueError, match="at most 512 prototypes or classes, the input has 513"),
    ):
        dice_ce(torch.randn(1, 513, 2), torch.zeros(1, 2, dtype=torch.int64))


def test_missing_extension_warns_once_and_runs(without_extension):
    assert "cpu" not in available_backends()
    with pytest.warns(UserWarning, match="pure PyTorch reference.*No module named 'semiseg_kernels._C'"):
        actual = prototype_similarity(Z, PROTOTYPES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(prototype_similarity(Z, PROTOTYPES), actual)
        with use_backend("reference"):
            torch.testing.assert_close(prototype_similarity(Z, PROTOTYPES), actual)


def test_missing_extension_is_the_reason_of_a_forced_backend(without_extension):
    with (
        use_backend("cpu"),
        pytest.raises(ValueError, match=r"the compiled extension for cpu is missing \(No module named"),
    ):
        prototype_similarity(Z, PROTOTYPES)


def test_asking_for_the_reference_does_not_warn(without_extension):
    with warnings.catch_warnings(), use_backend("reference"):
        warnings.simplefilter("error")
        prototype_similarity(Z, PROTOTYPES)


def test_warning_is_given_while_compiling(without_extension):
    torch._dynamo.reset()
    compiled = torch.compile(prototype_similarity, fullgraph=True, backend="eager")
    with pytest.warns(UserWarning, match="pure PyTorch reference"):
        compiled(Z, PROTOTYPES)


def test_import_needs_no_extension(tmp_path):
    """In a process where the extension cannot be imported, everything else can."""
    code = (
        "import sys; sys.modules['semiseg_kernels._C'] = None\n"
        "import semiseg_kernels as s, torch\n"
        "similarity, _ = s.prototype_similarity(torch.ones(1, 4, 2), torch.ones(1, 1, 4))\n"
        "print(s.available_backends(), similarity.sum())"
    )
    done = python(code)
    assert done.stdout == "('reference',) tensor(2.)\n", done.stderr
    assert done.stderr.count("UserWarning") == 1
