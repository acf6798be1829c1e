"""What building and running the images takes of this machine: certificates, and a folder that the export may fill."""

import os
import ssl
import subprocess
import sys
from pathlib import Path

import certifi

EXPORT_USER = "1000:1000"


def hand_to_export_user(folder: Path) -> None:
    """Let the export's user write into a folder; where this is not root, everybody."""
    if os.geteuid() == 0:
        os.chown(folder, *(int(part) for part in EXPORT_USER.split(":")))
        folder.chmod(0o755)
    else:
        folder.chmod(0o777)


def trusted_certificates() -> Path:
    """Return what pip trusts on this machine, which the build needs behind a proxy that inspects TLS."""
    configured = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.cert"], check=False, capture_output=True, text=True
    ).stdout.strip()
    candidates = (os.environ.get("PIP_CERT"), configured, ssl.get_default_verify_paths().cafile, certifi.where())
    return next(Path(candidate) for candidate in candidates if candidate and Path(candidate).is_file())
