"""Prompt mixing in Triton.

prompt[e] = sum_c share[c] text[c, e],  share = softmax(logits)
grad_logits[c] = share[c] (g[c] - sum_i share[i] g[i]),  g[c] = sum_e text[c, e] grad_prompt[e]
grad_text[c, e] = sum over the voxels of share[c] grad_prompt[e]

Backward reads grad_prompt once: a program takes many tiles, and keeps its sums of grad_text in memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from semiseg_kernels.layouts import finish_gradient, float_prototypes
from semiseg_kernels.triton.class_losses import read_classes, softmax
from semiseg_kernels.triton.configurations import mix_programs, mix_tiles
from semiseg_kernels.triton.launch import as_voxels, is_aligned, launch, with_gradient
from semiseg_kernels.triton.prototypes import SIX_PARTS, THREE_PARTS, multiply_exactly
from semiseg_kernels.triton.sums import add_partials
from semiseg_kernels.triton.tiles import count_tiles, locate, offsets, start, strides_of

_STRIDES = ["batch_stride", "stride", "prompt_batch_stride", "prompt_stride"]


@triton.jit
def _shares(
    logits, image, first, inside, batch_stride, stride,
    C: tl.constexpr, CLASSES: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """The softmax [BLOCK, CLASSES] of a tile's logits, 0 in the padding."""
    x = start(logits, image, first, batch_stride, stride, CHANNELS_LAST)
    x = read_classes(x, inside, stride, C, CLASSES, CHANNELS_LAST)
    share, _ = softmax(tl.where(tl.arange(0, CLASSES)[None, :] < C, x, -float("inf")), 1.0)
    return share


