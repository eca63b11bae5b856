"""The training data as tensors, on the device that trains where they fit."""

from collections.abc import Sequence

import torch

from semiseg.data.case import Case, UnlabelledCase

CUDA_SHARE = 0.5  # of the free memory; training needs the rest


class TrainingTensors:
    """All training images and labels, on the device that trains, or on the CPU where they do not fit there.

    labelled: (image [*S] float32, label [*S] uint8) of every case. unlabelled: (image [*S] float32,) of every
    case. device: the one that trains. storage: the one that holds them. On the CPU they share the memory of
    the cases.
    """

    def __init__(
        self,
        labelled: Sequence[Case],
        unlabelled: Sequence[Case | UnlabelledCase],
        device: torch.device,
    ) -> None:
        self.device = device
        images = [case.image for case in (*labelled, *unlabelled)]
        size = sum(4 * image.size for image in images) + sum(case.label.size for case in labelled)
        self.storage = device if fits(size, device) else torch.device("cpu")

        def load(array: object, dtype: torch.dtype) -> torch.Tensor:
            return torch.as_tensor(array, dtype=dtype, device=self.storage)

        self.labelled = [
            (load(case.image, torch.float32), load(case.label, torch.uint8)) for case in labelled
        ]
        # Only the image is kept: the label of an unlabelled case must not reach the trainer.
        self.unlabelled = [(load(case.image, torch.float32),) for case in unlabelled]


def fits(size: int, device: torch.device) -> bool:  # size in bytes
    """Whether a device has the memory for training data of this size beside everything else."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return size <= CUDA_SHARE * free
