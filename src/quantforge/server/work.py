"""Where work is done: threads, a scratch folder, and jobs for what takes long."""

from __future__ import annotations

import logging
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from quantforge.server.errors import ApiError, api_error, busy
from quantforge.server.schemas import JobInfo

LOG = logging.getLogger("quantforge.server")
State = Literal["waiting", "running", "done", "failed", "cancelled"]
PIECE = 1 << 20


class Cancelled(Exception):
    """Raised inside of a job that nobody wants any more."""


class Progress:
    """How far an operation is; calling it says so, and ends a cancelled one."""

    def __init__(self) -> None:
        self.fraction = 0.0
        self._cancelled = threading.Event()

    def __call__(self, fraction: float) -> None:
        """Note how far it is.

        Raises:
            Cancelled: after `cancel`.
        """
        if self._cancelled.is_set():
            raise Cancelled
        self.fraction = min(max(fraction, self.fraction), 1.0)

    def cancel(self) -> None:
        """End the operation the next time it says how far it is."""
        self._cancelled.set()


@dataclass(frozen=True)
class Download:
    """A result that is a file."""

    path: Path
    media_type: str

    def stream(self) -> tuple[int, Iterator[bytes]]:
        """Return its size and its bytes; the name may be removed meanwhile."""
        file = open(self.path, "rb")  # noqa: SIM115  closed when it has been read

        def pieces() -> Iterator[bytes]:
            with file:
                while piece := file.read(PIECE):
                    yield piece

        return self.path.stat().st_size, pieces()


Answer = Download | dict[str, Any]
Operation = Callable[[Progress], Answer]


@dataclass
class Job:
    """An operation that runs on its own, in a folder of its own."""

    kind: str
    operation: Operation
    folder: Path
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    state: State = "waiting"
    created: datetime = field(default_factory=lambda: datetime.now(UTC))
    finished: datetime | None = None
    progress: Progress = field(default_factory=Progress)
    answer: Answer | None = None
    error: ApiError | None = None

    @property
    def is_open(self) -> bool:
        """Whether it waits or runs."""
        return self.state in ("waiting", "running")

    def info(self) -> JobInfo:
        """Return what a client may know."""
        error = None
        if self.error is not None:
            error = {"type": self.error.type, "message": self.error.detail}
        return JobInfo(
            id=self.id,
            kind=self.kind,
            state=self.state,
            progress=1.0 if self.state == "done" else self.progress.fraction,
            created=self.created.isoformat(),
            finished=None if self.finished is None else self.finished.isoformat(),
            error=error,
            result=f"/v1/jobs/{self.id}/result" if self.state == "done" else None,
        )


class Jobs:
    """Jobs of a server: one runs, the others wait, and the last finished ones are remembered."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="quantforge-job")

    def start(self, kind: str, operation: Operation, folder: Path) -> Job:
        """Take on a job; its folder is removed with it.

        Raises:
            ApiError: if too many wait.
        """
        with self._lock:
            waiting = sum(job.is_open for job in self._jobs.values())
            if waiting >= self._limit:
                raise busy(f"{waiting} jobs wait or run")
            closed = [job for job in self._jobs.values() if not job.is_open]
            for job in closed[: len(closed) - self._limit + 1]:
                self._forget(job)
            job = Job(kind, operation, folder)
            self._jobs[job.id] = job
        self._pool.submit(self._run, job)
        return job

    def all(self) -> list[Job]:
        """Return the jobs, oldest first."""
        with self._lock:
            return list(self._jobs.values())

    def get(self, id: str) -> Job:
        """Return a job.

        Raises:
            ApiError: if there is none of this id.
        """
        with self._lock:
            if id not in self._jobs:
                raise ApiError(404, "not_found", f"there is no job {id!r}")
            return self._jobs[id]

    def cancel(self, id: str) -> Job:
        """End a job, or forget one that has ended."""
        job = self.get(id)
        with self._lock:
            job.progress.cancel()
            if job.state == "waiting":
                job.state, job.finished = "cancelled", datetime.now(UTC)
            elif not job.is_open:
                self._forget(job)
        return job

    def close(self) -> None:
        """Cancel all jobs and wait until none runs."""
        for job in self.all():
            job.progress.cancel()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _forget(self, job: Job) -> None:
        self._jobs.pop(job.id, None)
        shutil.rmtree(job.folder, ignore_errors=True)

    def _run(self, job: Job) -> None:
        with self._lock:
            if job.state != "waiting":
                return
            job.state = "running"
        state: State = "failed"
        try:
            job.answer = job.operation(job.progress)
            state = "done"
        except Cancelled:
            state = "cancelled"
        except Exception as error:  # a thread has no caller: the job carries what went wrong
            job.error = api_error(error)
            if job.error.status_code >= 500:
                LOG.exception("job failed", extra={"data": {"job": job.id, "kind": job.kind}})
        finally:
            with self._lock:
                job.state, job.finished = state, datetime.now(UTC)
                job.operation = _nothing
        LOG.info("job", extra={"data": {"job": job.id, "kind": job.kind, "state": state}})


def _nothing(_: Progress) -> Answer:
    """Take the place of an operation that has run, so that its input can go."""
    return {}


class Scratch:
    """A folder for bodies and results; emptied when a server starts and when it ends."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def folder(self) -> Path:
        """Make a folder for one request."""
        return Path(tempfile.mkdtemp(dir=self.path))

    def close(self) -> None:
        """Remove it."""
        shutil.rmtree(self.path, ignore_errors=True)
