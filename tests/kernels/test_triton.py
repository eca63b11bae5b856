"""What is particular to the Triton backend: its paths, its tiles, and its compilation without a GPU."""

import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from comparison import DTYPES, LAYOUTS, assert_accurate, in_layout, make_embedding, make_prototypes

import semiseg_kernels
from semiseg_kernels import (
    backends,
    batch_norm_relu,
    cluster_mean,
    dice_ce,
    prototype_head,
    prototype_info_nce,
    prototype_similarity,
    use_backend,
)

pytest.importorskip("triton")

import triton.language as tl
from triton import jit

from semiseg_kernels.triton import linear_upsampling
from semiseg_kernels.triton.configurations import (
    class_product_tiles,
    class_tiles,
    fits_tiles,
    mix_programs,
    mix_tiles,
    norm_tiles,
    norm_tiles_per_program,
    prototype_tiles,
    regions_at_once,
    rows_per_program,
    upsampling_tiles,
)

# B, *S, d, C, K: one for every path of the kernels, none a multiple of a tile
PATHS = {
    "registers": (2, (5, 7, 9), 16, 2, 3),
    "sixteen columns in registers": (2, (131,), 17, 4, 3),
    "tensor cores": (2, (3, 5, 11), 40, 5, 3),
    "scratch memory": (1, (3, 11), 17, 13, 11),
}


@pytest.fixture
def triton():
    reason = backends.missing("triton")
    if reason is not None or backends.device_type("triton") != "cpu":
        pytest.skip(reason or "Triton compiles here instead of interpreting")
    with use_backend("triton"):
        yield "triton"


