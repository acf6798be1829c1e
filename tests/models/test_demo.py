"""`make serve` leaves a service running, with a curl line that works when pasted, and ends with Ctrl-C."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bln_serve.verification import Tolerance

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120


@pytest.mark.skipif(shutil.which("curl") is None, reason="the line to paste is a curl command, and curl is missing")
def test_the_printed_curl_line_works_when_pasted(tmp_path: Path) -> None:
    demo = subprocess.Popen(
        [sys.executable, ROOT / "models" / "demo.py", "--keep-serving", "--repository", tmp_path],
        stdout=subprocess.PIPE,
        text=True,
        # A shell starts what it leaves in the background with SIGINT ignored, and that is handed down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads here
    )
    try:
        assert demo.stdout
        printed = []
        for line in demo.stdout:
            printed.append(line)
            if line.startswith("curl "):
                break
        answer = subprocess.run(printed[-1], shell=True, capture_output=True, check=True, timeout=TIMEOUT_S)
        with np.load(ROOT / "models" / "digits_samples.npz", allow_pickle=False) as samples:
            truth = samples["labels"][0]
        document = json.loads(answer.stdout)
        assert int(np.argmax(document["predictions"])) == truth
        assert document["model"] == "digits_cnn"
        moved = [line.split() for line in printed if "  moved " in line]
        assert len(moved) == 2
        assert all(float(words[1]) <= Tolerance().rtol * float(words[-1]) for words in moved)
        demo.send_signal(signal.SIGINT)
        demo.communicate(timeout=TIMEOUT_S)
        assert demo.returncode == 0
    finally:
        if demo.poll() is None:
            demo.kill()
            demo.communicate()
