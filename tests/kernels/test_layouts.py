"""Embeddings that lie in memory in any way: the results are those of a contiguous copy."""

import pytest
import torch

from semiseg_kernels import (
    backends,
    batch_norm_relu,
    cluster_mean,
    dice_ce,
    linear_classifier,
    linear_upsampling,
    masked_class_mean,
    prompt_mix,
    prototype_head,
    prototype_info_nce,
    prototype_similarity,
)

CHANNELS, SIDES = 4, (5, 6)
# Each gives [2, CHANNELS, *SIDES].
STRIDES = {
    "crop": lambda: torch.randn(2, CHANNELS, 6, 8)[:, :, 1:, 1:7],
    "crop of channels-last": lambda: torch.randn(2, 6, 8, CHANNELS).movedim(-1, 1)[:, :, 1:, 1:7],
    "some channels of channels-last": lambda: torch.randn(2, *SIDES, 7).movedim(-1, 1)[:, 2 : 2 + CHANNELS],
    "transposed": lambda: torch.randn(2, CHANNELS, *SIDES[::-1]).transpose(2, 3),
    "transposed channels-last": lambda: torch.randn(2, *SIDES[::-1], CHANNELS).movedim(-1, 1).transpose(2, 3),
    "every second voxel": lambda: torch.randn(2, CHANNELS, 5, 12)[..., ::2],
    "one image for all": lambda: torch.randn(1, CHANNELS, *SIDES).expand(2, -1, -1, -1),
    "one plane for all": lambda: torch.randn(2, CHANNELS, 1, 6).expand(-1, -1, 5, -1),
}


def normalise(x, given):
    return batch_norm_relu(x, *given.parameters[:2], *given.parameters[2:].clone(), negative_slope=0.1)


class Given:
    """What the operations read beside the embeddings."""

    def __init__(self):
        self.prototypes = torch.randn(3, 2, CHANNELS)
        self.labels = torch.randint(-1, 3, (2, *SIDES), dtype=torch.int8)
        self.weight = torch.rand(2, *SIDES)
        self.maps = torch.rand(2, 3, *SIDES)
        self.text = torch.randn(CHANNELS, 5)
        self.parameters = torch.rand(4, CHANNELS)
        self.matrix, self.bias = torch.randn(3, CHANNELS), torch.randn(3)


OPERATIONS = {
    "prototype_similarity": lambda x, given: prototype_similarity(x, given.prototypes),
    "prototype_info_nce": lambda x, given: (prototype_info_nce(x, given.prototypes, weight=given.weight),),
    "prototype_head": lambda x, given: prototype_head(x, given.prototypes, labels=given.labels),
    "cluster_mean": lambda x, given: cluster_mean(x, given.prototypes, given.labels, weight=given.weight),
    "dice_ce": lambda x, given: dice_ce(x, given.labels),
    "prompt_mix": lambda x, given: (prompt_mix(x, given.text),),
    "masked_class_mean": lambda x, given: (masked_class_mean(x, given.maps),),
    "batch_norm_relu": lambda x, given: (normalise(x, given),),
    "linear_classifier": lambda x, given: (linear_classifier(x, given.matrix, given.bias),),
    "linear_upsampling": lambda x, given: (linear_upsampling(x),),
}


@pytest.mark.parametrize("layout", STRIDES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_any_strides(backend, operation, layout):
    if operation not in backends.OPERATIONS.get(backend, OPERATIONS):
        pytest.skip(f"backend {backend!r} does not have {operation}")
    x, given = STRIDES[layout](), Given()

    def everything(x):
        x = x.detach().requires_grad_()
        results = OPERATIONS[operation](x, given)
        pairs = zip(results, factors, strict=True)
        losses = [(result.float() * factor).sum() for result, factor in pairs if result.requires_grad]
        gradient = [torch.autograd.grad(sum(losses), x)[0]] if losses else []
        return [result.detach() for result in results] + gradient

    factors = [torch.randn(result.shape) for result in OPERATIONS[operation](x, given)]
    for actual, expected in zip(everything(x), everything(x.contiguous()), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
