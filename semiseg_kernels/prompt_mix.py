"""Prompt mixing: the text embedding of every voxel, by the softmax of its class logits."""

from torch import Tensor

from . import backends, checks, reference


def prompt_mix(
    logits: Tensor,  # [B, C, *S]
    text: Tensor,  # [C, E]
) -> Tensor:  # [B, E, *S]
    """Mix the classes' text embeddings at every voxel by the softmax of its logits (VCLIPSeg eqs. 1 and 2).

        prompt[b, e, s] = sum_c softmax_c(logits[b, c, s]) * text[c, e]

    logits: float32, bfloat16 or float16 (float64 runs on the reference). Contiguous and channels-last are
        read in place, other strides are copied first.
    text: float32, bfloat16, float16 or the logits' dtype.

    The prompt has the logits' dtype; softmax and mix are computed in float32, also under autocast.
    Differentiable in both. NaN in a voxel gives NaN in its prompt alone. Raises ValueError on wrong shapes or
    dtypes.
    """
    checks.check_voxels("logits", logits)
    checks.check_text(text, logits, logits.dtype)
    backends.select("prompt_mix", logits, *text.shape)
    return reference.prompt_mix(logits, text)
