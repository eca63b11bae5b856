"""Files of a prepared folder where the disk is full or the file system knows the name already."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from semiseg.preparation.layout import write_case, write_list

WRITE = """
import resource, sys
from pathlib import Path
import numpy as np
from semiseg.preparation.layout import write_case
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    write_case(Path(sys.argv[1]), np.random.default_rng(0).random((40, 36, 16), np.float32), None)
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="files have no limit there")
def test_a_full_disk_is_an_error_and_no_crash(tmp_path):
    """In a process of its own: HDF5 may end it."""
    arguments = [sys.executable, "-c", WRITE, tmp_path / "a.h5"]
    written = subprocess.run(arguments, capture_output=True, text=True, check=False)
    message = f"a.h5: cannot be written ({os.strerror(errno.EFBIG)})\n"
    assert (written.returncode, written.stdout) == (0, message), written.stderr


def test_a_case_is_never_written_over_another(tmp_path):
    """As A.h5 would be over a.h5 where small and large letters are the same."""
    write_case(tmp_path / "a.h5", np.ones((2, 2, 2), np.float32), None)
    content = (tmp_path / "a.h5").read_bytes()
    with pytest.raises(OSError, match=r"a.h5: cannot be written \(File exists\)"):
        write_case(tmp_path / "a.h5", np.zeros((2, 2, 2), np.float32), None)
    assert (tmp_path / "a.h5").read_bytes() == content


def test_a_name_may_be_as_long_as_the_file_system_takes(tmp_path):
    path = tmp_path / ("ü" * 125 + ".list")
    write_list(path, ["a"])
    assert path.read_text() == "a\n" and list(tmp_path.iterdir()) == [path]


def test_a_list_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def full(path: Path, *_, **__) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="cannot write .*train.list: No space left on device"):
        write_list(tmp_path / "train.list", ["a"])
