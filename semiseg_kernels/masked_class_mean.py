"""Masked class mean: per class the mean embedding over a map of weights."""

from torch import Tensor

from . import backends, checks, reference


def masked_class_mean(
    z: Tensor,  # [B, d, *S]
    weight: Tensor,  # [B, C, *S]
) -> Tensor:  # [C, d]
    """Per class the weighted mean of the embeddings over all voxels of the batch (VCLIPSeg eq. 4).

        mean[c] = sum_bs weight[b, c, s] * z[b, :, s] / sum_bs weight[b, c, s]

    z: float32, bfloat16 or float16 (float64 runs on the reference). Contiguous and channels-last are read in
        place, other strides are copied first.
    weight: bool, uint8, float32, bfloat16, float16 or z's dtype; no gradient flows to it.

    The means are float32 (float64 for float64 input), differentiable in z. A class whose weights sum to 0 has
    mean 0 and sends no gradient; `weight.sum(...) == 0` tells it from a class with that mean. NaN in z reaches
    the other classes, whatever the weight there. Raises ValueError on wrong shapes or dtypes.
    """
    checks.check_voxels("z", z)
    checks.check_maps("weight", weight, z, (*checks.WEIGHT_DTYPES, z.dtype))
    backends.select("masked_class_mean", z, weight.shape[1], z.shape[1])
    return reference.masked_class_mean(z, weight)
