"""The training data as tensors, on the device that trains where they fit."""

from collections.abc import Sequence

import torch

from semiseg.data.case import Case, UnlabelledCase
from semiseg.data.compact_image import compact
from semiseg.data.disk_image import DiskImage

CUDA_SHARE = 0.5  # of the free memory; training needs the rest


class TrainingTensors:
    """All training images and labels, on the device that trains, or on the CPU where they do not fit there.

    labelled: (image [M, *S] float32, label [1, *S] uint8) of every case. unlabelled: (image [M, *S] float32,) of every
    case. channels: M. Images of few values are a CompactImage. device: the one that trains. storage: the one that holds
    them. On the CPU labels, and images that are not compact, share the memory of the cases; images left in their files
    stay there.
    """

    def __init__(
        self,
        labelled: Sequence[Case],
        unlabelled: Sequence[Case | UnlabelledCase],
        device: torch.device,
    ) -> None:
        self.device = device
        given = [case.image for case in (*labelled, *unlabelled)]
        self.channels = given[0].shape[0]
        images = [image if isinstance(image, DiskImage) else compact(image) for image in given]
        labels = [torch.as_tensor(case.label, dtype=torch.uint8).unsqueeze(0) for case in labelled]
        size = sum(values.nbytes for values in (*images, *labels))
        self.storage = device if fits(size, device) else torch.device("cpu")
        self.labelled = [
            (image.to(self.storage), label.to(self.storage))
            for image, label in zip(images, labels, strict=False)
        ]
        self.on_disk = self.storage.type == "cpu" and any(isinstance(image, DiskImage) for image in images)
        # Only the image is kept: the label of an unlabelled case must not reach the trainer.
        self.unlabelled = [(image.to(self.storage),) for image in images[len(labels) :]]


def fits(size: int, device: torch.device) -> bool:  # size in bytes
    """Whether a device has the memory for training data of this size beside everything else."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return size <= CUDA_SHARE * free
