"""The manifests: valid for every Kubernetes they claim, at one with the service and with one another. No cluster."""

import asyncio
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import kubernetes_validate
import pytest
from support.kserve import Manifest
from support.kubernetes import (
    ARTIFACTS,
    BASE,
    KSERVE,
    NEWEST,
    OLDEST,
    deployment,
    files,
    image_variables,
    invalid,
    kustomization,
    of_kind,
    problems,
    rendered,
    selectors,
)
from support.server import COMMAND, DEADLINE_S, ROOT, Server, environment

import bln_serve

needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl, which renders them, is not installed")
every_folder = pytest.mark.parametrize("folder", [BASE, KSERVE], ids=["base", "kserve"])
each_way = pytest.mark.parametrize("read", [files, pytest.param(rendered, marks=needs_kubectl)])


@every_folder
@each_way
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_they_are_valid(folder: Path, read: Callable[[Path], list[Manifest]], version: str) -> None:
    assert list(invalid(read(folder), version)) == []


def test_the_newest_version_is_the_newest_there_is() -> None:
    assert kubernetes_validate.latest_version().startswith(f"{NEWEST}.")


def test_an_older_kubernetes_would_drop_the_pause_before_the_signal() -> None:
    (problem,) = invalid(files(BASE), "1.28")
    assert "'sleep' was unexpected" in problem


@every_folder
def test_no_file_is_left_out(folder: Path) -> None:
    listed = kustomization(folder)["resources"]
    assert sorted([*listed, "kustomization.yaml"]) == sorted(path.name for path in folder.glob("*.yaml"))
    assert len(files(folder)) == len(listed)


@every_folder
@each_way
def test_they_fit_the_service_and_one_another(folder: Path, read: Callable[[Path], list[Manifest]]) -> None:
    assert problems(read(folder)) == []


@every_folder
def test_the_image_is_this_release(folder: Path) -> None:
    described = kustomization(folder)
    assert described["images"] == [{"name": "bln-serve", "newTag": bln_serve.__version__}]
    assert described["labels"][0]["pairs"]["app.kubernetes.io/version"] == bln_serve.__version__


@needs_kubectl
@every_folder
def test_every_container_gets_the_tag(folder: Path) -> None:
    containers = deployment(rendered(folder))["spec"]["template"]["spec"]["containers"]
    assert [container["image"] for container in containers] == [f"bln-serve:{bln_serve.__version__}"]


@needs_kubectl
def test_every_resource_of_the_base_is_labelled_and_no_selector_names_the_version() -> None:
    manifests = rendered(BASE)
    pairs = kustomization(BASE)["labels"][0]["pairs"]
    pod = deployment(manifests)["spec"]["template"]
    assert all(pairs.items() <= each["metadata"]["labels"].items() for each in [*manifests, pod])
    assert not any("app.kubernetes.io/version" in selector for selector in selectors(manifests).values())


def test_the_user_is_the_image_s() -> None:
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    security = deployment(files(BASE))["spec"]["template"]["spec"]["securityContext"]
    assert f"\nUSER {security['runAsUser']}:{security['runAsGroup']}\n" in dockerfile
    assert image_variables()["BLN_SERVE_HOST"] == "0.0.0.0"


def service_links(service: Manifest) -> dict[str, str]:
    """Return what a kubelet injects for a Service with one port, as `{NAME}_SERVICE_*` and as Docker's links did."""
    name = service["metadata"]["name"].upper().replace("-", "_")
    (port,) = service["spec"]["ports"]
    address, number, link = "10.0.0.1", str(port["port"]), f"{name}_PORT_{port['port']}_TCP"
    return {
        f"{name}_SERVICE_HOST": address,
        f"{name}_SERVICE_PORT": number,
        f"{name}_SERVICE_PORT_{port['name'].upper()}": number,
        f"{name}_PORT": f"tcp://{address}:{number}",
        link: f"tcp://{address}:{number}",
        f"{link}_PROTO": "tcp",
        f"{link}_PORT": number,
        f"{link}_ADDR": address,
    }


def manifest_variables(folder: Path) -> dict[str, str]:
    (container,) = deployment(files(folder))["spec"]["template"]["spec"]["containers"]
    return {each["name"]: each["value"] for each in container["env"]}


@pytest.mark.parametrize(
    ("injected", "sentence"),
    [
        ("all", "Expected environment variables that name a setting. Received: BLN_SERVE_"),
        (
            "BLN_SERVE_SERVICE_HOST",
            "Expected environment variables that name a setting. Received: BLN_SERVE_SERVICE_HOST.",
        ),
        ("BLN_SERVE_PORT", "Expected --port (BLN_SERVE_PORT) to be a valid integer"),
    ],
)
def test_with_service_links_the_service_refuses_to_start(injected: str, sentence: str) -> None:
    links = service_links(of_kind(files(BASE), "Service"))
    finished = subprocess.run(
        [*COMMAND, ARTIFACTS / "tiny_mpmm"],
        env=environment(**manifest_variables(BASE), **(links if injected == "all" else {injected: links[injected]})),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert finished.returncode == 2
    assert finished.stderr.startswith(f"error: {sentence}")


@every_folder
def test_as_the_manifests_start_it_the_probes_find_the_models(folder: Path, tmp_path: Path) -> None:
    """With the manifest's variables and the volume as it is mounted: a repository, or one model's folder, renamed."""
    mounted = tmp_path / "models"
    shutil.copytree(ARTIFACTS / "tiny_mpmm", mounted if folder is KSERVE else mounted / "tiny_mpmm")
    (container,) = deployment(files(folder))["spec"]["template"]["spec"]["containers"]
    variables = {**manifest_variables(folder), "BLN_SERVE_PATHS": str(tmp_path if folder is KSERVE else mounted)}
    arguments = [str(tmp_path / Path(argument).name) for argument in container.get("args", [])]
    server = Server(*arguments, **variables)
    try:
        assert asyncio.run(probed(server, container)) == {"/healthz": 200, "/readyz": 200, "/models/tiny_mpmm": 200}
    finally:
        server.end()


async def probed(server: Server, container: Manifest) -> dict[str, int]:
    probes = (container[name] for name in ("startupProbe", "livenessProbe", "readinessProbe"))
    paths = {probe["httpGet"]["path"] for probe in probes} | {"/models/tiny_mpmm"}
    async with server.client() as client:
        await server.wait_until_ready(client)
        return {path: (await client.get(path)).status_code for path in paths}
