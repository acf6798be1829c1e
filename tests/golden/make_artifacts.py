"""Make the artifacts of format version 1 under tests/golden/artifacts/, once: later versions must go on loading them.

python tests/golden/make_artifacts.py
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from support import models  # noqa: E402 - the path has to be set first

from bln_serve.export import export  # noqa: E402 - as above


def main() -> None:
    """Export the shipped models, and tiny ones of every row coupling."""
    out = HERE / "artifacts"
    for name in ("digits_cnn", "digits_rnn"):
        export(HERE.parents[1] / "models" / f"{name}.keras", out)
    for policy, m in (("MPMM", 5), ("PPPP", 4)):
        export(models.tiny(policy, m, f"tiny_{policy.lower()}"), out)
    export(models.two_inputs(), out)


if __name__ == "__main__":
    main()
