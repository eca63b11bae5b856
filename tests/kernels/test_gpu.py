"""What only a GPU can show: graphs, streams, devices, offsets beyond 2^31, memory, and no synchronisation."""

import pytest
import torch
from comparison import LAYOUTS, make_embedding
from test_compile import FUNCTIONS, inputs
from test_determinism import OPERATIONS, everything, make_inputs

from semiseg_kernels import (
    batch_norm_relu,
    dice_ce,
    masked_class_mean,
    momentum_update_,
    prompt_mix,
    prototype_head,
    use_backend,
)

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("kernel", ["triton", "cuda"], indirect=True)]

GIGABYTE = 1 << 30


def run(operation, given):
    """All results of an operation and the gradient of their mean square, or the prototypes after an update."""
    if operation == "prompt_mix":  # with the text's gradient, which sums over the voxels
        logits, text = (x.detach().requires_grad_() for x in (given[0], given[1].flatten(0, 1).T))
        prompt = prompt_mix(logits, text)
        return [prompt.detach(), *torch.autograd.grad(prompt.square().mean(), (logits, text))]
    if operation != "momentum_update":
        return everything(operation, given)
    prototypes = given[1].clone()
    return [momentum_update_(prototypes, given[1] * 2, given[1][..., 0].double().relu(), 0.9)]


EVERY_OPERATION = pytest.mark.parametrize("operation", [*OPERATIONS, "momentum_update"])


