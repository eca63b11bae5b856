"""Compiles what the Triton launches would run, without a GPU, and prints one line of JSON a kernel.

    python triton_compilation.py 90

The launches themselves decide on kernels and configurations; instead of running, every kernel is noted with
its arguments, and then compiled. This needs a process without TRITON_INTERPRET.
"""

import contextlib
import io
import json
import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from semiseg_kernels.triton import (
    batch_norm_relu,
    cluster_mean,
    dice_ce,
    largest_components,
    linear_classifier,
    linear_upsampling,
    masked_class_mean,
    momentum_update,
    prompt_mix,
    prototype_head,
    prototype_info_nce,
    prototype_similarity,
)
from semiseg_kernels.triton.configurations import fits_tiles

# The assembler's report, which a cached kernel would not give.
triton.knobs.nvidia.dump_ptxas_log = True
triton.knobs.compilation.always_compile = True
triton.knobs.compilation.disable_line_info = True
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64",
    torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
SIZES = {  # d, C, K
    "LA": (16, 2, 3),
    "ACDC": (16, 4, 3),
    "one": (1, 1, 1),
    "widest in registers": (32, 4, 4),
    "odd": (21, 2, 3),
    "wide": (64, 14, 8),
    "very wide": (512, 16, 16),
    "widest": (1024, 64, 4),
    "many per class": (96, 4, 16),
    "many classes": (256, 256, 1),
    "8 classes": (512, 8, 1),
    "32 classes": (512, 32, 1),
    "64 classes": (256, 64, 1),
    "128 classes": (256, 128, 1),
}
LAYOUTS = ("contiguous", "channels_last")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Every kernel on both of its paths, registers and tensor cores, and the tiles of every number of classes.
ENTRIES = [
    ("LA", F32, "contiguous", "all"),
    ("wide", F32, "channels_last", "all"),
    ("LA", BF16, "contiguous", "norm"),
    ("LA", BF16, "channels_last", "norm"),
    ("LA", BF16, "channels_last", "grid"),
    ("ACDC", BF16, "contiguous", "head"),
    ("very wide", BF16, "contiguous", "head"),
    ("one", F32, "contiguous", "head"),
    ("many classes", F32, "contiguous", "all"),
    ("8 classes", BF16, "contiguous", "mix"),
    ("32 classes", F32, "contiguous", "mix"),
    ("64 classes", F32, "channels_last", "mix"),
    ("128 classes", BF16, "contiguous", "mix"),
    ("widest in registers", BF16, "channels_last", "norm"),
    ("odd", F32, "channels_last", "norm"),
    ("odd", BF16, "contiguous", "norm"),
    ("one", BF16, "contiguous", "norm"),
    ("LA", F16, "contiguous", "norm"),
    ("odd", F32, "contiguous", "grid"),
    ("ACDC", F32, "contiguous", "mix"),
    ("8 classes", F32, "contiguous", "mix"),
    ("32 classes", F32, "channels_last", "mix"),
    ("32 classes", BF16, "contiguous", "mix"),
    ("64 classes", BF16, "contiguous", "mix"),
    ("128 classes", F32, "contiguous", "mix"),
    ("ACDC", F32, "contiguous", "head"),
    ("very wide", F32, "channels_last", "head"),
    ("LA", F16, "channels_last", "all"),
    ("wide", BF16, "channels_last", "norm"),
    ("widest in registers", F32, "channels_last", "norm"),
    ("odd", F16, "contiguous", "norm"),
    ("odd", BF16, "channels_last", "norm"),
    ("LA", F32, "channels_last", "grid"),
    ("widest in registers", F16, "contiguous", "head"),
    ("widest", F32, "contiguous", "head"),
    ("ACDC", BF16, "contiguous", "mix"),
    ("32 classes", F16, "channels_last", "mix"),
    ("64 classes", F32, "contiguous", "mix"),
    ("wide", F16, "channels_last", "norm"),
    ("odd", F32, "contiguous", "norm"),
    ("one", F16, "contiguous", "grid"),
    ("ACDC", F16, "channels_last", "head"),
    ("many per class", F32, "contiguous", "head"),
    ("8 classes", F16, "contiguous", "mix"),
    ("128 classes", F32, "channels_last", "mix"),
    ("widest in registers", F16, "channels_last", "norm"),
    ("LA", F32, "channels_last", "norm"),
    ("odd", F16, "channels_last", "norm"),
    ("odd", F16, "channels_last", "grid"),
]


def noted(run):
    """The launches of `run`, (kernel, arguments, number of warps), none of which happens."""
    launches = []

    def note(kernel, *_, grid, warmup, num_warps, num_stages, enable_fp_fusion, **arguments):
        launches.append((kernel, arguments, num_warps))

    original, JITFunction.run = JITFunction.run, note
    try:
        run()
    finally:
        JITFunction.run = original
    return launches


