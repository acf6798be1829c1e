"""bln-verify: does this artifact still answer as Keras did when it was exported?"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from bln_serve.artifact import Artifact
from bln_serve.cli import _command
from bln_serve.runtime import Model, replay
from bln_serve.verification import Tolerance


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="bln-verify",
        description="Check the hashes of an exported version and replay its samples through ONNX Runtime.",
    )
    parser.add_argument("path", type=Path, metavar="models/NAME/VERSION", help="the version's folder")
    arguments = parser.parse_args(argv)
    return _command.run(lambda: verify(arguments.path))


def verify(path: Path) -> int:
    """Print each check of the artifact at `path` and return the exit code."""
    artifact = Artifact.open(path)
    artifact.check_hashes()
    manifest = artifact.manifest
    print(f"{manifest.name} version {manifest.version}: {len(manifest.files)} files match their SHA-256")
    for name in artifact.unknown_files:
        print(f"note: {name} is not in the manifest, and is not served")
    report = replay(artifact, Model(artifact))
    print(report.table())
    if (tolerance := manifest.tolerance).wider_than(Tolerance()):
        figures = f"rtol {tolerance.rtol:g}, atol {tolerance.atol:g}"
        print(f"note: exported with --force under a wider tolerance than usual: {figures}")
    if not report.passed:
        print("FAILED: this artifact does not answer as Keras did. Export the model again.")
        return _command.FAILED
    print(f"verified: {len(report.checks)} answers equal Keras's, largest difference {report.largest_difference:.1e}")
    return 0
