"""The tolerance: a kernel may be as wrong as twice PyTorch in the same dtype, measured against float64."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from semiseg_kernels import use_backend
from semiseg_kernels.reference.common import cosine, flatten

Operation = Callable[[Tensor], Mapping[str, Tensor]]

# What float32 arithmetic cannot promise even where PyTorch happens to hit the exact result: each of the
# score, the maximum, the exponential and the logarithm is rounded once, relative to the largest of them.
ROUNDINGS = 4
SEPARATION = 1e-5  # cosines closer than this may swap places in float32; 84 times its resolution

# They read values out of range as ignored voxels: to look for them, a GPU would have to wait.
UNCHECKED = ("cuda", "triton")
LAYOUTS = ("contiguous", "channels_last")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# B, *S, d, C, K: odd sizes, every limit of the contract, and sizes around the width of vector registers
CASES = {
    "3d": (2, (5, 7, 9), 16, 2, 3),
    "2d": (3, (17, 19), 16, 4, 3),
    "empty": (2, (0, 4, 4), 16, 2, 3),
    "no batch": (0, (4, 4), 16, 2, 3),
    "one voxel": (1, (1, 1, 1), 17, 4, 3),
    "63 voxels": (1, (7, 9), 17, 3, 5),
    "one channel": (2, (63,), 1, 2, 1),
    "one prototype": (2, (63,), 16, 1, 1),
    "many chunks": (1, (65537,), 16, 2, 3),
    "whole tiles": (2, (1032,), 16, 2, 3),  # of a GPU's block, and eight voxels
    "whole tiles, 4 classes": (1, (4104,), 16, 4, 3),
    "wide": (2, (3, 5, 11), 96, 14, 3),
    "widest": (1, (63,), 512, 128, 4),
    "many per class": (1, (67,), 17, 1, 300),
    "512 prototypes": (1, (65,), 96, 2, 256),
}


def in_layout(
    x: Tensor,  # [B, channels, *S]
    layout: str,
) -> Tensor:
    return x.contiguous() if layout == "contiguous" else x.movedim(1, -1).contiguous().movedim(-1, 1)


def make_prototypes(d: int, num_classes: int, per_class: int) -> Tensor:
    prototypes = torch.randn(num_classes, per_class, d)
    if d == 1:  # one direction and its opposite, as all of one sign are the same prototype
        prototypes = prototypes.abs() * torch.tensor([1.0, -1.0])[:num_classes, None, None]
    return prototypes


def make_embedding(
    batch: int,
    spatial: tuple[int, ...],
    prototypes: Tensor,  # [C, K, d]
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
) -> Tensor:  # [B, d, *S]
    """Random embeddings of varied length, none so close to a tie that rounding decides it."""
    num_classes, _, d = prototypes.shape
    length = torch.empty(batch, 1, *spatial).uniform_(0.2, 3.0)
    z = (torch.randn(batch, d, *spatial) * length).to(dtype)
    if z.numel() == 0:
        return in_layout(z, layout)
    cosines = cosine(flatten(z.double()), prototypes)  # [B, C, K, N]
    separated = _gap(cosines.flatten(1, 2)) > SEPARATION
    separated &= (
        (_gap(cosines.movedim(1, 0).flatten(0, 1)) > SEPARATION).unflatten(0, (num_classes, batch)).all(0)
    )
    separated &= _gap(cosines.amax(2)) > SEPARATION
    assert separated.any()
    voxels = z.flatten(2).movedim(1, -1)  # [B, N, d]
    voxels = torch.where(separated.unsqueeze(-1), voxels, voxels[separated][0])
    return in_layout(voxels.movedim(-1, 1).unflatten(2, spatial), layout)


def _gap(
    cosines: Tensor,  # [B, candidates, N]
) -> Tensor:  # [B, N]
    if cosines.shape[1] == 1:
        return torch.full_like(cosines[:, 0], torch.inf)
    first, second = cosines.topk(2, dim=1).values.unbind(1)
    return first - second


def assert_accurate(
    kernel: str,
    operation: Operation,  # z -> named results
    z: Tensor,  # [B, channels, *S]
    scale: float = 1.0,  # of the largest number rounded on the way to a result, such as 1 / temperature
    unit: bool = True,  # the operation sees only the direction of z, so its gradient grows as 1 / |z|
) -> None:
    """Compare every result, and the gradient that each of them sends to z, with the float64 reference."""
    actual = evaluate(kernel, operation, z)
    plain = evaluate("reference", operation, z)
    exact = evaluate("reference", operation, z.double())
    length = torch.linalg.vector_norm(z.double(), dim=1, keepdim=True) if unit else torch.ones(())
    assert actual.keys() == plain.keys() == exact.keys()
    for name in actual:
        assert actual[name].dtype == plain[name].dtype, name
        assert actual[name].shape == plain[name].shape, name
        if not actual[name].is_floating_point():
            torch.testing.assert_close(
                actual[name], exact[name], rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}"
            )
            continue
        weight = length if name.startswith("gradient") else torch.ones(())
        if name.startswith("gradient"):
            assert same_strides(actual[name], z), f"{name} is not in z's memory format"
        assert_close_enough(name, *(result[name].double() * weight for result in (actual, plain, exact)),
                            resolution=torch.finfo(actual[name].dtype).eps, scale=scale)  # fmt: skip


def assert_close_enough(
    name: str, actual: Tensor, plain: Tensor, exact: Tensor, resolution: float, scale: float = 1.0
) -> None:
    if exact.numel() == 0:
        return
    assert actual.isfinite().all(), f"{name} holds NaN or infinity"
    single = torch.finfo(torch.float32).eps  # also of float64 results, which are sums of float32 weights
    floor = ROUNDINGS * (single * scale + max(resolution, single) * exact.abs().max())
    for measure in (torch.max, lambda error: error.square().mean().sqrt()):
        error, allowed = measure((actual - exact).abs()), 2 * measure((plain - exact).abs()) + floor
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def evaluate(backend: str, operation: Operation, z: Tensor) -> dict[str, Tensor]:
    """The results of operation(z), the gradient of each differentiable one, and that of all together."""
    z = z.detach().requires_grad_()
    with use_backend(backend):
        results = {name: result for name, result in operation(z).items() if result is not None}
        differentiable = [name for name, result in results.items() if result.requires_grad]
        voxels = max(z.numel() // z.shape[1], 1)
        generator = torch.Generator(z.device).manual_seed(z.numel())
        cotangents = {}
        for name in differentiable:
            # Losses are means over the voxels: times their number, their gradients are as large as others.
            factor = 1 if results[name].shape[2:] == z.shape[2:] else voxels
            uniform = torch.rand(results[name].shape, generator=generator, device=z.device)
            cotangents[name] = (factor * (2 * uniform - 1).half()).to(results[name].dtype)
        gradients = {
            f"gradient of {name}": torch.autograd.grad(results[name], z, cotangents[name], retain_graph=True)[
                0
            ]
            for name in differentiable
        }
        if len(differentiable) > 1:
            together = (
                [results[name] for name in differentiable],
                z,
                [cotangents[name] for name in differentiable],
            )
            gradients["gradient of all"] = torch.autograd.grad(*together)[0]
    return {name: result.detach() for name, result in results.items()} | gradients


def same_strides(x: Tensor, y: Tensor) -> bool:
    """Strides of axes with more than one element; those of the others, or of empty tensors, mean nothing."""
    if x.numel() == 0:
        return True
    return all(a == b for a, b, size in zip(x.stride(), y.stride(), x.shape, strict=True) if size > 1)
