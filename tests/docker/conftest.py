"""One engine, both images and the exported models, for every test of the images."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.base_image import provide_base_image
from support.engine import ROOT, SECRET_LINE, Engine, running_engine
from support.images import EXPORT_USER, hand_to_export_user, trusted_certificates


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """An engine that has the base image."""
    with running_engine() as found:
        provide_base_image(found)
        yield found


@pytest.fixture(scope="session")
def ca_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build's secret: the certificates that are trusted on this machine, and a line to look for in the images."""
    bundle = tmp_path_factory.mktemp("secret") / "ca_bundle.pem"
    bundle.write_text(f"# {SECRET_LINE}\n{trusted_certificates().read_text()}")
    return bundle


@pytest.fixture(scope="session")
def serve_image(engine: Engine, ca_bundle: Path) -> str:
    return engine.build("serve", "bln-serve:test", ca_bundle)


@pytest.fixture(scope="session")
def export_image(engine: Engine, ca_bundle: Path) -> str:
    return engine.build("export", "bln-export:test", ca_bundle)


@pytest.fixture(scope="session")
def models(engine: Engine, export_image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of both shipped models, exported in the container."""
    folder = shipped_models(tmp_path_factory.mktemp("exported"))
    for name in ("digits_cnn", "digits_rnn"):
        printed = engine.docker(
            *("run", "--rm", "--user", EXPORT_USER, "--network", "none", "--read-only", "--tmpfs", "/tmp"),
            *("--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--memory", "4g"),
            *("--mount", f"type=bind,source={folder},target=/workspace/models"),
            *(export_image, f"models/{name}.keras"),
        )
        assert f"wrote models/{name}/1" in printed
    return folder


def shipped_models(parent: Path) -> Path:
    """Make a folder with the shipped .keras files, where the export's user may write and the service's read."""
    folder = parent / "models"
    folder.mkdir()
    for file in (ROOT / "models").glob("digits_*.*"):
        shutil.copy(file, folder)
    hand_to_export_user(folder)
    return folder
