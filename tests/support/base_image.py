"""The image that both images stand on: the published one or, where no registry can be reached, one like it.

The stand-in is Debian 12's own packages, with Python where the published image has it. It is as large (124 MB), has no
compiler, and no pip but the one that `python -m venv` brings.
"""

import sys
import tempfile
from pathlib import Path

from support.engine import BASE_IMAGE, PULL_S, Engine, install, run_loudly

# The published image leaves these out too.
LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*")
PERL = "usrmerge perl '^libperl5' '^perl-modules-' '^lib.*-perl$'"


def provide_base_image(engine: Engine) -> None:
    """See that the engine has python:3.11-slim-bookworm."""
    if engine.has_image(BASE_IMAGE) or engine.run("docker", "pull", BASE_IMAGE, timeout_s=PULL_S).returncode == 0:
        return
    sys.stderr.write(f"\n{BASE_IMAGE} cannot be pulled: a stand-in is made of Debian's packages (1 minute)\n")
    install("mmdebstrap")
    with tempfile.TemporaryDirectory(prefix="bln-base-") as folder:
        archive = Path(folder) / "base.tar"
        run_loudly(
            "mmdebstrap",
            "--variant=minbase",
            "--include=usr-is-merged,python3-venv,ca-certificates",
            *(f"--dpkgopt=path-exclude={path}" for path in LEFT_OUT),
            f'--customize-hook=chroot "$1" apt-get --quiet --yes purge {PERL}',
            '--customize-hook=rm "$1"/usr/lib/python3.11/EXTERNALLY-MANAGED',
            '--customize-hook=for name in python python3; do ln -s /usr/bin/python3.11 "$1/usr/local/bin/$name"; done',
            "bookworm",
            archive,
        )
        path = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        engine.docker("import", "--change", path, archive, BASE_IMAGE)