@triton.jit(do_not_specialize=["batch", "N", *_STRIDES])
def _forward(
    logits,  # [B, C, N]
    text,  # [C, E] float32
    prompt,  # [B, E, N]
    batch,
    N,
    batch_stride,
    stride,
    prompt_batch_stride,
    prompt_stride,
    C: tl.constexpr,
    E: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PROMPT_CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    N, batch_stride, stride = strides_of((N, batch_stride, stride), ALIGNED)
    prompt_batch_stride, prompt_stride = strides_of((prompt_batch_stride, prompt_stride), ALIGNED)
    image, first, inside = locate(tl.program_id(0), batch, N, BLOCK)
    share = _shares(logits, image, first, inside, batch_stride, stride, C, CLASSES, CHANNELS_LAST)
    target = start(prompt, image, first, prompt_batch_stride, prompt_stride, PROMPT_CHANNELS_LAST)
    voxel = tl.arange(0, BLOCK)[:, None]
    c = tl.arange(0, CLASSES)
    dtype: tl.constexpr = prompt.dtype.element_ty
    if CHUNK == 1:
        for e in tl.range(0, E, loop_unroll_factor=4, disable_licm=True):
            of_class = tl.load(text + c[None, :] * E + e, mask=c[None, :] < C, other=0)
            mixed = tl.sum(share * of_class, axis=1, keep_dims=True)
            at = target + offsets(voxel, e, prompt_stride, PROMPT_CHANNELS_LAST)
            tl.store(at, mixed.to(dtype), mask=inside)
    else:
        # A prompt of 16 bits needs no more than three parts of the product.
        parts: tl.constexpr = SIX_PARTS if dtype == tl.float32 else THREE_PARTS
        for first_channel in tl.range(0, E, CHUNK, disable_licm=True, num_stages=1):
            e = first_channel + tl.arange(0, CHUNK)[None, :]
            of_class = tl.load(text + c[:, None] * E + e, mask=(c[:, None] < C) & (e < E), other=0)
            mixed = tl.dot(share, of_class, input_precision=parts)
            at = target + offsets(voxel, e, prompt_stride, PROMPT_CHANNELS_LAST)
            tl.store(at, mixed.to(dtype), mask=inside & (e < E))


@triton.jit
def _add(sums, values, exists):
    """Add to float64 sums in memory."""
    tl.store(sums, tl.load(sums, mask=exists) + values.to(tl.float64), mask=exists)


@triton.jit
def _multiply(
    grad_prompt,  # at the tile's first voxel
    text,  # [C, E] float32
    share,  # [BLOCK, CLASSES]
    sums,  # [E, C] float64, of grad_text
    inside,  # [BLOCK, 1]
    stride,
    C: tl.constexpr,
    E: tl.constexpr,
    CHUNK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """d loss / d share [BLOCK, CLASSES]; adds the tile's part to the sums."""
    BLOCK: tl.constexpr = share.shape[0]
    CLASSES: tl.constexpr = share.shape[1]
    voxel = tl.arange(0, BLOCK)[:, None]
    c = tl.arange(0, CLASSES)[None, :]
    by_share = tl.zeros([BLOCK, CLASSES], tl.float32)
    if CHUNK == 1:
        for e in tl.range(0, E, loop_unroll_factor=4, disable_licm=True):
            at = grad_prompt + offsets(voxel, e, stride, CHANNELS_LAST)
            upstream = tl.load(at, mask=inside, other=0).to(tl.float32)
            by_share += upstream * tl.load(text + c * E + e, mask=c < C, other=0)
            _add(sums + e * C + c, tl.sum(share * upstream, axis=0, keep_dims=True), c < C)
    else:
        for first_channel in tl.range(0, E, CHUNK, disable_licm=True, num_stages=1):
            e = first_channel + tl.arange(0, CHUNK)
            at = grad_prompt + offsets(voxel, e[None, :], stride, CHANNELS_LAST)
            upstream = tl.load(at, mask=inside & (e[None, :] < E), other=0)
            if upstream.dtype == tl.float16:  # a class may have less than 6e-8 of a voxel
                upstream = upstream.to(tl.float32)
            exists = (e[:, None] < E) & (c < C)
            of_class = tl.load(text + c * E + e[:, None], mask=exists, other=0)
            by_share = multiply_exactly(upstream, of_class, by_share)
            by_text = multiply_exactly(tl.trans(upstream), share, tl.zeros([CHUNK, CLASSES], tl.float32))
            _add(sums + e[:, None] * C + c, by_text, exists)
    return by_share


@triton.jit(do_not_specialize=["batch", "N", *_STRIDES, "gradient_batch_stride", "gradient_stride"])
def _backward(
    grad_prompt,  # [B, E, N]
    logits,  # [B, C, N]
    text,  # [C, E] float32
    gradient,  # [B, C, N]
    partials,  # [programs, E, C] float64, 0 before
    batch,
    N,
    batch_stride,
    stride,
    prompt_batch_stride,
    prompt_stride,
    gradient_batch_stride,
    gradient_stride,
    C: tl.constexpr,
    E: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PROMPT_CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    N, batch_stride, stride = strides_of((N, batch_stride, stride), ALIGNED)
    prompt_batch_stride, prompt_stride = strides_of((prompt_batch_stride, prompt_stride), ALIGNED)
    gradient_batch_stride, gradient_stride = strides_of((gradient_batch_stride, gradient_stride), ALIGNED)
    program = tl.program_id(0)
    tiles = count_tiles(batch, N, BLOCK)
    sums = partials + tl.cast(program, tl.int64) * (E * C)
    voxel = tl.arange(0, BLOCK)[:, None]
    c = tl.arange(0, CLASSES)[None, :]
    for tile in tl.range(program, tiles, tl.num_programs(0), disable_licm=True):
        tl.debug_barrier()  # all threads see the sums that each of them stored
        image, first, inside = locate(tile, batch, N, BLOCK)
        share = _shares(logits, image, first, inside, batch_stride, stride, C, CLASSES, CHANNELS_LAST)
        x = start(grad_prompt, image, first, prompt_batch_stride, prompt_stride, PROMPT_CHANNELS_LAST)
        by_share = _multiply(x, text, share, sums, inside, prompt_stride, C, E, CHUNK, PROMPT_CHANNELS_LAST)
        mean = tl.sum(share * by_share, axis=1, keep_dims=True)
        target = start(gradient, image, first, gradient_batch_stride, gradient_stride, CHANNELS_LAST)
        target += offsets(voxel, c, gradient_stride, CHANNELS_LAST)
        by_logit = share * (by_share - mean)
        tl.store(target, by_logit.to(gradient.dtype.element_ty), mask=inside & (c < C))


def forward(
    logits: Tensor,  # [B, C, *S]
    text: Tensor,  # [C, E]
) -> Tensor:  # [B, E, *S]
    C, E = text.shape
    prompt = logits.new_empty((logits.shape[0], E, *logits.shape[2:]))
    read, written = as_voxels(logits), as_voxels(prompt)
    batch, _, N = read.data.shape
    tiles = mix_tiles(C, written.channels_last, backward=False)
    launch(
        _forward, (read.count_tiles(tiles.block),), logits, tiles.num_warps,
        logits=read.data, text=float_prototypes(text), prompt=written.data, batch=batch, N=N,
        batch_stride=read.batch_stride, stride=read.stride,
        prompt_batch_stride=written.batch_stride, prompt_stride=written.stride,
        C=C, E=E, CLASSES=tiles.classes, BLOCK=tiles.block, CHUNK=tiles.chunk,
        CHANNELS_LAST=read.channels_last, PROMPT_CHANNELS_LAST=written.channels_last,
        ALIGNED=is_aligned(N, read, written),
    )  # fmt: skip
    return prompt


def backward(
    grad_prompt: Tensor,  # [B, E, *S]
    logits: Tensor,  # [B, C, *S]
    text: Tensor,  # [C, E]
) -> tuple[Tensor, Tensor]:  # [B, C, *S], [C, E] float32
    C, E = text.shape
    read, gradient, written = with_gradient(logits)
    upstream = as_voxels(grad_prompt)
    batch, _, N = read.data.shape
    tiles = mix_tiles(C, upstream.channels_last, backward=True)
    programs = mix_programs(read.count_tiles(tiles.block), C * E)
    partials = torch.zeros(programs, E * C, dtype=torch.float64, device=logits.device)
    launch(
        _backward, (programs,), logits, tiles.num_warps,
        grad_prompt=upstream.data, logits=read.data, text=float_prototypes(text), gradient=written.data,
        partials=partials, batch=batch, N=N, batch_stride=read.batch_stride, stride=read.stride,
        prompt_batch_stride=upstream.batch_stride, prompt_stride=upstream.stride,
        gradient_batch_stride=written.batch_stride, gradient_stride=written.stride,
        C=C, E=E, CLASSES=tiles.classes, BLOCK=tiles.block, CHUNK=tiles.chunk,
        CHANNELS_LAST=read.channels_last, PROMPT_CHANNELS_LAST=upstream.channels_last,
        ALIGNED=is_aligned(N, read, upstream, written),
    )  # fmt: skip
    grad_text = add_partials(partials).view(E, C).T.float().contiguous()
    return finish_gradient(gradient, written.data), grad_text
