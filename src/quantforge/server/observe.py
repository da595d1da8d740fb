"""What is seen of a server from outside: log lines in JSON, metrics, and headers on answers."""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp

from quantforge.server.guards import Message, Receive, Scope, Send

LOG = logging.getLogger("quantforge.server")
SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, event, and what the record carries as `data`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "data", {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class Metrics:
    """The counters of one server, labelled by route template and never by path."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        labels = ("method", "route")
        self.requests = Counter(
            "quantforge_http_requests", "Requests answered.", (*labels, "status"), registry=registry
        )
        self.seconds = Histogram(
            "quantforge_http_request_seconds",
            "Time to answer.",
            labels,
            buckets=SECONDS,
            registry=registry,
        )
        self.received = Counter(
            "quantforge_http_received_bytes", "Bytes of bodies.", labels, registry=registry
        )
        self.inside = Gauge(
            "quantforge_http_requests_inside", "Requests under way.", registry=registry
        )
        self.jobs = Gauge("quantforge_jobs", "Jobs by state.", ("state",), registry=registry)


class CollectionMetrics:
    """Vectors and bytes of the collections that are open, read when the metrics are."""

    def __init__(self, sizes: Callable[[], list[tuple[str, int, int]]]) -> None:
        self._sizes = sizes

    def collect(self) -> Iterator[Metric]:
        """Yield two gauges by collection."""
        vectors = GaugeMetricFamily(
            "quantforge_collection_vectors", "Vectors.", labels=["collection"]
        )
        held = GaugeMetricFamily(
            "quantforge_collection_bytes", "Bytes held in memory.", labels=["collection"]
        )
        for name, count, nbytes in self._sizes():
            vectors.add_metric([name], count)
            held.add_metric([name], nbytes)
        yield vectors
        yield held


class Observe:
    """Logs and counts every request, numbers it, and sets the headers that all answers have."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(receive, send)
        self._metrics.inside.inc()
        try:
            await self._app(scope, exchange.receive, exchange.send)
        finally:
            self._metrics.inside.dec()
            self._record(scope, exchange)

    def _record(self, scope: Scope, exchange: _Exchange) -> None:
        seconds = time.perf_counter() - exchange.start
        route = getattr(scope.get("route"), "path", "unmatched")
        labels = (scope["method"] if scope["method"] in METHODS else "other", route)
        self._metrics.requests.labels(*labels, exchange.status).inc()
        self._metrics.seconds.labels(*labels).observe(seconds)
        self._metrics.received.labels(*labels).inc(exchange.received)
        client = scope.get("client") or ("", 0)
        level = logging.ERROR if exchange.status >= 500 else logging.INFO
        data = {
            "id": exchange.id,
            "method": scope["method"],
            "path": scope["path"],
            "route": route,
            "status": exchange.status,
            "ms": round(1e3 * seconds, 3),
            "bytes_in": exchange.received,
            "bytes_out": exchange.sent,
            "client": client[0],
        }
        LOG.log(level, "request", extra={"data": data})


class _Exchange:
    """What goes in and out of one request. Until something is sent its status is 500."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self.start = time.perf_counter()
        self.id = secrets.token_hex(8)
        self.status, self.received, self.sent = 500, 0, 0

    async def receive(self) -> Message:
        message = await self._receive()
        self.received += len(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            headers["X-Request-Id"] = self.id
        self.sent += len(message.get("body", b""))
        await self._send(message)
