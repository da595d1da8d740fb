"""A server under the load of many clients: time of each kind of request, and no error.

    python -m benchmarks.server_load --clients 64 --seconds 60

The server is a process of its own on this machine, and the clients share its cores. Each client
sends one request after the other, drawn from MIX; what is acknowledged must be there at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from safetensors.numpy import save as to_safetensors

from benchmarks.record import RESULTS, save
from benchmarks.record import load as load_result
from quantforge.server.bodies import NPY, SAFETENSORS

NAME = "server_load_cpu"
DIM = 384
POINTS = 20_000
MIX = {"search": 60, "add": 12, "remove": 6, "compress": 8, "decompress": 8, "info": 6}
"""Shares of requests, percent. Searches: 1 query, k=10. Adds: 4 points. Compress: 64 vectors."""
COLLECTION = "/v1/collections/load"
START = """
import sys
from quantforge.server import run
run(folder=sys.argv[1], port=0, workers=int(sys.argv[2]))
"""


@asynccontextmanager
async def server(folder: Path, workers: int) -> AsyncIterator[tuple[str, int, list[dict]]]:
    """Start a server; yield URL, process id and the log so far; it must stop when told to."""
    process = subprocess.Popen(
        [sys.executable, "-c", START, str(folder), str(workers)], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    log, url = [], None
    while url is None:
        log.append(json.loads(process.stderr.readline()))
        if "running on" in log[-1]["event"]:
            url = log[-1]["event"].split()[3]
    stderr = process.stderr
    reader = asyncio.create_task(asyncio.to_thread(lambda: log.extend(map(json.loads, stderr))))
    try:
        yield url, process.pid, log
    finally:
        process.send_signal(signal.SIGTERM)
        await reader
        code = process.wait(60)
        assert code in (0, -signal.SIGTERM), f"the server ended with {code}"


class Client:
    """Sends requests one after the other and notes how long each took."""

    def __init__(self, http: httpx.AsyncClient, number: int, bodies: dict[str, bytes]) -> None:
        self._http, self._bodies = http, bodies
        self._random = random.Random(number)
        self._noise = np.random.RandomState(number)
        self._next = 10_000_000 * (number + 1)
        self.mine: list[int] = []
        self.ms: dict[str, list[float]] = defaultdict(list)
        self.errors: list[str] = []

    async def run(self, until: float) -> None:
        """Send requests until a time."""
        kinds, weights = list(MIX), list(MIX.values())
        while time.monotonic() < until:
            kind = self._random.choices(kinds, weights)[0]
            if kind == "remove" and len(self.mine) < 4:
                kind = "add"
            start = time.perf_counter()
            try:
                answer = await getattr(self, f"_{kind}")()
                if answer.status_code >= 400:
                    self.errors.append(f"{kind}: {answer.status_code} {answer.text[:200]}")
            except httpx.HTTPError as error:
                self.errors.append(f"{kind}: {error!r}")
            self.ms[kind].append(1e3 * (time.perf_counter() - start))

    async def _search(self) -> httpx.Response:
        query = self._noise.standard_normal((1, DIM)).round(4).tolist()
        answer = await self._http.post(f"{COLLECTION}/search", json={"queries": query, "k": 10})
        if answer.is_success and len(answer.json()["ids"][0]) != 10:
            self.errors.append("search: fewer than 10")
        return answer

    async def _add(self) -> httpx.Response:
        ids = list(range(self._next, self._next + 4))
        self._next += 4
        vectors = self._noise.standard_normal((4, DIM)).astype(np.float32)
        body = to_safetensors({"vectors": vectors, "ids": np.array(ids)})
        headers = {"Content-Type": SAFETENSORS}
        answer = await self._http.post(f"{COLLECTION}/points", content=body, headers=headers)
        if answer.is_success:
            self.mine += ids
        return answer

    async def _remove(self) -> httpx.Response:
        gone = [self.mine.pop(self._random.randrange(len(self.mine))) for _ in range(2)]
        return await self._http.request("DELETE", f"{COLLECTION}/points", json={"ids": gone})

    async def _compress(self) -> httpx.Response:
        headers = {"Content-Type": NPY}
        return await self._http.post("/compress", content=self._bodies["npy"], headers=headers)

    async def _decompress(self) -> httpx.Response:
        headers = {"Content-Type": SAFETENSORS}
        return await self._http.post("/decompress", content=self._bodies["packed"], headers=headers)

    async def _info(self) -> httpx.Response:
        return await self._http.get(COLLECTION)


async def prepare(http: httpx.AsyncClient) -> dict[str, bytes]:
    """Fill a collection, and return bodies to send."""
    noise = np.random.RandomState(0)
    await http.put(COLLECTION, json={"dim": DIM, "bits": 4})
    vectors = noise.standard_normal((POINTS, DIM)).astype(np.float32)
    headers = {"Content-Type": SAFETENSORS}
    body = to_safetensors({"vectors": vectors})
    answer = await http.post(f"{COLLECTION}/points", content=body, headers=headers)
    answer.raise_for_status()
    await http.post(f"{COLLECTION}/search", json={"like": [0]})
    with tempfile.TemporaryFile() as file:
        np.save(file, vectors[:64])
        file.seek(0)
        npy = file.read()
    packed = await http.post("/compress", content=npy, headers={"Content-Type": NPY})
    return {"npy": npy, "packed": packed.content}


async def check_kept(http: httpx.AsyncClient, clients: list[Client]) -> None:
    """Assert that the collection holds exactly what was acknowledged."""
    expected = set(range(POINTS)).union(*(client.mine for client in clients))
    found: set[int] = set()
    total = 1
    while len(found) < total:
        query = {"offset": len(found), "limit": 1000}
        page = (await http.get(f"{COLLECTION}/points", params=query)).json()
        total = page["total"]
        found |= set(page["ids"])
    assert found == expected, f"{len(expected - found)} lost, {len(found - expected)} too many"


def percentile(values: list[float], share: float) -> float:
    """Return a percentile by rank."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def summary(ms: dict[str, list[float]], seconds: float) -> list[dict[str, Any]]:
    """Return a row for each kind of request, and one for all."""
    rows = []
    for kind, times in [*sorted(ms.items()), ("all", [t for found in ms.values() for t in found])]:
        rows.append(
            {
                "request": kind,
                "count": len(times),
                "per_s": round(len(times) / seconds, 2),
                "mean_ms": round(statistics.mean(times), 2),
                **{f"p{p}_ms": round(percentile(times, p / 100), 2) for p in (50, 90, 99)},
                "max_ms": round(max(times), 2),
            }
        )
    return rows


