"""What holds of every public operation, whatever it is given: the reference's result or a ValueError, never a crash.

Every run looks at the same few examples. HYPOTHESIS_PROFILE=thorough looks at many more, and at new ones each time.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from comparison import DTYPES, assert_close_enough, in_layout, make_embedding, make_prototypes
from hypothesis import assume, given, note
from hypothesis import strategies as st
from torch import Tensor

from semiseg_kernels import (
    backends,
    batch_norm_relu,
    cluster_mean,
    convolution,
    dice_ce,
    largest_components,
    linear_classifier,
    linear_upsampling,
    masked_class_mean,
    momentum_update_,
    prompt_conv,
    prompt_mix,
    prototype_head,
    prototype_info_nce,
    prototype_similarity,
    strided_convolution,
    transposed_convolution,
    use_backend,
)
from semiseg_kernels.checks import INTEGER_DTYPES
from semiseg_kernels.native.extension import extension

# PyTorch's remarks on what is right all the same: even kernels, and complex numbers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.filterwarnings("ignore:Casting complex values to real"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
]
Draw = Callable[[st.SearchStrategy], Any]


@dataclass
class Call:
    """An operation with its arguments."""

    operation: Callable[..., Any]
    arguments: dict[str, Any]
    differentiable: tuple[str, ...] = ()
    scale: float = 1.0  # of the largest number that is rounded on the way to a result
    options: dict[str, Any] = field(default_factory=dict)

    def results(self, precise: bool = False) -> dict[str, Tensor]:
        """The results, and the gradient of each floating-point one to every argument that can have one."""
        arguments = copy.deepcopy(self.arguments)  # with their strides; one operation works in place
        if precise:
            arguments = {name: _double(value) for name, value in arguments.items()}
        inputs = {
            name: arguments[name] for name in self.differentiable if arguments[name].is_floating_point()
        }
        for tensor in inputs.values():
            tensor.requires_grad_()
        results = _named(self.operation(**arguments, **self.options))
        gradients = {}
        for name, result in results.items():
            if result.requires_grad:
                sent = torch.autograd.grad(
                    result, inputs.values(), _cotangent(result), retain_graph=True, allow_unused=True
                )
                for of, gradient in zip(inputs, sent, strict=True):
                    gradients[f"gradient of {name} to {of}"] = gradient
        return {name: result.detach() for name, result in results.items()} | {
            name: gradient for name, gradient in gradients.items() if gradient is not None
        }


def _named(result: Any) -> dict[str, Tensor]:
    if isinstance(result, Tensor):
        return {"result": result}
    names = getattr(result, "_fields", range(len(result)))
    return {str(name): value for name, value in zip(names, result, strict=True) if value is not None}


def _cotangent(result: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    uniform = (2 * torch.rand(result.shape, generator=generator) - 1).half()
    return uniform.to(device=result.device, dtype=result.dtype)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


# The same values in other memory. What lies between the elements of a slice must never be read.


def _sliced(x: Tensor) -> Tensor:
    shape = [2 * size + 1 for size in x.shape]
    around = torch.full(shape, _poison(x.dtype), dtype=x.dtype, device=x.device)
    view = around[tuple(slice(1, None, 2) for _ in x.shape)]
    return view.copy_(x)


def _poison(dtype: torch.dtype) -> float | int:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return 1 if dtype == torch.bool else torch.iinfo(dtype).max


def _transposed(x: Tensor) -> Tensor:
    reverse = tuple(reversed(range(x.dim())))
    return x.permute(reverse).contiguous().permute(reverse)


def _expanded(x: Tensor) -> Tensor:
    """Its first element along the first axis, in the place of all others."""
    return x[:1].expand(x.shape) if x.dim() and x.shape[0] else x


def _channels_last(x: Tensor) -> Tensor:
    return in_layout(x, "channels_last") if x.dim() > 1 else x


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels-last": _channels_last,
    "sliced": _sliced,
    "transposed": _transposed,
    "expanded": _expanded,
}


def lay_out(draw: Draw, x: Tensor) -> Tensor:
    return LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](x)


def written(draw: Draw, x: Tensor) -> Tensor:
    """Of something that is changed in place."""
    return LAYOUTS[draw(st.sampled_from(["contiguous", "sliced", "transposed"]))](x)


# Arguments that are accepted, with finite values.

dtypes = st.sampled_from(DTYPES)
batches = st.integers(0, 3)
spatial_axes = st.lists(st.integers(0, 6), min_size=1, max_size=3).map(tuple) | st.just((67,))
widths = st.sampled_from([1, 4, 8, 16, 17, 33])
clusters = st.tuples(st.integers(1, 5), st.integers(1, 4)) | st.sampled_from([(1, 300), (2, 256), (128, 4)])
magnitudes = st.sampled_from([1e-3, 1.0, 1e3])
temperatures = st.sampled_from([0.05, 0.1, 1.0, 7.0])


def random_voxels(draw: Draw, batch: int, channels: int, spatial: tuple[int, ...]) -> Tensor:
    x = draw(magnitudes) * torch.randn(batch, channels, *spatial)
    return lay_out(draw, x.to(draw(dtypes)))


def embedding(draw: Draw) -> tuple[Tensor, Tensor]:  # z [B, d, *S], prototypes [C, K, d]
    d = draw(widths)
    num_classes, per_class = (draw(st.integers(1, 2)), 1) if d == 1 else draw(clusters)
    prototypes = make_prototypes(d, num_classes, per_class)
    z = make_embedding(draw(batches), draw(spatial_axes), prototypes, draw(dtypes))
    return lay_out(draw, z), _sliced(prototypes) if draw(st.booleans()) else prototypes


def integers_per_voxel(draw: Draw, x: Tensor, lowest: int, number: int, dtype: torch.dtype) -> Tensor:
    if not dtype.is_signed:
        lowest = 0
    return lay_out(draw, torch.randint(lowest, number, (x.shape[0], *x.shape[2:])).to(dtype))


def labels_of(draw: Draw, x: Tensor, num_classes: int) -> Tensor:
    return integers_per_voxel(draw, x, -2, num_classes, draw(st.sampled_from(INTEGER_DTYPES)))


def weight_of(draw: Draw, x: Tensor) -> Tensor:
    weight = torch.rand(x.shape[0], *x.shape[2:]) * torch.randint(0, 2, (x.shape[0], *x.shape[2:]))
    return lay_out(draw, weight.to(draw(st.sampled_from([torch.bool, torch.uint8, *DTYPES]))))


def regions_of(draw: Draw, x: Tensor) -> dict[str, Any]:
    number = draw(st.sampled_from([None, 1, 2, 3]))
    if number is None:
        return {"num_regions": draw(st.sampled_from([None, 1, 4]))}
    regions = integers_per_voxel(draw, x, 0, number, torch.bool if number == 2 else torch.uint8)
    return {"regions": regions, "num_regions": draw(st.sampled_from([None, number, number + 1]))}


def similarity_call(draw: Draw) -> Call:
    z, prototypes = embedding(draw)
    return Call(prototype_similarity, {"z": z, "prototypes": prototypes}, ("z",))


def info_nce_call(draw: Draw) -> Call:
    z, prototypes = embedding(draw)
    arguments = {"z": z, "prototypes": prototypes}
    if draw(st.booleans()):
        arguments["labels"] = labels_of(draw, z, prototypes.shape[0])
    if draw(st.booleans()):
        arguments["weight"] = weight_of(draw, z)
    temperature = draw(temperatures)
    options = {"temperature": temperature, "normalize": draw(st.booleans())}
    if draw(st.booleans()):
        options["ignore_prototype"] = prototypes.shape[0] * prototypes.shape[1] - 1
    largest = 1.0 if options["normalize"] else _largest_product(z, prototypes)
    return Call(prototype_info_nce, arguments, ("z",), largest / temperature, options)


def _largest_product(z: Tensor, prototypes: Tensor) -> float:
    return 1.0 + (float(z.float().norm(dim=1).max() * prototypes.norm(dim=2).max()) if z.numel() else 0)


def head_call(draw: Draw) -> Call:
    z, prototypes = embedding(draw)
    arguments = {"z": z, "prototypes": prototypes}
    class_temperature, temperature = draw(temperatures), draw(temperatures)
    options = {
        "class_temperature": class_temperature,
        "temperature": temperature,
        "normalize": draw(st.booleans()),
        "squared": draw(st.booleans()),
        "return_similarity": draw(st.booleans()),
        "unit_length": draw(st.booleans()),
        "require_agreement": draw(st.booleans()),
    }
    if draw(st.booleans()):
        arguments["labels"] = labels_of(draw, z, prototypes.shape[0])
        arguments |= regions_of(draw, z)
        options["positive"] = draw(st.sampled_from(["nearest", "label"]))
        if draw(st.booleans()):
            arguments["weight"] = weight_of(draw, z)
    largest = 1.0 if options["normalize"] else _largest_product(z, prototypes)
    return Call(prototype_head, arguments, ("z",), max(1 / class_temperature, largest / temperature), options)


def cluster_mean_call(draw: Draw) -> Call:
    z, prototypes = embedding(draw)
    arguments = {"z": z, "prototypes": prototypes, "labels": labels_of(draw, z, prototypes.shape[0])}
    if draw(st.booleans()):
        arguments["weight"] = weight_of(draw, z)
    options = {"unit_length": draw(st.booleans()), "require_agreement": draw(st.booleans())}
    return Call(cluster_mean, arguments, options=options)


def momentum_update_call(draw: Draw) -> Call:
    shape = (*draw(clusters), draw(st.integers(0, 17)))
    count = torch.randint(0, 3, shape[:2]).double()
    arguments = {
        "prototypes": written(draw, torch.randn(shape).to(draw(dtypes))),
        "cluster_sum": lay_out(
            draw, torch.randn(shape).to(draw(st.sampled_from([torch.float32, torch.float64])))
        ),
        "cluster_count": lay_out(draw, count),
    }
    return Call(momentum_update_, arguments, options={"momentum": draw(st.sampled_from([0, 0.5, 0.999, 1]))})


def dice_ce_call(draw: Draw) -> Call:
    num_classes = draw(st.integers(1, 6) | st.just(512))
    logits = random_voxels(draw, draw(batches), num_classes, draw(spatial_axes))
    if draw(st.booleans()):
        target = labels_of(draw, logits, num_classes)
    else:
        target = lay_out(draw, torch.randn(logits.shape).softmax(dim=1).to(draw(dtypes)))
    temperature = draw(temperatures)
    scale = _largest(logits) / temperature
    arguments = {"logits": logits, "target": target, **regions_of(draw, logits)}
    options = {
        "temperature": temperature,
        "squared": draw(st.booleans()),
        "include_background": num_classes == 1 or draw(st.booleans()),
    }
    return Call(dice_ce, arguments, ("logits",), scale, options)


def _largest(x: Tensor) -> float:
    return 1.0 + (float(x.abs().max()) if x.numel() else 0)


def largest_components_call(draw: Draw) -> Call:
    """Values above the last class are background too."""
    num_classes = draw(st.integers(1, 6) | st.just(256))
    label = torch.randint(0, num_classes + 1, (draw(batches), *draw(spatial_axes)))
    label *= torch.rand(label.shape) < draw(st.sampled_from([0.1, 0.5, 1.0]))
    return Call(
        largest_components, {"label": lay_out(draw, label.byte())}, options={"num_classes": num_classes}
    )


def prompt_mix_call(draw: Draw) -> Call:
    num_classes = draw(st.integers(1, 6) | st.just(512))
    logits = random_voxels(draw, draw(batches), num_classes, draw(spatial_axes))
    text = lay_out(draw, torch.randn(num_classes, draw(widths)).to(draw(dtypes)))
    return Call(prompt_mix, {"logits": logits, "text": text}, ("logits", "text"), _largest(logits))


def linear_classifier_call(draw: Draw) -> Call:
    num_classes, d = draw(st.integers(1, 6) | st.just(512)), draw(widths)
    x = random_voxels(draw, draw(batches), d, draw(spatial_axes))
    arguments = {
        "x": x,
        "weight": lay_out(draw, torch.randn(num_classes, d)),
        "bias": lay_out(draw, torch.randn(num_classes)),
    }
    if draw(st.booleans()):
        arguments["channel_scale"] = lay_out(draw, torch.rand(x.shape[:2]).to(draw(dtypes)))
    return Call(linear_classifier, arguments, ("x", "weight", "bias"), _largest(x) * d**0.5)


def masked_class_mean_call(draw: Draw) -> Call:
    z = lay_out(draw, torch.randn(draw(batches), draw(widths), *draw(spatial_axes)).to(draw(dtypes)))
    maps = torch.rand(z.shape[0], draw(st.integers(1, 6)), *z.shape[2:]) + 0.1
    weight = lay_out(draw, maps.to(draw(st.sampled_from([torch.bool, torch.uint8, *DTYPES]))))
    return Call(masked_class_mean, {"z": z, "weight": weight}, ("z",))


def prompt_conv_call(draw: Draw) -> Call:
    num_features, num_classes, width = (draw(st.integers(1, 5)) for _ in range(3))
    batch, spatial = draw(batches), draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    # Half precision is rounded after each of two convolutions, or after one: prompt_conv's own tests compare it.
    features = lay_out(draw, torch.randn(batch, num_features, *spatial))
    logits = lay_out(draw, torch.randn(batch, num_classes, *spatial))
    kernel = [draw(st.integers(1, min(3, size))) for size in spatial]
    outputs = draw(st.integers(1, 4))
    arguments = {
        "features": features,
        "logits": logits,
        "text": lay_out(draw, torch.randn(num_classes, width)),
        "weight": lay_out(draw, torch.randn(outputs, num_features + width, *kernel)),
        "bias": lay_out(draw, torch.randn(outputs)),
        "padding": draw(st.sampled_from([0, 1, 3, "same", "valid", [1] * len(spatial)])),
    }
    return Call(prompt_conv, arguments, ("features", "logits", "text", "weight", "bias"), 10.0)


def some_convolution_call(
    draw: Draw, operation: Callable[..., Tensor], side: int, multiple: int = 1, transposed: bool = False
) -> Call:
    """Of a kernel of this side, on images whose sides are multiples."""
    in_channels, channels = draw(widths), draw(widths)
    spatial = [multiple * size for size in draw(st.lists(st.integers(1, 5), min_size=2, max_size=3))]
    x = random_voxels(draw, draw(batches), in_channels, tuple(spatial))
    weight = torch.randn(channels, in_channels, *[side] * len(spatial))
    weight = (weight / weight[0].numel() ** 0.5).to(x.dtype)
    arguments = {"x": x, "weight": lay_out(draw, weight.transpose(0, 1) if transposed else weight)}
    if draw(st.booleans()):
        arguments["bias"] = lay_out(draw, torch.randn(channels).to(x.dtype))
    return Call(operation, arguments, tuple(arguments), _largest(x))


def convolution_call(draw: Draw) -> Call:
    return some_convolution_call(draw, convolution, side=3)


def strided_convolution_call(draw: Draw) -> Call:
    return some_convolution_call(draw, strided_convolution, side=2, multiple=2)


def transposed_convolution_call(draw: Draw) -> Call:
    return some_convolution_call(draw, transposed_convolution, side=2, transposed=True)


def linear_upsampling_call(draw: Draw) -> Call:
    spatial = draw(st.lists(st.integers(1, 6), min_size=2, max_size=3))
    x = random_voxels(draw, draw(batches), draw(widths), tuple(spatial))
    return Call(linear_upsampling, {"x": x}, ("x",), _largest(x))


def batch_norm_relu_and_statistics(
    running_mean: Tensor, running_variance: Tensor, **arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    y = batch_norm_relu(running_mean=running_mean, running_variance=running_variance, **arguments)
    return y, running_mean, running_variance


def batch_norm_relu_call(draw: Draw) -> Call:
    x = random_voxels(draw, draw(batches), draw(widths), draw(spatial_axes))
    channels = x.shape[1]
    assume(x.numel() >= 2 * channels)
    arguments = {"x": x}
    for name in ("weight", "bias"):
        arguments[name] = lay_out(draw, torch.rand(channels) + 0.5)
    for name in ("running_mean", "running_variance"):
        arguments[name] = written(draw, torch.rand(channels) + 0.5)
    options = {
        "epsilon": 1e-3,
        "momentum": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "negative_slope": draw(st.sampled_from([0.0, 0.01])),
    }
    # How much what is lost in the mean's rounding weighs where a channel has nearly one value only.
    variance = x.double().movedim(1, 0).flatten(1).var(1, correction=0).min() + options["epsilon"]
    scale = 1 + float(x.abs().max() / variance)
    return Call(batch_norm_relu_and_statistics, arguments, ("x", "weight", "bias"), scale, options)


CALLS = {
    "batch_norm_relu": batch_norm_relu_call,
    "cluster_mean": cluster_mean_call,
    "convolution": convolution_call,
    "dice_ce": dice_ce_call,
    "largest_components": largest_components_call,
    "linear_classifier": linear_classifier_call,
    "linear_upsampling": linear_upsampling_call,
    "masked_class_mean": masked_class_mean_call,
    "momentum_update_": momentum_update_call,
    "prompt_conv": prompt_conv_call,
    "prompt_mix": prompt_mix_call,
    "prototype_head": head_call,
    "prototype_info_nce": info_nce_call,
    "prototype_similarity": similarity_call,
    "strided_convolution": strided_convolution_call,
    "transposed_convolution": transposed_convolution_call,
}
seeds = st.integers(0, 2**32 - 1)


def use_some_level(draw: Draw) -> None:
    """Compute with one of the x86-64 levels that this processor runs."""
    if backends.missing("cpu") is None:
        cpu = extension("cpu")
        cpu.use_level(draw(st.sampled_from(list(reversed(cpu.levels())))))


@pytest.fixture(autouse=True, scope="module")
def kernels_wherever_they_can_run() -> Iterator[None]:
    """Also where an operation leaves its input to PyTorch because that is faster."""
    with mock.patch.object(backends, "is_automatic", lambda: False):
        yield


@pytest.fixture(autouse=True, scope="module")
def best_level() -> Iterator[None]:
    yield
    if backends.missing("cpu") is None:
        cpu = extension("cpu")
        cpu.use_level(cpu.levels()[-1])


@pytest.mark.parametrize("operation", CALLS)
@given(data=st.data())
def test_equals_the_reference(operation: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(seeds))
    use_some_level(data.draw)
    call = CALLS[operation](data.draw)
    note(described(call))
    with use_backend("auto"):
        actual = call.results()
    with use_backend("reference"):
        plain, exact = call.results(), call.results(precise=True)
    assert actual.keys() == plain.keys() == exact.keys()
    for name, result in actual.items():
        assert (result.dtype, result.shape) == (plain[name].dtype, plain[name].shape), name
        if not result.is_floating_point():
            assert torch.equal(result, plain[name]), name
            continue
        values = (results[name].double() for results in (actual, plain, exact))
        assert_close_enough(name, *values, resolution=torch.finfo(result.dtype).eps, scale=call.scale)


def described(call: Call) -> str:
    texts = {
        name: f"{value.dtype} {list(value.shape)} strides {value.stride()}"
        if isinstance(value, Tensor)
        else value
        for name, value in (call.arguments | call.options).items()
    }
    return "\n".join(f"{name}: {text}" for name, text in texts.items())


# Arguments that may be wrong in any way.

ALL_DTYPES = (
    *INTEGER_DTYPES, torch.bool, *DTYPES, torch.float64, torch.complex64, torch.complex32, torch.float8_e4m3fn
)  # fmt: skip
NUMBERS = [0, -1, 1, 2, 256, 257, 2**63, -(2**63), 1e-300, 1e-40, 1e300, float("inf"), float("nan")]
WHOLE_NUMBERS = [number for number in NUMBERS if isinstance(number, int)]
OPTIONS = {
    "temperature": NUMBERS,
    "class_temperature": NUMBERS,
    "momentum": NUMBERS,
    "ignore_prototype": WHOLE_NUMBERS,
    "num_classes": WHOLE_NUMBERS,
    "num_regions": [number for number in WHOLE_NUMBERS if number != 256],  # their losses take a while
    "include_background": [True, False],
    "positive": ["", "farthest", "label"],
    "padding": [-1, 100, "", "same", [], [1], [0, 0, 0, 0], [-1, -1]],
}


def with_other_values(draw: Draw, x: Tensor) -> Tensor:
    if x.dtype.is_floating_point and x.dtype.itemsize > 1:
        limits = torch.finfo(x.dtype)
        values = [0.0, limits.tiny / 4, limits.max, -limits.max, torch.inf, -torch.inf, torch.nan]
    elif x.dtype in INTEGER_DTYPES:
        values = [torch.iinfo(x.dtype).min, torch.iinfo(x.dtype).max]
    else:
        return x
    value = torch.tensor(draw(st.sampled_from(values)), dtype=x.dtype, device=x.device)
    return torch.where(torch.rand(x.shape, device=x.device) < draw(st.sampled_from([0.2, 1.0])), value, x)


def with_another_dtype(draw: Draw, x: Tensor) -> Tensor:
    return x.to(draw(st.sampled_from(ALL_DTYPES)))


def with_another_shape(draw: Draw, x: Tensor) -> Tensor:
    if x.dim() == 0:
        return x.unsqueeze(0)
    axis = draw(st.integers(0, x.dim() - 1))
    change = draw(st.sampled_from(["insert", "drop", "empty", "shorten", "lengthen"]))
    if change == "insert":
        return x.unsqueeze(axis)
    if change == "drop":
        return x.select(axis, 0) if x.shape[axis] else x.flatten()
    if change == "lengthen":
        return torch.stack([x, x], axis).flatten(axis, axis + 1)
    return x.narrow(axis, 0, 0 if change == "empty" else max(x.shape[axis] - 1, 0))


def on_another_device(draw: Draw, x: Tensor) -> Tensor:
    return x.to("meta")


CHANGES = (with_other_values, with_another_dtype, with_another_shape, lay_out, on_another_device)


def change(draw: Draw, call: Call) -> None:
    for _ in range(draw(st.integers(1, 3))):
        values = call.arguments | call.options
        name = draw(st.sampled_from([name for name in values if values[name] is not None]))
        place = call.arguments if name in call.arguments else call.options
        if isinstance(place[name], Tensor):
            place[name] = draw(st.sampled_from(CHANGES))(draw, place[name])
        elif name in OPTIONS:
            place[name] = draw(st.sampled_from(OPTIONS[name]))


@pytest.mark.parametrize("operation", CALLS)
@given(data=st.data())
def test_never_crashes(operation: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(seeds))
    use_some_level(data.draw)
    call = CALLS[operation](data.draw)
    change(data.draw, call)
    note(described(call))
    outcomes = []
    for backend in ("auto", "reference"):
        with use_backend(backend):
            try:
                results = call.results()
            except ValueError as error:
                assert "accepted" in str(error), f"{backend}: {error}"
                outcomes.append(ValueError)
            else:
                outcomes.append({name: (value.dtype, value.shape) for name, value in results.items()})
    assert outcomes[0] == outcomes[1]
