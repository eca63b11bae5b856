"""Text embeddings of the classes: from CLIP's text tower, from a file, or random ones to compare with."""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from semiseg.atomic import replace_atomically
from semiseg.errors import first_line

CLASS_PLACEHOLDER = "[CLS]"
REACH_TIMEOUT = 10.0  # seconds


@dataclass(frozen=True)
class TextEmbeddings:
    """One embedding a class, and where they come from."""

    embeddings: Tensor  # [C, E] float32
    origin: dict[str, str | int | list[str]]  # for results.json: the source, and what else names it

    def save(self, path: Path) -> None:
        """Write a safetensors file that `load` reads."""
        with replace_atomically(path) as temporary:
            temporary.write_bytes(save({"text": self.embeddings}, {"origin": json.dumps(self.origin)}))

    @classmethod
    def load(cls, path: Path) -> TextEmbeddings:
        """Read what `save` wrote. Raises FileNotFoundError, or ValueError where the file is damaged."""
        if not path.is_file():
            raise FileNotFoundError(f"text embeddings {path} do not exist")
        try:
            with safe_open(path, framework="pt") as file:
                return cls(file.get_tensor("text"), json.loads(file.metadata()["origin"]))
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"text embeddings {path} are damaged: {error}") from None


def class_prompts(
    template: str,  # with [CLS] where the class's name belongs
    class_names: Sequence[str],
) -> list[str]:
    """The sentence of every class."""
    return [template.replace(CLASS_PLACEHOLDER, name) for name in class_names]


def clip_text(
    model: str,  # a name on the Hugging Face hub, or a folder
    prompts: Sequence[str],
) -> TextEmbeddings:
    """Projected features of CLIP's text tower (transformers), as they are, not of unit length.

    The hub is asked only for what is neither a folder nor in its cache. Raises ValueError naming the other
    sources where transformers is not installed, the hub cannot be reached, or the folder holds no such model.
    """
    try:
        from huggingface_hub import model_info
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer
    except ImportError:
        raise ValueError(_without_clip(model, "transformers is not installed")) from None

    place = os.path.expanduser(model)

    def load(local_files_only: bool) -> tuple:
        tower = CLIPTextModelWithProjection.from_pretrained(place, local_files_only=local_files_only)
        tokenizer = CLIPTokenizer.from_pretrained(place, local_files_only=local_files_only)
        # Without its files transformers makes an empty tokenizer.
        if len(tokenizer) != tower.config.vocab_size:
            raise OSError(f"tokenizer of {len(tokenizer)} words for a tower of {tower.config.vocab_size}")
        return tokenizer, tower

    try:
        try:
            tokenizer, tower = load(local_files_only=True)
        except OSError:
            if os.path.isdir(place):
                raise
            # transformers would try again for minutes
            model_info(model, timeout=REACH_TIMEOUT)
            tokenizer, tower = load(local_files_only=False)
    except Exception as error:  # of a damaged file tokenizers raise nothing narrower
        raise ValueError(_without_clip(model, _reason(error))) from error
    tokens = tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        embeddings = tower.eval()(**tokens).text_embeds
    return TextEmbeddings(
        embeddings.float().clone(), {"source": "clip", "model": model, "prompts": list(prompts)}
    )


def _without_clip(model: str, reason: str) -> str:
    return (
        f"method.text=clip cannot load {model!r} ({reason}); three ways out: "
        "pip install transformers and a network or method.clip_model=FOLDER of a saved model; "
        "method.text=file method.text_file=FILE with one embedding a class; method.text=random"
    )


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return "it does not hold tensors alone; anything else could run code and is not loaded"
    return first_line(error)


def file_text(
    path: str | Path,
    num_classes: int,
) -> TextEmbeddings:
    """The one array of a .npz, .safetensors, .pt or .pth file, [num_classes, E] floating point.

    Raises FileNotFoundError, or ValueError for another ending, a damaged file, more than one array or another
    shape.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise FileNotFoundError(f"method.text_file is {str(path)!r}, which does not exist")
    try:
        # Detached, as what a model gave may have been stored with its gradient still asked for.
        arrays = [torch.as_tensor(array).detach() for array in _read_arrays(path)]
    except Exception as error:  # a damaged pickle ends in an error of any kind
        raise ValueError(f"method.text_file {path}: {_reason(error)}") from error
    if len(arrays) != 1:
        raise ValueError(f"method.text_file {path} holds {len(arrays)} arrays, accepted is one")
    (embeddings,) = arrays
    if embeddings.dim() != 2 or len(embeddings) != num_classes or not embeddings.is_floating_point():
        raise ValueError(
            f"method.text_file {path} holds {str(embeddings.dtype).removeprefix('torch.')} "
            f"{list(embeddings.shape)}, accepted is floating point [{num_classes}, width]: "
            "one row a class, background first"
        )
    embeddings = embeddings.float().contiguous()
    if not embeddings.isfinite().all():
        raise ValueError(f"method.text_file {path} holds NaN or infinite values, or some too large for float32")
    return TextEmbeddings(embeddings, {"source": "file", "file": path.name})


def _read_arrays(path: Path) -> list:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return list(arrays.values())
    if path.suffix == ".safetensors":
        return list(load_file(path).values())
    if path.suffix in (".pt", ".pth"):
        content = torch.load(path, map_location="cpu", weights_only=True)
        return list(content.values()) if isinstance(content, dict) else [content]
    raise ValueError("accepted are .npz, .safetensors, .pt and .pth")


def random_text(
    num_classes: int,
    width: int,  # E
    seed: int,
) -> TextEmbeddings:
    """Orthogonal rows that depend on the seed alone.

    Their length is √E: components of unit variance, as a linear layer expects. Raises ValueError for more
    classes than components.
    """
    if num_classes > width:
        raise ValueError(
            f"method.text_width is {width}, accepted are widths from the {num_classes} classes on"
        )
    gaussian = torch.randn(
        width, num_classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    basis, triangle = torch.linalg.qr(gaussian)
    rows = (basis * triangle.diagonal().sign()).T * math.sqrt(width)
    return TextEmbeddings(rows.float().contiguous(), {"source": "random", "seed": seed})
