"""Registration: opcheck on the raw operations, and torch.compile without graph breaks or recompilation."""

import pytest
import torch
from comparison import LAYOUTS, in_layout

from semiseg_kernels import (
    batch_norm_relu,
    cluster_mean,
    convolution,
    dice_ce,
    linear_classifier,
    linear_upsampling,
    masked_class_mean,
    momentum_update_,
    prototype_head,
    prototype_info_nce,
    prototype_similarity,
    strided_convolution,
    transposed_convolution,
    use_backend,
)

RAW = torch.ops.semiseg_kernels


def inputs(layout="contiguous", spatial=(5, 6, 7), dtype=torch.float32):
    z = in_layout(torch.randn(2, 16, *spatial), layout).to(dtype)
    return {
        "z": z,
        "prototypes": torch.randn(3, 2, 16),
        "labels": torch.randint(-1, 3, (2, *spatial), dtype=torch.int8),
        "regions": torch.randint(0, 2, (2, *spatial), dtype=torch.uint8),
        "weight": torch.rand(2, *spatial),
        "logits": in_layout(torch.randn(2, 3, *spatial), layout).to(dtype),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
class TestOpcheck:
    def test_prototype_similarity(self, kernel, layout, dtype):
        x = inputs(layout, dtype=dtype)
        z, prototypes = x["z"], x["prototypes"]
        torch.library.opcheck(RAW.prototype_similarity_forward, (z, prototypes, kernel))
        similarity, index = RAW.prototype_similarity_forward(z, prototypes, kernel)
        gradient = torch.randn_like(similarity)
        torch.library.opcheck(RAW.prototype_similarity_backward, (gradient, z, prototypes, index, kernel))

    @pytest.mark.parametrize("labelled", [False, True])
    def test_prototype_info_nce(self, kernel, layout, dtype, labelled):
        x = inputs(layout, dtype=dtype)
        given = (x["labels"], x["weight"]) if labelled else (None, None)
        arguments = (x["z"], x["prototypes"], *given, 0.1, True, -1, kernel)
        torch.library.opcheck(RAW.prototype_info_nce_forward, arguments)
        _, denominator = RAW.prototype_info_nce_forward(*arguments)
        torch.library.opcheck(RAW.prototype_info_nce_backward, (torch.tensor(2.0), denominator, *arguments))

    @pytest.mark.parametrize("return_similarity", [False, True])
    @pytest.mark.parametrize("labelled", [False, True])
    def test_prototype_head(self, kernel, layout, dtype, labelled, return_similarity):
        x = inputs(layout, dtype=dtype)
        given = (x["labels"], x["regions"]) if labelled else (None, None)
        weight, num_regions = (x["weight"], 2) if labelled else (None, 1)
        arguments = (
            x["z"], x["prototypes"], *given, weight, num_regions, 0.1, 0.1, True, return_similarity,
            "nearest", True, -1, False, False, kernel,
        )  # fmt: skip
        torch.library.opcheck(RAW.prototype_head_forward, arguments)
        similarity, _, ce, dice, _, _, _, statistics = RAW.prototype_head_forward(*arguments)
        gradients = (
            torch.randn_like(similarity) if return_similarity else None,
            torch.randn_like(ce) if labelled else None,
            torch.randn_like(dice) if labelled else None,
            torch.tensor(2.0),
        )
        torch.library.opcheck(
            RAW.prototype_head_backward,
            (
                *gradients,
                x["z"],
                x["prototypes"],
                *given,
                statistics,
                num_regions,
                0.1,
                0.1,
                True,
                "nearest",
                True,
                -1,
                kernel,
            ),
        )

    def test_cluster_mean(self, kernel, layout, dtype):
        x = inputs(layout, dtype=dtype)
        for weight in (None, x["weight"]):
            arguments = (x["z"], x["prototypes"], x["labels"], weight, False, False, kernel)
            torch.library.opcheck(RAW.cluster_mean_forward, arguments)

    @pytest.mark.parametrize("soft", [False, True])
    def test_dice_ce(self, kernel, layout, dtype, soft):
        x = inputs(layout, dtype=dtype)
        target = x["logits"].float().softmax(1) if soft else x["labels"]
        for given in ((None, 1), (x["regions"], 2)):
            arguments = (x["logits"], target, *given, 1.0, True, 0, kernel)
            torch.library.opcheck(RAW.dice_ce_forward, arguments)
            ce, dice, statistics = RAW.dice_ce_forward(*arguments)
            regions, *options = arguments[2:]
            torch.library.opcheck(
                RAW.dice_ce_backward, (ce, dice, x["logits"], target, regions, statistics, *options)
            )

    def test_batch_norm_relu(self, kernel, layout, dtype):
        x = inputs(layout, dtype=dtype)["z"]
        gradient, parameters = torch.randn_like(x), torch.randn(3, x.shape[1])
        torch.library.opcheck(RAW.batch_norm_relu_statistics, (x, kernel))
        torch.library.opcheck(RAW.batch_norm_relu_forward, (x, parameters, 0.1, kernel))
        torch.library.opcheck(RAW.batch_norm_relu_sums, (gradient, x, parameters, 0.1, kernel))
        arguments = (gradient, x, parameters, torch.randn(2, x.shape[1]), 0.1, kernel)
        torch.library.opcheck(RAW.batch_norm_relu_backward, arguments)
        statistics = torch.rand(2, x.shape[1], dtype=torch.float64)
        running = torch.rand(2, x.shape[1]).to(dtype)
        for count in (None, torch.tensor(420.0, dtype=torch.float64)):
            arguments = (*statistics, *parameters[:2], *running, count, 210, 0.1, 1e-5, kernel)
            torch.library.opcheck(RAW.batch_norm_relu_parameters, arguments)
            arguments = (statistics, 2 * statistics, statistics, count, 210, kernel)
            torch.library.opcheck(RAW.batch_norm_relu_correction, arguments)


@pytest.mark.parametrize(
    "view", [lambda x: x.transpose(2, 3), lambda x: x[:, :7]], ids=["transposed", "some channels"]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_of_batch_norm_relu_on_views(kernel, layout, view):
    x = view(inputs(layout)["z"])
    gradient, parameters = torch.randn_like(x), torch.randn(3, x.shape[1])
    torch.library.opcheck(RAW.batch_norm_relu_forward, (x, parameters, 0.1, kernel))
    arguments = (gradient, x, parameters, torch.randn(2, x.shape[1]), 0.1, kernel)
    torch.library.opcheck(RAW.batch_norm_relu_backward, arguments)


@pytest.mark.parametrize("operation", ["dice_ce", "prototype_info_nce", "cluster_mean"])
def test_labels_out_of_range_are_left_out_where_they_cannot_be_read(operation):
    """As on a GPU; here under the compiler."""
    torch._dynamo.reset()
    x = inputs()
    functions = {
        "dice_ce": lambda labels: tuple(dice_ce(x["logits"], labels)),
        "prototype_info_nce": lambda labels: prototype_info_nce(x["z"], x["prototypes"], labels=labels),
        "cluster_mean": lambda labels: cluster_mean(x["z"], x["prototypes"], labels),
    }
    labels = x["labels"].clone()
    labels[0, 0] = 100
    with use_backend("reference"):
        compiled = torch.compile(functions[operation], fullgraph=True, backend="eager")
        expected = functions[operation](labels.where(labels < 3, -1))
        torch.testing.assert_close(compiled(labels), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_momentum_update(kernel, dtype):
    count = torch.randint(0, 2, (3, 2)).double()
    torch.library.opcheck(
        RAW.momentum_update_forward,
        (torch.randn(3, 2, 16).to(dtype), torch.randn(3, 2, 16), count, 0.9, kernel),
    )


FUNCTIONS = {
    "prototype_similarity": lambda x: prototype_similarity(x["z"], x["prototypes"])[0].square().sum(),
    "prototype_info_nce": lambda x: prototype_info_nce(
        x["z"], x["prototypes"], labels=x["labels"], weight=x["weight"]
    ),
    "prototype_head": lambda x: sum_of(
        prototype_head(
            x["z"],
            x["prototypes"],
            labels=x["labels"],
            regions=x["regions"],
            num_regions=2,
            weight=x["weight"],
        )
    ),
    "prototype_head without labels": lambda x: (
        prototype_head(x["z"], x["prototypes"], return_similarity=False).info_nce
    ),
    "cluster_mean": lambda x: (
        x["z"].sum() + cluster_mean(x["z"], x["prototypes"], x["labels"], weight=x["weight"] > 0.5)[0].sum()
    ),
    "momentum_update_": lambda x: (
        x["z"].sum()
        + momentum_update_(
            x["prototypes"], x["prototypes"] * 2, x["prototypes"][..., 0].double().relu(), 0.9
        ).sum()
    ),
    "dice_ce": lambda x: sum_of(dice_ce(x["z"][:, :3], x["labels"], regions=x["regions"], num_regions=2)),
    "dice_ce with soft target": lambda x: sum_of(dice_ce(x["z"][:, :3], x["logits"].softmax(1))),
    "masked_class_mean": lambda x: masked_class_mean(x["z"], x["logits"].softmax(1)).square().sum(),
    "batch_norm_relu": lambda x: (
        batch_norm_relu(x["z"], x["prototypes"][0, 0], x["prototypes"][0, 1], *x["prototypes"][1].clone())
        .square()
        .sum()
    ),
}


def sum_of(results):
    return sum(result.sum() for result in results if result is not None and result.is_floating_point())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_one_graph_for_every_number_of_voxels(backend, function, layout):
    """No graph break, one compilation for all sizes, and the result of eager execution."""
    torch._dynamo.reset()
    compiled = torch.compile(FUNCTIONS[function], fullgraph=True, dynamic=True, backend="aot_eager")
    for spatial in ((5, 6, 7), (3, 9, 4), (11, 2, 13)):
        x = inputs(layout, spatial)
        results = []
        for run in (compiled, FUNCTIONS[function]):
            copy = {name: value.clone() for name, value in x.items()}
            copy["z"].requires_grad_()
            with torch._dynamo.config.patch(error_on_recompile=True):
                value = run(copy)
            results.append((value.detach(), torch.autograd.grad(value, copy["z"])[0], copy["prototypes"]))
        torch.testing.assert_close(results[0], results[1])


def test_backend_can_be_forced_inside_a_compiled_function():
    def function(z, prototypes):
        with use_backend("reference"):
            return prototype_similarity(z, prototypes)

    torch._dynamo.reset()
    x = inputs()
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x["z"], x["prototypes"]), function(x["z"], x["prototypes"]))


@pytest.mark.slow
def test_inductor(backend):
    """Through the whole compiler, where the fakes decide the memory layout of what follows."""
    torch._dynamo.reset()
    function = FUNCTIONS["prototype_head"]
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for layout in LAYOUTS:
        x = inputs(layout)
        x["z"].requires_grad_()
        expected = torch.autograd.grad(function(x), x["z"])
        torch.testing.assert_close(torch.autograd.grad(compiled(x), x["z"]), expected, rtol=1e-4, atol=1e-5)


LAYERS = {
    "convolution": lambda z: convolution(z, torch.ones(16, 16, 3, 3, 3)),
    "linear_classifier": lambda z: linear_classifier(z, torch.ones(3, 16), torch.zeros(3)),
    "linear_upsampling": linear_upsampling,
    "prototype_similarity": lambda z: prototype_similarity(z, torch.ones(3, 2, 16))[0],
    "strided_convolution": lambda z: strided_convolution(z, torch.ones(16, 16, 2, 2, 2)),
    "transposed_convolution": lambda z: transposed_convolution(z, torch.ones(16, 16, 2, 2, 2)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_export_for_any_number_and_size_of_images(layer):
    class Network(torch.nn.Module):
        def forward(self, z):
            return LAYERS[layer](z)

    sides = {0: torch.export.Dim("batch", max=8), 2: 2 * torch.export.Dim("half", min=2, max=64)}
    with torch.no_grad():
        program = torch.export.export(Network(), (torch.randn(2, 16, 8, 6, 4),), dynamic_shapes=(sides,))
        z = torch.randn(3, 16, 10, 6, 4)
        torch.testing.assert_close(program.module()(z), LAYERS[layer](z))
