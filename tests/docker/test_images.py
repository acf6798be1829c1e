"""What is in the images, and what is not."""

import importlib.metadata
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from support.engine import BASE_IMAGE, ROOT, SECRET_LINE, Engine

import bln_serve

pytestmark = pytest.mark.docker

MB = 1_000_000
MAX_SERVE_MB = 320
# So that the limit holds on a published base image somewhat larger than the one at hand too.
MAX_ADDED_MB = 180

INSTALLED = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
IMPORTABLE = "import importlib.util, sys; print([n for n in sys.argv[1:] if importlib.util.find_spec(n)])"


def inside(engine: Engine, image: str, *command: str) -> str:
    return engine.docker("run", "--rm", "--network", "none", "--entrypoint", command[0], image, *command[1:])


def configuration(engine: Engine, image: str) -> Any:
    return json.loads(engine.docker("image", "inspect", image))[0]


def installed(engine: Engine, image: str) -> dict[str, str]:
    return dict(json.loads(inside(engine, image, "python", "-c", INSTALLED)))


def locked(name: str) -> dict[str, set[str]]:
    """Return the versions that a lock file allows, by normalised name."""
    versions: dict[str, set[str]] = {}
    for line in (ROOT / f"requirements-{name}.txt").read_text().splitlines():
        if "==" in line and not line.startswith(" "):
            package, version = line.split("==")
            versions.setdefault(normal(package), set()).add(version.split()[0])
    return versions


def normal(package: str) -> str:
    return package.split("[", maxsplit=1)[0].lower().replace("_", "-").replace(".", "-")


def test_the_serving_image_is_small(engine: Engine, serve_image: str) -> None:
    size, base = (configuration(engine, image)["Size"] / MB for image in (serve_image, BASE_IMAGE))
    assert size <= MAX_SERVE_MB
    assert size - base <= MAX_ADDED_MB


@pytest.mark.parametrize("absent", ["tensorflow", "keras", "h5py", "onnx", "tf2onnx", "pip", "ensurepip", "hatchling"])
def test_the_serving_image_has_no_module(engine: Engine, serve_image: str, absent: str) -> None:
    assert inside(engine, serve_image, "python", "-c", IMPORTABLE, absent, "numpy") == "['numpy']"


def test_the_serving_image_has_no_compiler_and_no_pip(engine: Engine, serve_image: str) -> None:
    look = "for name in gcc cc g++ clang ld make pip pip3 pip3.11 uv sh; do command -v $name; done; true"
    found = inside(engine, serve_image, "sh", "-c", look)
    assert [Path(program).name for program in found.splitlines()] == ["sh"]


def test_the_export_image_has_tensorflow_and_no_pip(engine: Engine, export_image: str) -> None:
    assert inside(engine, export_image, "python", "-c", IMPORTABLE, "tensorflow", "tf2onnx", "pip") == (
        "['tensorflow', 'tf2onnx']"
    )


@pytest.mark.parametrize("target", ["serve", "export"])
def test_an_image_holds_what_its_lock_says(engine: Engine, target: str, request: pytest.FixtureRequest) -> None:
    inside_it = installed(engine, request.getfixturevalue(f"{target}_image"))
    assert inside_it.pop("bln-serve") == bln_serve.__version__
    lock = locked(target)
    assert {name: version for name, version in inside_it.items() if version not in lock.get(normal(name), ())} == {}
    assert normal("onnxruntime") in map(normal, inside_it)


@pytest.mark.parametrize("target", ["serve", "export"])
def test_the_bill_of_materials_names_everything_that_is_installed(
    engine: Engine, target: str, request: pytest.FixtureRequest
) -> None:
    image = request.getfixturevalue(f"{target}_image")
    document = json.loads(inside(engine, image, "cat", f"/opt/venv/share/sbom/bln-{target}.cdx.json"))
    assert document["bomFormat"] == "CycloneDX"
    assert {normal(each["name"]): each["version"] for each in document["components"]} == {
        normal(name): version for name, version in installed(engine, image).items()
    }


def test_the_bills_of_materials_come_out_of_the_build(engine: Engine, ca_bundle: Path, tmp_path: Path) -> None:
    engine.docker(
        *("build", "-f", ROOT / "docker" / "Dockerfile", "--target", "sbom", "--output", tmp_path),
        *("--secret", f"id=ca_bundle,src={ca_bundle}", ROOT),
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bln-export.cdx.json", "bln-serve.cdx.json"]


@pytest.mark.parametrize("target", ["serve", "export"])
def test_an_image_says_what_it_is_and_runs_as_nobody(
    engine: Engine, target: str, request: pytest.FixtureRequest
) -> None:
    image = request.getfixturevalue(f"{target}_image")
    config = configuration(engine, image)["Config"]
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
    assert labels["title"] == f"bln-{target}"
    assert labels["version"] == bln_serve.__version__
    assert labels["licenses"] == importlib.metadata.metadata("bln-serve")["License-Expression"]
    assert {"description", "revision"} <= labels.keys()
    assert config["Entrypoint"] == [f"bln-{target}"]
    user, group = config["User"].split(":")
    assert user.isdigit()  # so that Kubernetes can see that it is not root
    assert (user != "0", group != "0") == (True, True)
    assert inside(engine, image, "id", "-u") == user
    assert "ORT_DISABLE_TELEMETRY=1" in config["Env"]


def test_only_the_serving_image_has_a_health_check(engine: Engine, serve_image: str, export_image: str) -> None:
    assert configuration(engine, serve_image)["Config"]["Healthcheck"]["Test"][0] == "CMD"
    assert "Healthcheck" not in configuration(engine, export_image)["Config"]


def leaks(engine: Engine, image: str, folder: Path) -> list[str]:
    """Return where the secret's own line stands in an image: its history, its configuration or a file of a layer."""
    found = []
    if SECRET_LINE in engine.docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image):
        found.append("history")
    archive = folder / "image.tar"
    engine.docker("save", "--output", archive, image)
    with tarfile.open(archive) as saved:
        for member in saved:
            if (stream := saved.extractfile(member)) is None:
                continue
            # Layers are stored as they are, uncompressed: a file's bytes stand in them.
            rest = b""
            while chunk := stream.read(1 << 24):
                if SECRET_LINE.encode() in rest + chunk:
                    found.append(member.name)
                    break
                rest = chunk[-len(SECRET_LINE) :]
    archive.unlink()
    return found


def test_the_build_secret_is_nowhere_in_the_serving_image(engine: Engine, serve_image: str, tmp_path: Path) -> None:
    assert leaks(engine, serve_image, tmp_path) == []


def test_a_secret_in_an_image_would_be_found(engine: Engine, ca_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(
        f"FROM {BASE_IMAGE}\n"
        "RUN --mount=type=secret,id=ca_bundle,target=/secret cp /secret /leak\n"
        "RUN rm /leak\n"  # it is in the layer below all the same
    )
    engine.docker("build", "-t", "bln-leak:test", "--secret", f"id=ca_bundle,src={ca_bundle}", tmp_path)
    try:
        assert leaks(engine, "bln-leak:test", tmp_path) != []
    finally:
        engine.docker("rmi", "bln-leak:test")
