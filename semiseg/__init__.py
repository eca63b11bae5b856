"""Semi-supervised segmentation of 2D and 3D medical images."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from semiseg.prediction import Predictor

__all__ = ["Predictor"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what the package offers when it is asked for: PyTorch takes a second."""
    if name == "Predictor":
        from semiseg.prediction import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
