"""Two streams of one call: small work beside kernels that fill the GPU.

    current stream   fork ---- decode 1 -- decode 2 ------- join --
                      |            |           |             |
    second stream     +- rotate -- + attend 1 -+- attend 2 --+

The second stream has priority: its thread blocks take the places that become free, and those of
the current one the rest. Both ends are events, so a CUDA graph captures the call; and a call leaves
nothing running behind itself, so memory may be freed as if there were one stream.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch


@lru_cache(maxsize=64)
def _second(device: torch.device, current: int) -> torch.cuda.Stream:
    """Return the companion of a stream, its own: calls on two streams do not share memory."""
    return torch.cuda.Stream(device, priority=-1)


ENABLED = False
"""Whether there is a second stream at all: off until a GPU has shown what it gains."""


class Lanes:
    """The current stream of a device and, if `apart`, a second one; else one stream for all."""

    def __init__(self, device: torch.device, apart: bool) -> None:
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        self._done: list[torch.cuda.Event] = []
        if apart and ENABLED:
            current = torch.cuda.current_stream(device)
            self._streams = current, _second(device, current.cuda_stream)
            self.fork()

    def fork(self) -> None:
        """Let the second stream wait for all that was launched on the current one."""
        if self._streams is not None:
            current, second = self._streams
            second.wait_stream(current)

    def second(self) -> AbstractContextManager[object]:
        """Launch on the second stream inside of this context."""
        return nullcontext() if self._streams is None else torch.cuda.stream(self._streams[1])

    def mark(self) -> None:
        """Remember what the second stream has been given so far, as one more step."""
        if self._streams is not None:
            self._done.append(self._streams[1].record_event())

    def wait(self, step: int) -> None:
        """Let the current stream wait for a marked step, counted from 0; negative: for none."""
        if self._streams is not None and step >= 0:
            self._streams[0].wait_event(self._done[step])

    def join(self) -> None:
        """Let the current stream wait for the second."""
        if self._streams is not None:
            current, second = self._streams
            current.wait_stream(second)
