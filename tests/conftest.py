"""Two lanes: everything with TensorFlow; `--without-tensorflow` collects what a serving install must pass.

tests/clients has an environment of its own (make test-clients) and is collected there alone.
"""

import importlib.util
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
NEED_TENSORFLOW = ("benchmarks", "docker", "export", "layers", "models", "reproduction")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--without-tensorflow", action="store_true", help="the lane of the serving install")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--without-tensorflow") and importlib.util.find_spec("tensorflow"):
        raise pytest.UsageError(
            "Expected an environment without TensorFlow for --without-tensorflow. Received: one with."
        )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    needs_tensorflow = collection_path.parent == TESTS and collection_path.name in NEED_TENSORFLOW
    needs_clients = collection_path == TESTS / "clients" and not importlib.util.find_spec("kserve")
    return True if needs_clients or (needs_tensorflow and config.getoption("--without-tensorflow")) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes a minute each comes first: at the end one of two processes would have nothing left to do beside it."""
    items.sort(key=lambda item: item.path.parent != TESTS / "models")


def pytest_report_header(config: pytest.Config) -> str:
    if config.getoption("--without-tensorflow"):
        return f"lane: serving install, without tests/{{{','.join(NEED_TENSORFLOW)}}}"
    return "lane: with TensorFlow" if importlib.util.find_spec("tensorflow") else "lane: clients"


@pytest.fixture(scope="session")
def golden_artifacts() -> Path:
    """Artifacts of format version 1: digits_cnn, digits_rnn, tiny_mpmm, tiny_pppp, tiny_two_inputs."""
    return TESTS / "golden" / "artifacts"
