"""Runs a program in two processes that know each other, as `accelerate launch` starts them on two GPUs; on a machine without one, too."""

import os
import subprocess
import sys
from pathlib import Path


def run_in_two(program, *arguments, **variables):
    """Run the file to its end, with these environment variables; it must not fail."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(program),
    ]
    tests = Path(__file__).parent
    path = os.pathsep.join(map(str, (tests.parent, tests)))
    done = subprocess.run(
        [*command, *map(str, arguments)],
        cwd=tests.parent,
        env={**os.environ, "PYTHONPATH": path, **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
