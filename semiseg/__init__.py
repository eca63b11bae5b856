"""Semi-supervised segmentation of 2D and 3D medical images."""

__version__ = "0.1.0"
