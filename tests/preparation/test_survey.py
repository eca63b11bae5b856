"""What a survey keeps of the scans it reads."""

import hashlib
import weakref

import nifti_files as files
import numpy as np
import pytest

from semiseg.preparation import survey as module
from semiseg.preparation.scan_folders import find_scans
from semiseg.preparation.survey import survey
from semiseg.preparation.volume_files import read_nifti


@pytest.fixture
def scans(tmp_path):
    labelled, unlabelled = find_scans(*files.own_source(tmp_path / "source"))
    return [*labelled, *unlabelled]


def test_one_scan_is_in_memory_at_a_time_and_a_sample_of_it_afterwards(scans, monkeypatch):
    volumes, sizes = [], []
    read_image = module.read_image

    def recorded(scan):
        assert not any(volume() for volume in volumes)
        stored, image = read_image(scan)
        volumes.extend(map(weakref.ref, (*stored, *image)))
        return stored, image

    monkeypatch.setattr(module, "read_image", recorded)
    monkeypatch.setattr(module, "FOREGROUND_SAMPLE", 50)
    for one in survey(scans):
        sizes.append(one.foreground.size)
        assert one.foreground.base is None  # no view, which would keep all labelled voxels
    assert len(volumes) == 2 * len(scans) and 50 <= max(sizes) < 100


def test_fingerprints_are_of_shape_and_content(scans):
    (one,) = survey(scans[:1])
    values = np.ascontiguousarray(read_nifti(scans[0].image).turned("RAS").values, np.float32)
    assert one.fingerprint == hashlib.sha256(str((1, *values.shape)).encode() + values.tobytes()).hexdigest()
