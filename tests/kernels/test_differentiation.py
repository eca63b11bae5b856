"""Derivatives of gradients: kernels have none, and leave none out without a word."""

import pytest
import torch

from semiseg_kernels import (
    backends,
    batch_norm_relu,
    cluster_mean,
    convolution,
    dice_ce,
    linear_classifier,
    linear_upsampling,
    masked_class_mean,
    prompt_conv,
    prompt_mix,
    prototype_head,
    prototype_info_nce,
    prototype_similarity,
    strided_convolution,
    transposed_convolution,
    use_backend,
)


def inputs():
    weight = torch.randn(16, 16, 3, 3) / 12
    return {
        "z": torch.randn(2, 16, 4, 4, requires_grad=True),
        "prototypes": torch.randn(3, 2, 16),
        "text": torch.randn(3, 5),
        "labels": torch.randint(0, 3, (2, 4, 4)),
        "weight": weight.requires_grad_(),
        "taps": weight.detach()[:, :, :2, :2],
        "parameters": [value(16) for value in (torch.ones, torch.zeros, torch.zeros, torch.ones)],
    }


# Losses, some of which have a gradient that is no constant though the one that they are sent is.
LOSSES = {
    "batch_norm_relu": lambda x: batch_norm_relu(x["z"], *x["parameters"])[:, :, 0].sum(),
    "convolution": lambda x: convolution(x["z"], x["weight"]).sum(),
    "convolution with ReLU": lambda x: convolution(x["z"], x["weight"], negative_slope=0.0).square().sum(),
    "strided_convolution": lambda x: strided_convolution(x["z"], x["taps"]).square().sum(),
    "transposed_convolution": lambda x: transposed_convolution(x["z"], x["taps"]).square().sum(),
    "dice_ce": lambda x: dice_ce(x["z"][:, :3], x["labels"]).ce.sum(),
    "linear_classifier": lambda x: linear_classifier(x["z"], x["weight"][:3, :, 0, 0], torch.ones(3)).sum(),
    "linear_upsampling": lambda x: linear_upsampling(x["z"]).square().sum(),
    "masked_class_mean": lambda x: masked_class_mean(x["z"][:, 3:], x["z"][:, :3]).sum(),
    "prompt_mix": lambda x: prompt_mix(x["z"][:, :3], x["text"])[:, 0].sum(),
    "prototype_head": lambda x: prototype_head(x["z"], x["prototypes"]).info_nce,
    "prototype_info_nce": lambda x: prototype_info_nce(x["z"], x["prototypes"]),
    "prototype_similarity": lambda x: prototype_similarity(x["z"], x["prototypes"])[0].sum(),
}


def penalised(loss, x):
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + gradient.square().sum()


def skip_without(kernel, loss):
    operation = loss.split()[0].replace("transposed", "strided")
    if operation not in backends.OPERATIONS[kernel]:
        pytest.skip(f"{kernel} does not have {operation}")


@pytest.mark.parametrize("differentiate", ["backward", "grad"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_gradient_penalty_is_refused(kernel, loss, differentiate):
    skip_without(kernel, loss)
    x = inputs()
    total = penalised(LOSSES[loss](x), x["z"])
    with pytest.raises(RuntimeError, match=r"^\w+ has no second derivatives"):
        if differentiate == "backward":
            total.backward()
        else:
            torch.autograd.grad(total, [x[name] for name in ("z", "weight")], allow_unused=True)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_is_the_same(kernel, loss):
    skip_without(kernel, loss)
    x = inputs()
    gradients = [
        torch.autograd.grad(LOSSES[loss](x), x["z"], create_graph=create_graph)[0]
        for create_graph in (False, True)
    ]
    assert [gradient.requires_grad for gradient in gradients] == [False, True]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_reference_has_second_derivatives(loss):
    x = inputs()
    with use_backend("reference"):
        penalised(LOSSES[loss](x), x["z"]).backward()
    assert x["z"].grad.isfinite().all()


# Of embeddings z, prototypes, labels and a weight of every voxel.
WEIGHTED = {
    "cluster_mean": lambda z, p, labels, weight: cluster_mean(z, p, labels, weight=weight),
    "masked_class_mean": lambda z, p, labels, weight: [masked_class_mean(z, weight.unsqueeze(1))],
    "prototype_head": lambda z, p, labels, weight: prototype_head(z, p, labels=labels, weight=weight),
    "prototype_info_nce": lambda z, p, labels, weight: [prototype_info_nce(z, p, weight=weight)],
}


@pytest.mark.parametrize("operation", WEIGHTED)
def test_no_gradient_to_the_weights_of_voxels(backend, operation):
    x, weight = inputs(), torch.rand(2, 4, 4, requires_grad=True)
    results = WEIGHTED[operation](x["z"].detach(), x["prototypes"], x["labels"], weight)
    assert not any(result.requires_grad for result in results)


def prompt_conv_loss(x):
    return prompt_conv(x["z"][:, :11], x["z"][:, 11:14], x["text"], x["weight"], padding=1).square().sum()


def test_prompt_conv_refuses_derivatives_of_its_weights_gradient_only():
    x = inputs()
    with pytest.raises(RuntimeError, match="FoldedWeight has no second derivatives"):
        penalised(prompt_conv_loss(x), x["weight"]).backward()
    gradients = []
    for backend in ("auto", "reference"):
        with use_backend(backend):
            total = penalised(prompt_conv_loss(x), x["z"])
            gradients.append(torch.autograd.grad(total, (x["z"], x["weight"])))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-2)
