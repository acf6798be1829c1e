"""The real export command, which sends itself a signal at a moment of its work."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from support.server import ROOT

STOP_AT = """
import os, re, sys
moments, number = [sys.argv.pop(1)], int(sys.argv.pop(1))

def stop(event, arguments):
    if moments and event in ("open", "os.rename") and re.search(moments[0], f"{event} {arguments[0]} {arguments[1]}"):
        moments.clear()
        os.kill(os.getpid(), number)

sys.addaudithook(stop)
from bln_serve.cli.export import main
sys.exit(main())
"""
LOADING = r"^open .*tiny\.keras rb?$"
WRITING = r"^(open|os\.rename) .*model\.onnx"
BETWEEN_THE_RENAMES = r"^os\.rename .*/tiny/1$"


@contextmanager
def stopped(moment: str, number: int, *arguments: Any) -> Iterator[subprocess.Popen[str]]:
    """Start bln-export so that it sends itself a signal at a moment, and wait until it did."""
    command = [sys.executable, "-c", STOP_AT, moment, str(number), *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
        yield process
    finally:
        process.kill()
        process.communicate()
