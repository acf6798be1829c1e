"""tritonserver with its own HTTP front and its Python back end, which runs onnxruntime; both come in one wheel.

The C++ back end for ONNX models does not. Triton's guide to its batcher begins with an empty `dynamic_batching`, which
batches what waits and delays nothing, and lets a queue delay be tried after it: both are measured.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import wire
from bln_serve.artifact import Artifact

from . import environments
from .peer import Peer
from .process import Running, free_port, running

MAX_BATCH_ROWS = 64
DELAY_US = 2000

_CONFIG = """name: "{model}"
backend: "python"
max_batch_size: {max_batch_size}
input [ {{ name: "{input}" data_type: TYPE_FP32 dims: [ {input_dims} ] }} ]
output [ {{ name: "{output}" data_type: TYPE_FP32 dims: [ {output_dims} ] }} ]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
parameters {{ key: "onnx" value: {{ string_value: "{onnx}" }} }}
{batching}
"""


def peers() -> list[Peer]:
    """Return tritonserver without and with a queue delay, and as an artifact's own config.pbtxt has it."""
    asked = (wire.V2_BINARY, wire.V2_JSON)
    return [
        _peer("tritonserver", "dynamic_batching { }", asked),
        _peer(
            f"tritonserver, {DELAY_US / 1000:g} ms delay",
            f"dynamic_batching {{ max_queue_delay_microseconds: {DELAY_US} }}",
            asked[:1],
        ),
        _peer("tritonserver, batching off", "", ()),
    ]


def _peer(title: str, batching: str, forms: tuple[wire.Form, ...]) -> Peer:
    size = MAX_BATCH_ROWS if batching else 0
    settings = f"max_batch_size: {size} {batching}".rstrip() + ", one instance of the Python back end"

    def serve(artifact: Artifact, processor: int) -> contextlib.AbstractContextManager[Running]:
        return _serve(artifact, processor, size, batching)

    return Peer(title, settings, forms, "v2-binary", serve, _versions)


def _versions() -> dict[str, str]:
    folder = environments.provide("triton")
    return {package: environments.version(folder, package) for package in ("nvidia-pytriton", "onnxruntime", "numpy")}


@contextlib.contextmanager
def _serve(artifact: Artifact, processor: int, max_batch_size: int, batching: str) -> Iterator[Running]:
    packages = environments.site_packages(environments.provide("triton"))
    server = packages / "pytriton" / "tritonserver"
    _link_stub(server)
    port = free_port()
    shared_memory = f"bln_peers_{port}_"
    with tempfile.TemporaryDirectory(prefix="bln-triton-") as folder:
        _write_repository(Path(folder), artifact, max_batch_size, batching)
        command = [
            server / "bin" / "tritonserver",
            f"--model-repository={folder}",
            f"--backend-directory={server / 'backends'}",
            f"--backend-config=python,shm-region-prefix-name={shared_memory}",
            "--http-address=127.0.0.1",
            f"--http-port={port}",
            "--allow-grpc=false",
            "--allow-metrics=false",
            "--log-info=false",
        ]
        # The back end's own interpreter looks on the path for the Python whose library it is.
        variables = {"PATH": "/usr/bin:/bin", "PEER_PACKAGES": str(packages)}
        try:
            with running(command, port, "/v2/health/ready", processor, variables) as ready:
                yield ready
        finally:
            for left in Path("/dev/shm").glob(f"{shared_memory}*"):
                left.unlink(missing_ok=True)


def _link_stub(server: Path) -> None:
    """Put the back end's interpreter where it is looked for: the wheel has one for each Python, elsewhere."""
    stub = server / "python_backend_stubs" / "3.11" / "triton_python_backend_stub"
    link = server / "backends" / "python" / stub.name
    if not link.exists():
        link.symlink_to(stub)


def _write_repository(folder: Path, artifact: Artifact, max_batch_size: int, batching: str) -> None:
    model, signature = folder / wire.MODEL, artifact.manifest.signature
    (model / "1").mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("triton_model.py"), model / "1" / "model.py")
    (one,), (other,) = signature.inputs, signature.outputs
    rows = () if max_batch_size else (-1,)  # beside max_batch_size, dims leave the rows out
    config = _CONFIG.format(
        model=wire.MODEL,
        max_batch_size=max_batch_size,
        input=one.name,
        input_dims=", ".join(map(str, (*rows, *one.shape[1:]))),
        output=other.name,
        output_dims=", ".join(map(str, (*rows, *other.shape[1:]))),
        onnx=artifact.path / "model.onnx",
        batching=batching,
    )
    (model / "config.pbtxt").write_text(config)