def peak_mib(pid: int) -> float:
    """Return the greatest memory a process has held (Linux)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def cpu_s(pid: int) -> float:
    """Return the CPU time of a process so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def load(clients: int, seconds: float, workers: int) -> tuple[list[dict[str, Any]], dict]:
    """Run and return rows and what else was seen.

    Raises:
        AssertionError: for a request that failed, or points that are not what was acknowledged.
    """
    limits = httpx.Limits(max_connections=clients + 1, max_keepalive_connections=clients + 1)
    with tempfile.TemporaryDirectory() as folder:
        async with (
            server(Path(folder) / "data", workers) as (url, pid, log),
            httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http,
        ):
            bodies = await prepare(http)
            found = [Client(http, i, bodies) for i in range(clients)]
            busy, used = os.getloadavg()[0], cpu_s(pid)
            start = time.monotonic()
            await asyncio.gather(*(client.run(start + seconds) for client in found))
            took, used = time.monotonic() - start, cpu_s(pid) - used
            await check_kept(http, found)
            peak = peak_mib(pid)
        failed = [line for line in log if line["level"] in ("error", "critical")]
    errors = [error for client in found for error in client.errors]
    assert not errors, f"{len(errors)} errors, such as {errors[:3]}"
    assert not failed, failed[:3]
    merged: dict[str, list[float]] = defaultdict(list)
    for client in found:
        for kind, times in client.ms.items():
            merged[kind] += times
    count = sum(map(len, merged.values()))
    seen = {"clients": clients, "seconds": round(took, 1), "workers": workers, "errors": 0,
            "points": POINTS, "dim": DIM, "bits": 4, "server_peak_mib": round(peak),
            "load_average_before": round(busy, 1), "cores": os.cpu_count(),
            "server_cpu_ms_per_request": round(1e3 * used / count, 2),
            "fastapi": version("fastapi"), "uvicorn": version("uvicorn")}  # fmt: skip
    return summary(merged, took), seen


def table(result: dict[str, Any]) -> str:
    """Return the Markdown table of a result, and where it comes from."""
    lines = ["| request | count | per second | median | p90 | p99 |", "|---|--:|--:|--:|--:|--:|"]
    for row in result["rows"]:
        times = " | ".join(f"{row[f'p{p}_ms']:,.0f} ms" for p in (50, 90, 99))
        lines.append(f"| {row['request']} | {row['count']:,} | {row['per_s']:.1f} | {times} |")
    seen, where = result["rows"][0], result["environment"]
    versions = [where["torch"], seen["fastapi"], seen["uvicorn"]]
    named = ", ".join(map(" ".join, zip(("torch", "fastapi", "uvicorn"), versions, strict=True)))
    lines += [
        "",
        f"{seen['clients']} clients, {seen['seconds']:.0f} s, {seen['errors']} errors; "
        f"{where['device']}, {seen['cores']} cores shared with the clients, load average "
        f"{seen['load_average_before']} before; server {seen['server_peak_mib']} MiB at most, "
        f"{seen['server_cpu_ms_per_request']:.0f} ms of CPU a request; "
        f"{named}, {where['date']}.",
    ]
    return "\n".join(lines)


def with_table(text: str, result: dict[str, Any]) -> str:
    """Return a document whose block `<!-- load --> ... <!-- /load -->` is the table."""
    block = f"<!-- load -->\n{table(result)}\n<!-- /load -->"
    return re.sub("<!-- load -->.*<!-- /load -->", lambda _: block, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--document", type=Path, help="docs/server.md: put the table there")
    args = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 4096), hard), hard))
    rows, seen = asyncio.run(load(args.clients, args.seconds, args.workers))
    for row in rows:
        print(" ".join(f"{key}={value}" for key, value in row.items()))
    print(save(NAME, "cpu", [{**seen, **row} for row in rows], args.output))
    if args.document is not None:
        text = with_table(args.document.read_text("utf-8"), load_result(NAME, args.output))
        args.document.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
