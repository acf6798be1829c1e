"""Make the artifacts of format version 1 under tests/golden/artifacts/, once: later versions must go on loading them.

python tests/golden/make_artifacts.py

tiny_* and digits_* were made before a run could hold several mini-batches, together_* since.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from support import models  # noqa: E402 - the path has to be set first

from bln_serve.export import export  # noqa: E402 - as above


def main() -> None:
    """Export the shipped models, and tiny ones of every row coupling, where they are not there yet."""
    out = HERE / "artifacts"
    sources = {name: HERE.parents[1] / "models" / f"{name}.keras" for name in ("digits_cnn", "digits_rnn")}
    for policy, m in (("MPMM", 5), ("PPPP", 4)):
        sources[f"tiny_{policy.lower()}"] = models.tiny(policy, m, f"tiny_{policy.lower()}")
        sources[f"together_{policy.lower()}"] = models.tiny(policy, m, f"together_{policy.lower()}")
    sources["tiny_two_inputs"] = models.two_inputs()
    for name, source in sources.items():
        if not (out / name).exists():
            export(source, out)
            (out / name / ".lock").unlink()


if __name__ == "__main__":
    main()