def run_operations(size, dtype, layout, which):
    """Forward and backward; `which`: "all" operations, the "head" with every option, the prompt "mix", the "norm", or
    what knows a voxel's neighbours on the "grid"."""
    d, num_classes, per_class = SIZES[size]
    B, N, R = 2, 1600, 2
    z = torch.empty(B, d, N, dtype=dtype)
    similarity = torch.empty(B, num_classes, N, dtype=dtype)
    if layout == "channels_last":
        z, similarity = (x.movedim(1, -1).contiguous().movedim(-1, 1) for x in (z, similarity))
    p = torch.empty(num_classes, per_class, d)
    labels = torch.empty(B, N, dtype=torch.uint8)
    regions, weight = labels.clone(), torch.empty(B, N)
    losses, scalar = torch.empty(R), torch.empty(())
    statistics = torch.empty(R * (1 + 3 * num_classes) + 1, dtype=torch.float64)
    if which == "all":
        for squared in (True, False):  # Dice's denominator
            prototype_head.forward(
                z, p, labels, regions, None, R, 0.1, 0.1, squared, False, "nearest", True, -1, False, False
            )
            prototype_head.backward(
                None, losses, losses, scalar, z, p, labels, regions, statistics, R, 0.1, 0.1, squared,
                "nearest", True, -1,
            )  # fmt: skip
        _, index = prototype_similarity.forward(z, p)
        prototype_similarity.backward(similarity.contiguous(), z, p, index)
        prototype_info_nce.forward(z, p, labels, weight, 0.1, True, -1)
        prototype_info_nce.backward(scalar, statistics[0], z, p, labels, weight, 0.1, True, -1)
        cluster_mean.forward(z, p, labels, weight, False, False)
        momentum_update.forward(p, p, statistics[: num_classes * per_class].expand(1, -1), 0.9)
        for target, *dice in ((labels, True, 0), (similarity, False, min(1, num_classes - 1))):
            dice_ce.forward(similarity, target, regions, R, 1.0, *dice)
            dice_ce.backward(losses, losses, similarity, target, regions, statistics, R, 1.0, *dice)
        for maps in (similarity, similarity.bool()):
            masked_class_mean.forward(z, maps)
            masked_class_mean.backward(p[:, 0], statistics[:num_classes], z, maps)
        matrix = torch.empty(B, num_classes, d + 1)
        linear_classifier.forward(z, matrix)
        linear_classifier.backward(similarity.float(), z, matrix)
    if which == "mix" or (which == "all" and fits_tiles("prompt_mix", num_classes, 1)):
        prompt_mix.forward(similarity, p[:, 0])
        prompt_mix.backward(z, similarity, p[:, 0])
    if which in ("all", "norm"):
        parameters = torch.empty(5, d)
        # In "odd" sizes no rows start at multiples of a vector.
        x = z[..., 1:] if size == "odd" and layout == "contiguous" else z
        mean, variance = batch_norm_relu.statistics(x)
        joined, count = torch.stack([mean, variance]), statistics[0]
        for voxels in (None, count):
            batch_norm_relu.parameters(mean, variance, *parameters[:4], voxels, B * N, 0.1, 1e-5)
            batch_norm_relu.correction(joined, joined, joined, voxels, B * N)
        batch_norm_relu.forward(x, parameters[:3], 0.01)
        batch_norm_relu.sums(x, x, parameters[:3], 0.01)
        batch_norm_relu.backward(x, x, parameters[:3], parameters[3:], 0.01)
    if which == "grid":
        largest_components.forward(labels.view(B, 8, 8, -1), num_classes)
        for sides in ((8, 8, 25), (40, 40)):
            linear_upsampling.forward(z.unflatten(2, sides))
            wide = torch.empty(B, d, *(2 * side for side in sides), dtype=dtype)
            for upstream in (wide, wide.movedim(1, -1).contiguous().movedim(-1, 1)):
                linear_upsampling.backward(upstream, layout == "channels_last")
    if which == "head":
        squared = dtype == F32
        prototype_head.forward(
            z, p, labels, regions, weight, R, 0.1, 0.2, squared, True, "label", False, 0, True, True
        )
        prototype_head.backward(
            similarity.contiguous(), losses, losses, scalar, z, p, labels, regions, statistics, R, 0.1, 0.2,
            squared, "label", False, 0,
        )  # fmt: skip


def source_of(kernel, arguments):
    """What Triton compiles for a launch with these arguments, all addresses being multiples of 16."""
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    return ASTSource(kernel, signature, constants, attributes)


def compile_for(capability, source, num_warps):
    """The compiled kernel, its registers a thread, and the bytes it spills, as the assembler reports them."""
    target, log = GPUTarget("cuda", capability, 32), io.StringIO()
    options = {"num_warps": num_warps, "num_stages": 2, "enable_fp_fusion": True}
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(source, target=target, options=options)
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", log.getvalue())))
    (registers,) = re.findall(r"Used (\d+) registers", log.getvalue())
    return compiled, int(registers), spilled


def main(capability):
    seen = set()
    for entry in ENTRIES:
        for kernel, arguments, num_warps in noted(lambda entry=entry: run_operations(*entry)):
            source = source_of(kernel, arguments)
            key = (source.hash(), num_warps)
            if key in seen:
                continue
            seen.add(key)
            compiled, registers, spilled = compile_for(capability, source, num_warps)
            module = kernel.fn.__module__.rpartition(".")[2]
            print(json.dumps({
                "kernel": module + kernel.fn.__name__, "size": entry[0],
                "dtype": TYPES[entry[1]], "layout": entry[2],
                "registers": registers, "spilled": spilled, "shared": compiled.metadata.shared,
                "ptx": re.findall(r"\b(?:ld|st)\.global\S*", compiled.asm["ptx"]),
            }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]))
