"""`Settings`: where a server listens, who may use it, and how much it takes on."""

from __future__ import annotations

import dataclasses
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from quantforge.errors import ConfigError
from quantforge.spec import check_int

MiB = 2**20
TOKEN_VARIABLE = "QUANTFORGE_TOKEN"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a server runs.

    Args:
        host: address to listen on; one that others can reach needs a token.
        port: TCP port; 0 takes a free one.
        token: what requests must bring as `Authorization: Bearer <token>`; None: nothing.
        folder: where collections live; made if it is not there.
        device: of compression and decompression, "cpu" or "cuda".
        workers: requests that compute at one time.
        max_pending: requests inside at one time, waiting ones included; more get 429.
        max_body_bytes: of one request.
        max_inflight_bytes: of all requests inside; more get 429.
        max_json_bytes: of one JSON body.
        max_numbers: numbers in all tensors of a request, decoded.
        max_dim: length of a vector.
        max_dense_dim: length where work grows with its square: QR rotations and collections.
        max_k: neighbours of a query.
        max_results: neighbours of all queries of a request.
        max_vectors: in a collection.
        max_collections: on this server.
        max_jobs: waiting or running; finished ones are kept to the same number.
        job_numbers: requests with more numbers than this become jobs.
        body_timeout_s: until a request has arrived in full.
        shutdown_timeout_s: for requests under way when the server is told to stop.

    Raises:
        ConfigError: for a value outside its range, or an open address without a token.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = dataclasses.field(default=None, repr=False)
    folder: Path = Path("quantforge-data")
    device: str = "cpu"
    workers: int = 2
    max_pending: int = 128
    max_body_bytes: int = 256 * MiB
    max_inflight_bytes: int = 1024 * MiB
    max_json_bytes: int = 8 * MiB
    max_numbers: int = 1 << 28
    max_dim: int = 1 << 16
    max_dense_dim: int = 2048
    max_k: int = 1000
    max_results: int = 1 << 18
    max_vectors: int = 50_000_000
    max_collections: int = 1000
    max_jobs: int = 32
    job_numbers: int = 1 << 23
    body_timeout_s: int = 60
    shutdown_timeout_s: int = 30

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        check_int("port", self.port, 0, 65535)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "port" and field.type == "int":
                check_int(field.name, value, 1, 2**62)
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise ConfigError("a token is printable ASCII; make one with `openssl rand -hex 32`")
        if self.token is not None and len(self.token.strip()) < 8:
            raise ConfigError("a token has at least 8 characters: `openssl rand -hex 32` makes one")
        if self.token is None and not is_loopback(self.host):
            raise ConfigError(
                f"{self.host} can be reached by others, and there is no token; set "
                f"{TOKEN_VARIABLE} or give a file with one, or listen on 127.0.0.1"
            )


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is this machine's own."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_token(path: Path | None, environment: dict[str, str]) -> str | None:
    """Return the token of a file, or of the environment, or None.

    Raises:
        ConfigError: if the file is empty.
        OSError: if it cannot be read.
    """
    if path is None:
        return environment.get(TOKEN_VARIABLE) or None
    token = path.read_text("utf-8").strip()
    if not token:
        raise ConfigError(f"{path} is empty; it should hold the token")
    return token
