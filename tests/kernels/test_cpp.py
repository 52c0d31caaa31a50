"""Libraries of C++ that lie on disk."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_file_that_a_killed_process_left_is_made_anew(tmp_path):
    """A compiler that is stopped as it writes leaves an empty library, which would stay there."""
    source = f'extern "C" int answer() {{ return 42; }}  // {tmp_path}'
    code = f"from actcompile.kernels._torch import load_cpp; print(load_cpp({source!r})._name)"
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}

    def run(then=""):
        command = [sys.executable, "-c", code + then]
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    file = Path(run().splitlines()[-1])
    assert tmp_path in file.parents and file.stat().st_size
    file.write_bytes(b"")
    assert run(f"; print(load_cpp({source!r}).answer())").splitlines()[-1] == "42"