def targets(z, num_classes, num_regions):
    shape = (z.shape[0], *z.shape[2:])
    return {
        "labels": torch.randint(-1, num_classes, shape, dtype=torch.int16),
        "regions": torch.randint(0, num_regions, shape, dtype=torch.uint8),
        "num_regions": num_regions,
        "weight": torch.rand(shape) * torch.randint(0, 2, shape),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", PATHS)
def test_every_path(triton, path, dtype, layout):
    """The head holds all that the other operations do; more regions than are counted in one read, too."""
    batch, spatial, d, num_classes, per_class = PATHS[path]
    prototypes = make_prototypes(d, num_classes, per_class)
    z = make_embedding(batch, spatial, prototypes, dtype, layout)
    given = targets(z, num_classes, num_regions=5)
    fewest = min(int(((given["labels"] >= 0) & (given["regions"] == r)).sum()) for r in range(5))
    assert_accurate(
        triton, lambda z: prototype_head(z, prototypes, **given)._asdict(), z,
        scale=10 * z[:, 0].numel() / max(fewest, 1),
    )  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_head_is_its_parts(triton, path):
    batch, spatial, d, num_classes, per_class = PATHS[path]
    prototypes = make_prototypes(d, num_classes, per_class)
    z = make_embedding(batch, spatial, prototypes)
    given = targets(z, num_classes, num_regions=2)
    head = prototype_head(z, prototypes, **given, positive="label", unit_length=True, require_agreement=True)
    torch.testing.assert_close((head.similarity, head.index), prototype_similarity(z, prototypes))
    torch.testing.assert_close(head.info_nce, prototype_info_nce(z, prototypes, labels=given["labels"]))
    sums = cluster_mean(
        z, prototypes, given["labels"], weight=given["weight"], unit_length=True, require_agreement=True
    )
    torch.testing.assert_close((head.cluster_sum, head.cluster_count), sums)
    parts = dice_ce(
        head.similarity, given["labels"], regions=given["regions"], num_regions=2, temperature=0.1
    )
    torch.testing.assert_close((head.ce, head.dice), tuple(parts))


@pytest.mark.parametrize("path", PATHS)
def test_labels_and_regions_out_of_range_are_left_out(triton, path):
    """Nobody on a GPU looks for them: the kernels must neither count them nor leave their memory."""
    batch, spatial, d, num_classes, per_class = PATHS[path]
    prototypes = make_prototypes(d, num_classes, per_class)
    z = make_embedding(batch, spatial, prototypes).requires_grad_()
    given = targets(z, num_classes, num_regions=2)
    beyond, ignored = given["labels"].clone(), given["labels"].clone()
    beyond[:, ::3], ignored[:, ::3] = num_classes, -1
    results = []
    for labels in (beyond, ignored):
        head = prototype_head(z, prototypes, **given | {"labels": labels})
        loss = head.ce.sum() + head.dice.sum() + head.info_nce
        results.append([*head, torch.autograd.grad(loss, z)[0]])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    regions = given["regions"].clone()
    regions[:, ::3] = 200
    head = prototype_head(z, prototypes, **given | {"regions": regions})
    expected = prototype_head(z, prototypes, **given | {"labels": ignored})
    torch.testing.assert_close((head.ce, head.dice), (expected.ce, expected.dice))
    gradients = [torch.autograd.grad(x.ce.sum() + x.dice.sum(), z)[0] for x in (head, expected)]
    torch.testing.assert_close(*gradients)


def test_expanded_embedding(triton):
    """One embedding for all voxels has strides that its gradient cannot have."""
    prototypes, z = make_prototypes(16, 2, 3), torch.randn(2, 16, 1, 1).expand(2, 16, 5, 7)
    results = []
    for x in (z, z.contiguous()):
        x = x.detach().requires_grad_()
        similarity, index = prototype_similarity(x, prototypes)
        results.append((similarity, index, torch.autograd.grad(similarity.square().sum(), x)[0]))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_programs_of_several_tiles(triton, monkeypatch, layout):
    """Batch normalisation: the last program has fewer tiles than the others, and some tiles have fewer voxels."""
    monkeypatch.setattr("semiseg_kernels.triton.batch_norm_relu.norm_tiles_per_program", lambda tiles: 3)
    x = in_layout(torch.randn(2, 3, 5000) * 2 + 50, layout).requires_grad_()
    weight, bias = torch.rand(3) + 0.5, torch.randn(3)
    upstream, results = torch.randn(x.shape), []
    for backend in ("triton", "reference"):
        running = torch.zeros(3), torch.ones(3)
        with use_backend(backend):
            y = batch_norm_relu(x, weight, bias, *running)
            results.append((y, *running, torch.autograd.grad(y, x, upstream)[0]))
    torch.testing.assert_close(results[0], results[1])


@jit
def write_offset(offset, row, column, c, width, column_stride, channel_stride, LARGE: tl.constexpr):
    wide = linear_upsampling._side(width, LARGE)
    tl.store(offset, linear_upsampling._at(0, row, column, c, wide, column_stride, channel_stride))


@jit
def write_place(place, program, rows, columns, tiles_per_plane, BLOCK: tl.constexpr, LARGE: tl.constexpr):
    wide = linear_upsampling._side(columns, LARGE)
    _, _, row, column, _, exists = linear_upsampling._place(program, 1, rows, wide, 1, tiles_per_plane, 1, BLOCK)
    tl.store(place + tl.arange(0, BLOCK)[:, None], row * columns + column, mask=exists)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_upsampling_reaches_every_element_of_a_plane(triton, monkeypatch, layout):
    """Beyond 32 bits too; a whole plane of so many would take the interpreter days."""
    height, width, C = 40_000, 60_000, 3  # of y
    for rows in (height // 2, 1):
        x = torch.empty(1, C, 1, 1).expand(-1, -1, rows, width // 2)
        _, arguments = linear_upsampling._sizes(x, backward=False)
        assert arguments["LARGE"] == (rows > 1)
    strides = (1, height * width) if layout == "contiguous" else (C, 1)
    offset = torch.empty((), dtype=torch.int64)
    write_offset[(1,)](offset, height - 1, width - 1, C - 1, width, *strides, LARGE=True)
    assert offset == C * height * width - 1
    places, tiles = torch.full((128,), -1), height * width // 128
    write_place[(1,)](places, tiles - 1, height, width, tiles, BLOCK=128, LARGE=True)
    assert places.tolist() == list(range(height * width - 128, height * width))
    monkeypatch.setattr(linear_upsampling, "LARGE_PLANE", 1)
    for shape in ((2, 3, 4, 5, 3), (1, 5, 7, 6)):
        x, results = in_layout(torch.randn(shape), layout).requires_grad_(), []
        for backend in ("triton", "reference"):
            with use_backend(backend):
                y = semiseg_kernels.linear_upsampling(x)
            results.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
        torch.testing.assert_close(results[0], results[1])


def are_powers_of_two(numbers):
    return all(n & (n - 1) == 0 for n in numbers)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("num_classes", "per_class"),
    [pair for pair in product((1, 2, 4, 14, 65, 256), (1, 3, 8, 16)) if fits_tiles("prototype_head", *pair)],
)
@pytest.mark.parametrize("d", [1, 16, 17, 33, 96, 512, 1024])
def test_prototype_tiles(d, num_classes, per_class, channels_last):
    """Triton and a GPU accept the tiles of every number of channels and prototypes."""
    tiles = prototype_tiles(d, num_classes, per_class, channels_last)
    columns = tiles.classes * tiles.per_class
    assert num_classes <= tiles.classes < 2 * num_classes
    assert per_class <= tiles.per_class
    assert tiles.per_class < 2 * per_class or columns == 16
    warps = (tiles.num_warps, tiles.similarity_warps, tiles.cluster_warps)
    assert are_powers_of_two((tiles.classes, tiles.per_class, tiles.block, tiles.chunk, tiles.gradient_chunk, *warps))
    assert tiles.block >= 16 and max(warps) <= 32
    assert (tiles.chunk == 1) == (tiles.gradient_chunk == 1)
    least = min(tiles.chunk, tiles.gradient_chunk, columns)
    assert tiles.chunk == 1 or least >= 16, "the least of tensor cores"
    assert not tiles.fused or tiles.tiles == 1, "fused sums are those of one tile"
    assert not tiles.fused or 4 * num_classes * per_class * (d + 1) <= 8 * tiles.block, "bytes a voxel"


@pytest.mark.parametrize("num_classes", [1, 2, 3, 17, 104, 256])
def test_class_tiles(num_classes):
    tiles = class_tiles(num_classes)
    assert num_classes <= tiles.classes < 2 * num_classes
    assert tiles.block * tiles.classes <= 8192 and tiles.block >= 16


@pytest.mark.parametrize("d", [1, 16, 17, 1024])
@pytest.mark.parametrize("num_classes", [1, 2, 3, 17, 104, 256])
def test_class_product_tiles(num_classes, d):
    tiles = class_product_tiles(d, num_classes)
    assert are_powers_of_two(tiles) and min(tiles) >= 16, "tensor cores multiply them"
    assert tiles.classes < 2 * max(num_classes, 16) and tiles.channels < 2 * max(d, 16)
    assert 4 * num_classes * d <= 8 * tiles.sum_block * tiles.tiles, "bytes a voxel"


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("num_classes", [1, 2, 4, 7, 8, 9, 17, 64, 128])
def test_mix_tiles(num_classes, backward, channels_last):
    tiles = mix_tiles(num_classes, channels_last, backward)
    assert num_classes <= tiles.classes < 2 * num_classes or tiles.classes == 16
    assert are_powers_of_two(tiles)
    assert tiles.chunk == 1 or min(tiles.chunk, tiles.classes, tiles.block) >= 16
    assert not channels_last or tiles.chunk > 1, "a voxel's channels are read together"


@pytest.mark.parametrize("num_channels", [1, 5, 16, 64, 65, 1024])
def test_norm_tiles(num_channels):
    assert norm_tiles(num_channels, channels_last=False) == ((16, 256) if num_channels >= 16 else (1, 4096))
    channels, block = norm_tiles(num_channels, channels_last=True)
    assert channels == 64 if num_channels > 64 else num_channels <= channels < 2 * num_channels
    assert channels * block == 4096


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("num_channels", [1, 5, 16, 64, 65, 1024])
def test_upsampling_tiles(num_channels, channels_last):
    channels, block = upsampling_tiles(num_channels, channels_last, backward=False)
    assert channels < 2 * num_channels and channels <= (64 if channels_last else 4)
    assert channels * block == (1024 if channels_last else 512)
    assert upsampling_tiles(num_channels, channels_last, backward=True) == (channels, block // 2)


def test_what_has_no_room_is_refused():
    head = "prototype_head"
    assert fits_tiles(head, 64, 4) and fits_tiles(head, 16, 16) and fits_tiles(head, 256, 1)
    assert not fits_tiles(head, 65, 4) and not fits_tiles(head, 1, 17) and not fits_tiles(head, 257, 1)
    assert fits_tiles("prompt_mix", 128, 1) and not fits_tiles("prompt_mix", 129, 1)
    z = torch.randn(1, 16, 5, device=backends.device_type("triton"))
    with use_backend("triton"), pytest.raises(ValueError, match="no room for 2 classes of 17 prototypes$"):
        prototype_similarity(z, torch.randn(2, 17, 16, device=z.device))


def test_the_papers_sizes_stay_in_registers():
    for num_classes in (2, 4):
        tiles = prototype_tiles(16, num_classes, 3, channels_last=False)
        assert tiles.chunk == 1 and tiles.fused and tiles.programs is None
    assert prototype_tiles(64, 14, 8, channels_last=False).chunk > 1


def test_regions_at_once():
    assert [regions_at_once(n) for n in (1, 2, 3, 4, 5, 256)] == [1, 2, 4, 4, 4, 4]


@pytest.mark.parametrize("rows", [0, 1, 256, 257, 1 << 23, 1 << 24, 1 << 32])
def test_rows_of_a_program_of_sums(rows):
    """As many programs as a grid's second axis takes."""
    assert rows_per_program(rows) >= 256 and -(-rows // rows_per_program(rows)) <= 65_535


@pytest.mark.parametrize("sums", [1, 2 * 256, 16 * 512, 128 * 1024])
def test_programs_of_prompt_mixing(sums):
    assert mix_programs(0, sums) == mix_programs(1, sums) == 1
    assert mix_programs(7, sums) == 7
    assert 16 <= mix_programs(1 << 20, sums) <= 2048
    assert 8 * sums * mix_programs(1 << 20, sums) <= 16 << 20


def test_tiles_of_a_program_of_batch_normalisation():
    """Few programs where few keep a GPU busy, but never so many tiles that float32 would lose digits."""
    assert [norm_tiles_per_program(tiles) for tiles in (1, 1024, 2048, 16384, 1 << 20)] == [1, 1, 2, 16, 16]


@pytest.fixture(scope="module", params=(80, 90, 100, 120))
def compiled(request):
    """What compiling for an architecture gave; a process of its own, as this one may be interpreting."""
    script = Path(__file__).parent / "triton_compilation.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script, str(request.param)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_nothing_spills_and_shared_memory_fits(compiled):
    for kernel in compiled:
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= 99 * 1024, kernel


def test_every_kernel_is_compiled(compiled):
    names = {kernel["kernel"] for kernel in compiled}
    for operation in (
        "prototype_similarity",
        "prototype_info_nce",
        "prototype_head",
        "dice_ce",
        "prompt_mix",
        "linear_upsampling",
    ):
        assert {f"{operation}_forward", f"{operation}_backward"} <= names
    assert {"class_products_sum", "class_products_mix"} <= names
    assert {
        f"largest_components_{part}" for part in ("start", "join", "measure", "find_largest", "write")
    } <= names
    assert {"cluster_mean_forward", "momentum_update_forward", "cluster_sums_multiply", "sums_add_partials"} <= names
    assert {
        f"batch_norm_relu_{part}"
        for part in ("statistics", "moments", "parameters", "forward", "sums", "correction", "backward")
    } <= names


def test_embeddings_are_read_128_bits_at_a_time(compiled):
    for kernel in compiled:
        if (kernel["kernel"], kernel["size"], kernel["layout"]) == (
            "prototype_head_backward",
            "LA",
            "contiguous",
        ):
            assert kernel["ptx"].count("st.global.v4.b32") + kernel["ptx"].count("st.global.v2.b64") >= 8
            return
    raise AssertionError("the head was not compiled")


@pytest.mark.parametrize(("direction", "access"), [("forward", "st"), ("backward", "ld")])
def test_prompts_move_128_bits_at_a_time(compiled, direction, access):
    (ptx,) = (
        kernel["ptx"]
        for kernel in compiled
        if (kernel["kernel"], kernel["size"], kernel["layout"])
        == (f"prompt_mix_{direction}", "LA", "contiguous")
    )
    assert ptx.count(f"{access}.global.v4.b32") + ptx.count(f"{access}.global.v2.b64") >= 4


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("part", "accesses"), [("statistics", 4), ("forward", 8), ("sums", 8), ("backward", 12)]
)
def test_activations_move_128_bits_at_a_time(compiled, part, accesses, layout):
    """A thread's 32 elements of a tile are 4 vectors in 16 bits, and every tensor that is read or written has as many."""
    (ptx,) = (
        kernel["ptx"]
        for kernel in compiled
        if (kernel["kernel"], kernel["size"], kernel["dtype"], kernel["layout"])
        == (f"batch_norm_relu_{part}", "LA", "bf16", layout)
    )
    wide = [access for access in ptx if re.search(r"\.(v4\.b32|v2\.b64)$", access)]
    assert len(wide) >= accesses
