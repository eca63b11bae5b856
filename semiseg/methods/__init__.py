"""Training methods: what a batch is, its losses and its update. One file a method."""

from semiseg.methods.method import Method, Stage
from semiseg.methods.mper import MPER
from semiseg.methods.supervised import Supervised
from semiseg.methods.vclipseg import VCLIPSeg

METHODS: dict[str, type[Method]] = {"supervised": Supervised, "mper": MPER, "vclipseg": VCLIPSeg}

__all__ = ["METHODS", "MPER", "Method", "Stage", "Supervised", "VCLIPSeg"]
