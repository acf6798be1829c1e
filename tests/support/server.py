"""A real server: its own process on a free port of 127.0.0.1, ended by its own process id."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

DEADLINE_S = 60
ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-c", "import sys; from bln_serve.cli.serve import main; sys.exit(main())"]


def environment(**more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith("BLN_SERVE_")}
    return {**inherited, **more}


class Server:
    """A bln-serve process that listens: this environment's, or the one that `command` starts.

    With `own_group`, a signal may go to it and all it starts, as a terminal's Ctrl-C does.
    """

    def __init__(
        self, *arguments: str, command: Sequence[str] = COMMAND, own_group: bool = False, **variables: str
    ) -> None:
        self.process = subprocess.Popen(
            [*command, *arguments, "--port", "0"],
            cwd=ROOT,
            env=environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0 if own_group else None,
        )
        assert self.process.stdout
        self.first_line = self.process.stdout.readline().rstrip()
        listening = re.search(r"bln-serve listening on (http://[^\s\"]+)", self.first_line)
        assert listening, self.first_line
        self.url = listening[1]
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, args=[self.process.stdout], daemon=True)
        self._reader.start()

    def _read(self, stream: Any) -> None:
        self.lines.extend(line.rstrip() for line in stream)

    def client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(base_url=self.url, timeout=DEADLINE_S, limits=limits, trust_env=False)

    async def wait_until_ready(self, client: httpx.AsyncClient) -> None:
        """Wait until it says that it is, and so is each of its workers."""
        async with asyncio.timeout(DEADLINE_S):
            while not (await client.get("/readyz")).json()["ready"]:
                await asyncio.sleep(0.02)

    async def wait_until_loaded(self, client: httpx.AsyncClient) -> None:
        """Wait until it loads nothing, be it ready or not."""
        async with asyncio.timeout(DEADLINE_S):
            while (await client.get("/readyz")).json()["loading"]:
                await asyncio.sleep(0.02)

    def until_ready(self) -> None:
        """Wait until it is, where no event loop runs."""

        async def ready() -> None:
            async with self.client() as client:
                await self.wait_until_ready(client)

        asyncio.run(ready())

    async def wait_for_queued_rows(self, client: httpx.AsyncClient, rows: int) -> None:
        """Wait until exactly so many rows wait or run."""
        async with asyncio.timeout(DEADLINE_S):
            while await self.queued_rows(client) != rows:
                await asyncio.sleep(0.005)

    async def queued_rows(self, client: httpx.AsyncClient) -> int:
        return sum(model["queued_rows"] for model in (await client.get("/readyz")).json()["models"])

    def resident_mib(self) -> float:
        """Return what is resident now, in MiB."""
        return self._memory_mib("VmRSS")

    def peak_resident_mib(self) -> float:
        """Return the most that was ever resident, in MiB."""
        return self._memory_mib("VmHWM")

    def _memory_mib(self, field: str) -> float:
        status = Path(f"/proc/{self.process.pid}/status")
        if not status.exists():
            pytest.skip("this system has no /proc, where Linux tells what is resident")
        found = re.search(rf"{field}:\s+(\d+) kB", status.read_text())
        assert found
        return int(found[1]) / 1024

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        code = self.process.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)
        return code

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(DEADLINE_S)
        assert self.process.stdout
        self.process.stdout.close()
