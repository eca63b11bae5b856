"""Batch normalisation when several processes hold a part of the batch each."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from semiseg_kernels import sum_over_processes


class JoinedBatchNorm(nn.SyncBatchNorm):
    """Batch normalisation by the mean and variance of the joined batch: PyTorch's on a GPU, which has none on a CPU."""

    def forward(
        self,
        x: Tensor,  # [B, channels, *S]
    ) -> Tensor:
        if x.is_cuda or not self.training:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # bfloat16 under autocast
        local_variance, local_mean = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)
        first, second = local_mean.double(), local_variance.double() + local_mean.double().square()
        voxels = torch.tensor(float(x.numel() // x.shape[1]), dtype=torch.float64)
        count, first, second = sum_over_processes(voxels, voxels * first, voxels * second)
        mean = first / count
        variance = (second / count - mean.square()).clamp_min(0)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = variance * count / (count - 1)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        of_channels = (-1, *[1] * (x.dim() - 2))
        scale, shift = (value.to(wide.dtype).view(of_channels) for value in (scale, shift))
        return torch.addcmul(shift, wide, scale).to(x.dtype)


def join_batch_norm(module: nn.Module) -> None:
    """Put a JoinedBatchNorm in the place of every batch normalisation; parameters and names stay."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            joined = JoinedBatchNorm(child.num_features, child.eps, child.momentum)
            joined.weight, joined.bias = child.weight, child.bias
            for buffer, value in child.named_buffers():
                setattr(joined, buffer, value)
            module.add_module(name, joined.train(child.training))
        else:
            join_batch_norm(child)