def assert_same_bits(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def capture(operation, given):
    """A graph of forward and backward, and the tensors it writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(operation, given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(operation, given)
    return graph, results


@pytest.mark.parametrize("layout", LAYOUTS)
@EVERY_OPERATION
def test_graph_replays_on_new_inputs(kernel, operation, layout):
    static = make_inputs(layout)
    graph, results = capture(operation, static)
    for _ in range(2):
        new = make_inputs(layout)
        for old, value in zip(static, new, strict=True):
            old.copy_(value)
        graph.replay()
        assert_same_bits(results, run(operation, new))


@EVERY_OPERATION
def test_same_bits_on_every_run(kernel, operation):
    given = make_inputs("contiguous")
    first = run(operation, given)
    for _ in range(10):
        assert_same_bits(run(operation, given), first)


@EVERY_OPERATION
def test_same_bits_beside_other_work(kernel, operation):
    """Blocks run in another order where another stream takes multiprocessors away."""
    given = make_inputs("contiguous")
    first = run(operation, given)
    matrix, busy = torch.randn(4096, 4096), torch.cuda.Stream()
    busy.wait_stream(torch.cuda.current_stream())
    for _ in range(5):
        with torch.cuda.stream(busy):
            for _ in range(10):
                matrix @ matrix
        again = run(operation, given)
        torch.cuda.synchronize()
        assert_same_bits(again, first)


@EVERY_OPERATION
def test_same_bits_on_every_replay(kernel, operation):
    given = make_inputs("contiguous")
    expected = run(operation, given)
    graph, results = capture(operation, given)
    for _ in range(10):
        for result in results:
            result.zero_()
        graph.replay()
        assert_same_bits(results, expected)


@EVERY_OPERATION
def test_side_stream(kernel, operation):
    """On a side stream an operation waits for its inputs there, and not for the default stream."""
    given = make_inputs("contiguous")
    expected = run(operation, given)
    late = [torch.zeros_like(x) for x in given]
    torch.cuda.synchronize()
    default, side = torch.cuda.current_stream(), torch.cuda.Stream()
    # Loading a kernel, and asking the driver for memory, waits for all streams: let both happen now.
    with torch.cuda.stream(side):
        torch.cuda._sleep(1)
        run(operation, late)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # a second or so
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        for x, value in zip(late, given, strict=True):
            x.copy_(value)
        actual = run(operation, late)
    side.synchronize()
    assert not default.query(), "the operation waited for the default stream"
    torch.cuda.synchronize()
    assert_same_bits(actual, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@EVERY_OPERATION
def test_device_that_is_not_current(kernel, operation):
    given = make_inputs("contiguous")
    expected = run(operation, given)
    with torch.device("cuda:1"):
        actual = run(operation, [x.to("cuda:1") for x in given])
    assert torch.cuda.current_device() == 0
    assert all(result.device == torch.device("cuda:1") for result in actual)
    torch.testing.assert_close([result.cpu() for result in actual], [result.cpu() for result in expected])


# 2^31 / 16 + 1 voxels: with 16 channels the last ones lie beyond the reach of a 32-bit offset. Both numbers are odd, so
# that a period starts anywhere in a tile; means over all voxels are those over one period.
REPEATS, PERIOD = 87_211, 1_539


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_offsets_beyond_32_bits(kernel, operation, layout):
    assert REPEATS * PERIOD == 2**31 // 16 + 1
    free, _ = torch.cuda.mem_get_info()
    if free < 40 * GIGABYTE:
        pytest.skip(f"needs 40 GiB of free memory, there are {free / GIGABYTE:.0f}")
    prototypes = torch.randn(3, 2, 16)
    z = make_embedding(1, (PERIOD,), prototypes, torch.bfloat16, "channels_last")
    labels = torch.randint(-1, 3, (1, PERIOD), dtype=torch.int8)
    regions = torch.randint(0, 2, (1, PERIOD), dtype=torch.uint8)
    weight = torch.rand(1, PERIOD)
    with use_backend("reference"):
        expected = everything(operation, (z.double(), prototypes, labels, regions, weight))
    if layout == "contiguous":
        repeated = z.contiguous().repeat(1, 1, REPEATS)
    else:
        repeated = z.movedim(1, -1).repeat(1, REPEATS, 1).movedim(-1, 1)
    maps = [values.repeat(1, REPEATS) for values in (labels, regions, weight)]
    actual = everything(operation, (repeated, prototypes, *maps))
    *_, gradient = actual
    for result, exact in zip(actual, expected, strict=True):
        factor = 1 / REPEATS if result is gradient and result.shape == repeated.shape else 1
        if result.shape[-1:] == (REPEATS * PERIOD,):
            periods = result.unflatten(-1, (REPEATS, PERIOD))
            for period in (0, REPEATS // 2, REPEATS - 1):
                assert_close_to_exact(periods[..., period, :], factor * exact)
        else:
            is_sum = operation in ("prototype_head", "cluster_mean") and result.dim() >= 2  # of a cluster
            assert_close_to_exact(result, REPEATS * exact if is_sum else exact)
    del actual, gradient, result, repeated, maps
    torch.cuda.empty_cache()


def assert_close_to_exact(actual, exact):
    if not actual.is_floating_point():
        assert torch.equal(actual, exact.to(actual.dtype))
        return
    tolerance = 2**-7 if actual.dtype == torch.bfloat16 else 1e-5
    atol = tolerance * float(exact.abs().max())
    torch.testing.assert_close(actual.double(), exact.double(), rtol=tolerance, atol=atol)


@pytest.mark.parametrize("function", ["prototype_head", "dice_ce", "masked_class_mean", "batch_norm_relu"])
def test_compiled_once_for_every_number_of_voxels(kernel, function):
    torch._dynamo.reset()
    compiled = torch.compile(FUNCTIONS[function], fullgraph=True, dynamic=True)
    for spatial in ((5, 6, 7), (3, 9, 4), (11, 2, 13)):
        x = inputs("contiguous", spatial)
        x["z"].requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=True):
            actual = torch.autograd.grad(compiled(x), x["z"])
        expected = torch.autograd.grad(FUNCTIONS[function](x), x["z"])
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_sizes_and_numbers_compile_no_kernel_again(kernel, monkeypatch):
    if kernel != "triton":
        pytest.skip("only Triton compiles kernels when they are called")
    from triton import knobs

    compiled = []

    def hook(*, repr, **_):
        compiled.append(repr)
        return False

    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", hook)

    def call(num_voxels, temperature, momentum):
        # In float16, as no other test of this module: the first call does compile.
        z = torch.randn(2, 24, num_voxels, dtype=torch.float16, requires_grad=True)
        labels, prototypes = torch.zeros(2, num_voxels, dtype=torch.uint8), torch.randn(2, 5, 24)
        head = prototype_head(
            z, prototypes, labels=labels, temperature=temperature, class_temperature=temperature / 3
        )
        mean = masked_class_mean(z, head.similarity)
        parameters = (torch.ones(24) for _ in range(4))
        y = batch_norm_relu(z, *parameters, momentum=momentum, epsilon=temperature, negative_slope=momentum)
        (
            head.similarity.sum() + head.ce.sum() + head.dice.sum() + head.info_nce + mean.sum() + y.sum()
        ).backward()
        momentum_update_(prototypes, head.cluster_sum, head.cluster_count, momentum)

    for num_voxels in (4096, 4099):  # one that vectors divide, and one that they do not
        call(num_voxels, 0.1, 0.9)
    assert compiled, "the hook counts nothing"
    compiled.clear()
    for num_voxels in (63, 1000, 4101, 65536, 1 << 20):
        for temperature, momentum in ((0.1, 0.9), (1, 1), (16.0, 0.0)):
            call(num_voxels, temperature, momentum)
    assert not compiled


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prototypes_shape", [(3, 2, 16), (14, 8, 64)], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_peak_memory(kernel, operation, prototypes_shape, dtype, layout):
    """Forward and backward take their results, the gradient, and at most 8 bytes a voxel."""
    num_voxels = 1 << 21
    given = make_inputs(layout, dtype, num_voxels, prototypes_shape)
    z = given[0].requires_grad_()

    def forward():
        return [result for result in OPERATIONS[operation](*given)]

    cotangents = [torch.randn_like(result) for result in forward() if result.requires_grad]

    def forward_and_backward():
        results = forward()
        differentiable = [result for result in results if result.requires_grad]
        return results + (list(torch.autograd.grad(differentiable, z, cotangents)) if differentiable else [])

    forward_and_backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = forward_and_backward()
    extra = torch.cuda.max_memory_allocated() - before - sum(output.nbytes for output in outputs)
    assert extra <= 8 * 2 * num_voxels


@EVERY_OPERATION
def test_no_synchronisation(kernel, operation):
    given = make_inputs("contiguous")
    run(operation, given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(operation, given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def canaries(kernel):
    """Small blocks of memory with gaps between them, where the allocator puts the results of cluster size."""
    blocks = [torch.full((128,), 7.0) for _ in range(2048)]
    del blocks[::2]
    yield
    torch.cuda.synchronize()
    assert torch.stack(blocks).eq(7).all(), "a kernel wrote beyond its results"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64, torch.uint64])
@pytest.mark.parametrize("operation", ["prototype_info_nce", "prototype_head", "cluster_mean", "dice_ce"])
def test_labels_out_of_range_are_ignored(kernel, canaries, operation, dtype):
    z, prototypes, labels, regions, weight = make_inputs("contiguous")
    num_classes = z.shape[1] if operation == "dice_ce" else prototypes.shape[0]
    highest = torch.iinfo(dtype).max if dtype != torch.uint64 else -1  # in int64, which then wraps around
    just_outside = torch.arange(labels.shape[1]) % 2 == 0
    wrong = torch.where(just_outside, num_classes, highest).where(labels < 0, labels.long()).to(dtype)
    actual = everything(operation, (z, prototypes, wrong, regions, weight))
    assert_same_bits(actual, everything(operation, (z, prototypes, labels, regions, weight)))


@pytest.mark.parametrize("operation", ["prototype_head", "dice_ce"])
def test_regions_out_of_range_are_ignored(kernel, canaries, operation):
    z, prototypes, labels, regions, _ = make_inputs("contiguous")
    outside = torch.rand(regions.shape) < 0.3
    just_outside = torch.arange(regions.shape[1]) % 2 == 0
    wrong = regions.where(~outside, torch.where(just_outside, 2, 255).byte())

    def losses(labels, regions):
        x = z.detach().requires_grad_()
        if operation == "dice_ce":
            ce, dice = dice_ce(x, labels, regions=regions, num_regions=2)
        else:
            head = prototype_head(x, prototypes, labels=labels, regions=regions, num_regions=2)
            ce, dice = head.ce, head.dice
        return ce, dice, torch.autograd.grad(ce.sum() + dice.sum(), x)[0]

    actual, expected = losses(labels, wrong), losses(labels.where(~outside, -1), regions)
    torch.testing.assert_close(actual, expected)
