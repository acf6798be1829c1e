"""Compare the service with other servers: PYTHONPATH=tests python -m benchmarks.peers [--turns N] [--seconds S].

It prints a table of the loads and one of the composition test, and leaves `results.json` and `results.svg`. It ends
with 1 where the service's own answers moved further than its tolerance.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from support.engine import install
from tqdm import tqdm

from benchmarks.contestants import paper_cnn
from benchmarks.load import two_processors

from . import environments, litserve_server, ours, report, triton
from .contest import Contest, Timing
from .mixing import mix
from .peer import Peer

RESULTS = Path(__file__).parent / "results"
PLOT = Path(__file__).with_name("plot.py")


def main() -> int:
    """Measure, print and plot; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="of each server (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=3, help="of one load (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the results go (default: %(default)s)")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, _end)
    install("wrk")
    processors, timing = two_processors(), Timing(given.turns, given.seconds)
    peers = [ours.peer(), *triton.peers(), litserve_server.peer()]
    _check_versions(peers)
    plot = environments.provide("plot")
    with tempfile.TemporaryDirectory(prefix="bln-peers-") as folder:
        artifact = paper_cnn(Path(folder), "PPMM")
        coupled = paper_cnn(Path(folder), "MMMM")
        mixed = [mix(peer, coupled, processors) for peer in tqdm(peers, "composition test", disable=None)]
        contest = Contest(peers, artifact, processors)
        turns = timing.turns * len(contest.peers)
        for _ in tqdm(contest.run(timing), "loads", turns, disable=None):
            pass
    print("The paper's CNN, PPMM, one thread, the server on one processor and wrk on another\n")
    print(*report.loads(contest), sep="\n")
    print("\nThe paper's CNN, MMMM: how far answers to one client move while others ask\n")
    print(*report.mixings(mixed), sep="\n")
    print("", *report.settings(peers), sep="\n")
    given.results.mkdir(parents=True, exist_ok=True)
    figures, picture = given.results / "results.json", given.results / "results.svg"
    figures.write_text(json.dumps(report.document(contest, mixed, peers, timing), indent=1) + "\n")
    subprocess.run([plot / "bin" / "python", "-P", PLOT, figures, picture], check=True)
    own = mixed[0]
    if not own.kept_apart or not own.requests_a_run or own.requests_a_run <= 1:
        print(
            f"error: Expected answers of the service that move by at most the tolerance, in runs that several requests "
            f"share. Received: {own.tolerances:.2g} tolerances, {own.requests_a_run} requests a run.",
            file=sys.stderr,
        )
        return 1
    return 0


def _check_versions(peers: list[Peer]) -> None:
    """Refuse to compare two releases of ONNX Runtime.

    Raises:
        RuntimeError: they are not all the same.
    """
    runtimes = {peer.title: peer.versions()["onnxruntime"] for peer in peers}
    if len(set(runtimes.values())) > 1:
        raise RuntimeError(f"Expected one version of onnxruntime. Received: {runtimes}. Run `make lock`.")


def _end(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)  # as an exception, so that whoever started a process ends it


if __name__ == "__main__":
    sys.exit(main())
