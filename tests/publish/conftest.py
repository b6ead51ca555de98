"""A running demo. MEDQA_BROWSER_HOME, a folder in which the profile `cpu` has run exp_003 and exp_004, makes it the embedded
model with those adapters; otherwise it is the smoke model with two random ones."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from smoke_adapters import make_adapter

HOME = os.environ.get("MEDQA_BROWSER_HOME")
ROOT = Path(__file__).parents[2]


class DemoServer(NamedTuple):
    address: str
    pid: int
    home: Path


@pytest.fixture(scope="module")
def demo_server(tmp_path_factory):
    """A demo in a process of its own: address, process id and home folder."""
    home = HOME or tmp_path_factory.mktemp("home")
    if not HOME:
        for seed, name in enumerate(("exp_003", "exp_004"), start=1):
            make_adapter(home / "adapters" / "smoke-llama" / name, seed)
    environment = {**os.environ, "MEDQA_PROFILE": "cpu" if HOME else "smoke", "MEDQA_HOME": str(home)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "demo.log"
    command = [sys.executable, "-m", "medqa_lib.demo", "--port", str(port)]
    with open(log, "w") as output:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        for _ in range(1200):
            if "Running on local URL" in log.read_text() or server.poll() is not None:
                break
            time.sleep(0.2)
        assert server.poll() is None and "Running on local URL" in log.read_text(), log.read_text()
        yield DemoServer(f"http://127.0.0.1:{port}", server.pid, Path(home))
    finally:
        server.terminate()
        server.wait(30)
    assert "Traceback" not in log.read_text(), log.read_text()
