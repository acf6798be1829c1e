"""One real server with every golden model, ready, for all clients."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.server import DEADLINE_S, Server


@pytest.fixture(scope="session")
def server(golden_artifacts: Path) -> Iterator[Server]:
    server = Server(str(golden_artifacts), "--default-model", "digits_cnn")
    try:
        asyncio.run(ready(server))
        yield server
    finally:
        server.end()


async def ready(server: Server) -> None:
    async with server.client() as client:
        await server.wait_until_ready(client)


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=DEADLINE_S, trust_env=False) as client:
        yield client


@pytest.fixture(scope="session")
def unproxied() -> dict[str, str]:
    """This environment, in which the server is asked directly."""
    proxies = {"http_proxy", "https_proxy", "all_proxy"}
    return {name: value for name, value in os.environ.items() if name.lower() not in proxies} | {"NO_PROXY": "*"}
