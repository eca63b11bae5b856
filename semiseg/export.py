"""`python -m semiseg.export --run DIR --output model.onnx|model.pt2`: the inference network as one portable file."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from semiseg.atomic import replace_atomically
from semiseg.commands import command
from semiseg.destinations import check_destination
from semiseg.methods import Method
from semiseg.prediction import Predictor
from semiseg_kernels import use_backend

TOLERANCE = 1e-4  # of a probability
EXTRA_FILE = "semiseg.json"  # of a .pt2
INPUT, OUTPUT = "windows", "probabilities"


class InferenceNetwork(nn.Module):
    """Windows [B, M, *P] float32 in, class probabilities [B, C, *P] float32 of one head out."""

    def __init__(self, method: Method, head: str):
        super().__init__()
        self.network = method.network
        # A function, not a module: prototypes become constants of the program, and a teacher has no part in it.
        self.probabilities = functools.partial(method.head_probabilities, head=head)

    def forward(self, windows: Tensor) -> Tensor:
        return self.probabilities(*self.network(windows))


@command
def main(arguments: list[str] | None = None) -> None:
    """Export the network, compare the file with the original on random windows, and only then leave it there."""
    parser = argparse.ArgumentParser("python -m semiseg.export", description=__doc__)
    parser.add_argument("--run", required=True, type=Path, help="a run directory")
    parser.add_argument("--output", required=True, type=Path, help="a new .onnx or .pt2 file")
    parser.add_argument(
        "overrides", nargs="*", metavar="evaluation.key=value", help="e.g. evaluation.head=prototype"
    )
    options = parser.parse_args(arguments)
    if options.output.suffix not in FORMATS:
        raise ValueError(f"{options.output}: accepted are files that end in {' or '.join(FORMATS)}")
    if options.output.exists():
        raise ValueError(f"{options.output} exists already, accepted is a new file")
    check_destination(options.output)
    if options.output.suffix == ".onnx":
        _require("onnx", "onnxscript")
    predictor = Predictor(options.run, [*options.overrides, "training.device=cpu"])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    difference = export(predictor, options.output)
    print(f"written to {options.output}: {difference}")


def export(predictor: Predictor, path: Path) -> str:
    """Write the inference network of a predictor on the CPU, and say how it compares with the original.

    The batch is free, the windows have the sides of the patch. Operations are written as PyTorch's own. Raises
    ValueError where what was written computes something else; then there is no file.
    """
    config = predictor.config
    network = InferenceNetwork(predictor.method, config.evaluation.head).eval()
    num_channels = len(predictor.description.preprocessing.channels)
    windows = torch.randn(3, num_channels, *config.training.patch_size, generator=torch.Generator().manual_seed(0))
    write, run = FORMATS[path.suffix]
    with torch.no_grad(), _quiet(), replace_atomically(path) as temporary:
        write(_program(network, windows[:2]), temporary, metadata(predictor))
        if path.suffix == ".onnx" and importlib.util.find_spec("onnxruntime") is None:
            return "not compared with the original, as onnxruntime is not installed"
        difference = float((run(temporary, windows) - network(windows)).abs().max())
        if not difference <= TOLERANCE:
            raise ValueError(
                f"{path}: the exported network's probabilities differ by {difference:.2g} from the original's, "
                f"accepted are {TOLERANCE:g}"
            )
    return f"probabilities differ by at most {difference:.2g} from the original's"


def _program(network: nn.Module, windows: Tensor) -> ExportedProgram:
    with use_backend("reference"):
        program = torch.export.export(network, (windows,), dynamic_shapes={INPUT: {0: Dim("batch")}})
    program.example_inputs = None  # would be in the file
    for module in program.graph_module.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # names folders of this machine
    return program


def metadata(predictor: Predictor) -> dict[str, Any]:
    """What a program that runs the file must know."""
    config, description = predictor.config, predictor.description
    return {
        "name": config.name,
        "method": config.method.name,
        "head": config.evaluation.head,
        "largest_component": config.evaluation.largest_component,
        "iteration": predictor.iteration,
        "class_names": description.class_names,
        "label_values": description.label_values,
        "preprocessing": dataclasses.asdict(description.preprocessing),
        "patch_size": config.training.patch_size,
        "stride": config.evaluation.stride,
    }


def write_pt2(program: ExportedProgram, path: Path, metadata: dict[str, Any]) -> None:
    """Write what torch.export.load reads, the metadata in its extra file `semiseg.json`."""
    # Through memory: where PyTorch cannot write a file itself, its error is none that says so.
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={EXTRA_FILE: json.dumps(metadata)})
    path.write_bytes(content.getvalue())


def run_pt2(path: Path, windows: Tensor) -> Tensor:
    return torch.export.load(path).module()(windows)


def write_onnx(program: ExportedProgram, path: Path, metadata: dict[str, Any]) -> None:
    """Write a single ONNX file, the metadata as properties in JSON."""
    onnx_program = torch.onnx.export(
        program, input_names=[INPUT], output_names=[OUTPUT], dynamo=True, verbose=False
    )
    assert onnx_program is not None  # it is with dynamo
    onnx_program.model.metadata_props.update({key: json.dumps(value) for key, value in metadata.items()})
    onnx_program.save(path, external_data=False)


def run_onnx(path: Path, windows: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run([OUTPUT], {INPUT: windows.numpy()})[0])


FORMATS: dict[str, tuple[Callable[..., None], Callable[..., Tensor]]] = {
    ".onnx": (write_onnx, run_onnx),
    ".pt2": (write_pt2, run_pt2),
}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks about themselves."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _require(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(f"{missing[0]} is not installed; pip install -e '.[export]' brings it")


if __name__ == "__main__":
    main()
