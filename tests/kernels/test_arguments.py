"""Every wrong argument is one ValueError that names it, what was given and what is accepted."""

import numpy as np
import pytest
import torch

from semiseg_kernels import (
    batch_norm_relu,
    cluster_mean,
    convolution,
    dice_ce,
    linear_classifier,
    momentum_update_,
    prototype_head,
    prototype_info_nce,
    prototype_similarity,
)

Z, P = torch.randn(2, 16, 5, 7), torch.randn(4, 3, 16)
LABELS = torch.zeros(2, 5, 7, dtype=torch.uint8)
LOGITS = torch.randn(2, 4, 5, 7)
COUNT = torch.ones(4, 3, dtype=torch.float64)
INTEGERS = "uint8, int8, int16, int32, int64, uint16, uint32, uint64"
NAN, INFINITY = float("nan"), float("inf")
LEARNED = torch.nn.Parameter(torch.tensor(0.1))
STATISTICS = [torch.ones(16) for _ in range(4)]

WITH_PROTOTYPES = {
    "z has dtype int64, accepted are float32, bfloat16, float16, float64": (Z.long(), P),
    "z has shape [2, 16], accepted is [B, channels, *S], *S 1 to 3 axes": (Z[..., 0, 0], P),
    "z has shape [2, 16, 5, 7, 1, 1], accepted is [B, channels, *S], *S 1 to 3 axes": (Z[..., None, None], P),
    "z has shape [2, 0, 5, 7], accepted is at least one channel": (Z[:, :0], P[..., :0]),
    "prototypes has shape [12, 16], accepted is [C, K, 16] with C, K >= 1": (Z, P.flatten(0, 1)),
    "prototypes has shape [4, 3, 15], accepted is [C, K, 16] with C, K >= 1": (Z, P[..., :15]),
    "prototypes has shape [4, 0, 16], accepted is [C, K, 16] with C, K >= 1": (Z, P[:, :0]),
    "prototypes has dtype float16, accepted are float32": (Z, P.half()),
    "prototypes has dtype float64, accepted are float32, bfloat16": (Z.bfloat16(), P.double()),
    "prototypes is on meta, accepted is cpu": (Z, P.to("meta")),
}
WITH_LABELS = {
    f"labels has dtype bool, accepted are {INTEGERS}": LABELS.bool(),
    f"labels has dtype float32, accepted are {INTEGERS}": LABELS.float(),
    "labels has shape [2, 1, 5, 7], accepted is [2, 5, 7]": LABELS[:, None],
    "labels has shape [2, 7, 5], accepted is [2, 5, 7]": LABELS.mT,
    "labels is on meta, accepted is cpu": LABELS.to("meta"),
}
CALLS = {
    **{message: (prototype_similarity, values, {}) for message, values in WITH_PROTOTYPES.items()},
    "weight has dtype int64, accepted are bool, uint8, float32, bfloat16, float16": (
        prototype_info_nce, (Z, P), {"weight": LABELS.long()}),
    "weight has dtype float64, accepted are bool, uint8, float32, bfloat16, float16": (
        cluster_mean, (Z, P, LABELS), {"weight": LABELS.double()}),
    "weight has shape [2, 5], accepted is [2, 5, 7]": (
        cluster_mean, (Z, P, LABELS), {"weight": LABELS[..., 0]}),
    "weight is given without labels, accepted with labels only": (prototype_head, (Z, P), {"weight": LABELS}),
    "regions is given without labels, accepted with labels only": (
        prototype_head, (Z, P), {"regions": LABELS}),
    "positive is given without labels, accepted with labels only": (
        prototype_head, (Z, P), {"positive": "label"}),
    "positive is 'farthest', accepted are 'nearest', 'label'": (
        prototype_head, (Z, P), {"positive": "farthest"}),
    "class_temperature is 0, accepted are finite numbers above 0": (
        prototype_head, (Z, P), {"class_temperature": 0}),
    "temperature is -1, accepted are finite numbers above 0": (prototype_head, (Z, P), {"temperature": -1}),
    "temperature is nan, accepted are finite numbers above 0": (
        prototype_info_nce, (Z, P), {"temperature": NAN}),
    "temperature is inf, accepted are finite numbers above 0": (
        dice_ce, (LOGITS, LABELS), {"temperature": INFINITY}),
    "temperature requires a gradient, accepted are numbers, to which none flows": (
        prototype_info_nce, (Z, P), {"temperature": LEARNED}),
    "class_temperature requires a gradient, accepted are numbers, to which none flows": (
        prototype_head, (Z, P), {"class_temperature": LEARNED}),
    "negative_slope requires a gradient, accepted are numbers, to which none flows": (
        batch_norm_relu, (Z, *STATISTICS), {"negative_slope": LEARNED}),
    "temperature is '0.1', accepted are numbers": (dice_ce, (LOGITS, LABELS), {"temperature": "0.1"}),
    "momentum is None, accepted are numbers": (batch_norm_relu, (Z, *STATISTICS), {"momentum": None}),
    "z is of type ndarray, accepted is a tensor": (prototype_similarity, (np.ones((2, 16, 5, 7)), P), {}),
    "target is of type ndarray, accepted is a tensor": (dice_ce, (LOGITS, np.ones((2, 5, 7))), {}),
    "running_mean is of type NoneType, accepted is a tensor": (
        batch_norm_relu, (Z, *STATISTICS[:2], None, None), {}),
    "bias is of type NoneType, accepted is a tensor": (linear_classifier, (Z, P[0], None), {}),
    "weight is of type list, accepted is a tensor": (convolution, (Z, [1.0]), {}),
    "ignore_prototype is 12, accepted are None and 0..11": (
        prototype_info_nce, (Z, P), {"ignore_prototype": 12}),
    "ignore_prototype is -1, accepted are None and 0..11": (prototype_head, (Z, P), {"ignore_prototype": -1}),
    "regions has dtype int64, accepted are uint8, bool": (
        dice_ce, (LOGITS, LABELS), {"regions": LABELS.long()}),
    "include_background is False, accepted of logits with one class is True": (
        dice_ce, (LOGITS[:, :1], LABELS), {"include_background": False}),
    "num_regions is 0, accepted are 1..256": (dice_ce, (LOGITS, LABELS), {"num_regions": 0}),
    "num_regions is 257, accepted are 1..256": (
        prototype_head, (Z, P), {"labels": LABELS, "num_regions": 257}),
    "logits has dtype int64, accepted are float32, bfloat16, float16, float64": (
        dice_ce, (LOGITS.long(), LABELS), {}),
    f"target has dtype bool, accepted are {INTEGERS}": (
        dice_ce, (LOGITS, LABELS.bool()), {}),
    "target has shape [2, 3, 5, 7], accepted is [2, 4, 5, 7]": (dice_ce, (LOGITS, LOGITS[:, :3]), {}),
    "target has shape [2, 5, 6], accepted is [2, 5, 7]": (dice_ce, (LOGITS, LABELS[..., :6]), {}),
    "target has dtype float64, accepted are float32, bfloat16, float16": (
        dice_ce, (LOGITS, LOGITS.double()), {}),
    "momentum is 1.5, accepted are 0..1": (momentum_update_, (P, P, COUNT, 1.5), {}),
    "prototypes has strides [48, 0, 1], accepted are elements with memory of their own": (
        momentum_update_, (P[:, :1].expand(P.shape), P, COUNT, 0.5), {}),
    "cluster_sum has shape [4, 3, 15], accepted is [4, 3, 16]": (
        momentum_update_, (P, P[..., :15], COUNT, 0.5), {}),
    "cluster_sum has dtype float16, accepted are float32, float64": (
        momentum_update_, (P, P.half(), COUNT, 0.5), {}),
    "cluster_count has shape [4], accepted is [4, 3]": (momentum_update_, (P, P, COUNT[:, 0], 0.5), {}),
    "cluster_count has dtype float32, accepted are float64": (
        momentum_update_, (P, P, COUNT.float(), 0.5), {}),
    "prototypes has shape [12, 16], accepted is [C, K, d]": (
        momentum_update_, (P.flatten(0, 1), P, COUNT, 0.5), {}),
}  # fmt: skip


@pytest.mark.parametrize("message", CALLS)
def test_message(message):
    operation, arguments, options = CALLS[message]
    with pytest.raises(ValueError) as error:
        operation(*arguments, **options)
    assert str(error.value) == message


@pytest.mark.parametrize("message", WITH_LABELS)
@pytest.mark.parametrize(
    "operation",
    [
        lambda labels: prototype_info_nce(Z, P, labels=labels),
        lambda labels: prototype_head(Z, P, labels=labels),
        lambda labels: cluster_mean(Z, P, labels),
    ],
    ids=["prototype_info_nce", "prototype_head", "cluster_mean"],
)
def test_labels(operation, message):
    with pytest.raises(ValueError) as error:
        operation(WITH_LABELS[message])
    assert str(error.value) == message


@pytest.mark.parametrize("message", WITH_PROTOTYPES)
@pytest.mark.parametrize(
    "operation", [prototype_info_nce, prototype_head, lambda z, p: cluster_mean(z, p, LABELS)]
)
def test_prototypes(operation, message):
    with pytest.raises(ValueError) as error:
        operation(*WITH_PROTOTYPES[message])
    assert str(error.value) == message
