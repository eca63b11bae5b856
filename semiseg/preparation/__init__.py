"""From what the challenges hand out, or one's own scans, to the HDF5 files that `semiseg.data` reads."""

from semiseg.preparation.acdc import ACDCChallenge
from semiseg.preparation.challenge import Challenge, prepare
from semiseg.preparation.left_atrium import LeftAtriumChallenge
from semiseg.preparation.own import Choices, prepare_own
from semiseg.preparation.pancreas import PancreasCT

CHALLENGES: dict[str, type[Challenge]] = {
    "la": LeftAtriumChallenge,
    "acdc": ACDCChallenge,
    "pancreas": PancreasCT,
}

__all__ = ["CHALLENGES", "Challenge", "Choices", "prepare", "prepare_own"]
