"""The log, the manifest and the lock below an index store: what they refuse, what they lose."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from quantforge.errors import FormatError, InputError
from quantforge.vectordb.lock import WriterLock
from quantforge.vectordb.log import FILE_HEADER, RECORD_HEADER, Log
from quantforge.vectordb.manifest import Checksum, Manifest, checksum, leftovers

PAYLOADS = [b"first", b"", b"third" * 9]
MANIFEST = Manifest(2, "base-00000002.safetensors", {"base-00000002.safetensors": Checksum(3, 9)},
                    "log-00000002.qf")  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "log-00000001.qf"
    Log.create(path)
    with Log(path, writable=True) as log:
        for payload in PAYLOADS:
            log.append(payload)
    return path


def read(path: Path) -> list[bytes]:
    with Log(path, writable=False) as log:
        return list(log.records())


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """Let writes beyond this size fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_records_come_back_in_order(path: Path) -> None:
    assert read(path) == PAYLOADS
    with Log(path, writable=True) as log:
        assert list(log.records()) == PAYLOADS
        log.append(b"fourth")
        assert log.nbytes == path.stat().st_size
    assert read(path) == [*PAYLOADS, b"fourth"]


def test_a_reader_goes_on_where_it_was(path: Path) -> None:
    with Log(path, writable=False) as reader, Log(path, writable=True) as writer:
        assert list(reader.records()) == PAYLOADS
        assert list(reader.records()) == []
        assert list(writer.records()) == PAYLOADS
        writer.append(b"new")
        assert reader.is_continued()
        assert list(reader.records()) == [b"new"]


def test_a_write_cut_short_is_removed_and_said(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = path.read_bytes()
    last = len(whole) - RECORD_HEADER.size - len(PAYLOADS[-1])
    for end in range(last, len(whole)):
        path.write_bytes(whole[:end])
        assert read(path) == PAYLOADS[:2]
        caplog.clear()
        with caplog.at_level(logging.WARNING), Log(path, writable=True) as log:
            assert list(log.records()) == PAYLOADS[:2]
            log.cut()
            log.append(b"other")
        said = f"cut {end - last} bytes at byte {last}"
        assert said in caplog.text if end > last else not caplog.text
        assert read(path) == [*PAYLOADS[:2], b"other"]


def test_every_flipped_byte_is_found(path: Path) -> None:
    whole = path.read_bytes()
    offsets = [FILE_HEADER.size]
    for payload in PAYLOADS:
        offsets.append(offsets[-1] + RECORD_HEADER.size + len(payload))
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x40]) + whole[i + 1 :])
        record = sum(i >= offset for offset in offsets) - 1
        if record == 2:  # the last one: as if it had been cut short
            assert read(path) == PAYLOADS[:2], i
        elif record >= 0:
            with pytest.raises(FormatError, match=f"{path}: the record at byte {offsets[record]} "):
                read(path)
        elif i < 20:
            with pytest.raises(FormatError, match=str(path)):
                read(path)


def test_records_of_another_log_do_not_count(path: Path) -> None:
    other = path.with_name("log-00000002.qf")
    Log.create(other)
    with Log(other, writable=True) as log:
        log.append(b"foreign")
    path.write_bytes(path.read_bytes() + other.read_bytes()[FILE_HEADER.size :])
    assert read(path) == PAYLOADS


def test_a_full_disk_changes_nothing(path: Path) -> None:
    size = path.stat().st_size
    with Log(path, writable=True) as log:
        assert list(log.records()) == PAYLOADS
        with (
            files_of_at_most(size + 100),
            pytest.raises(OSError, match=r"bytes could not be written.*log-00000001"),
        ):
            log.append(bytes(1000))
        assert path.stat().st_size == size
        log.append(b"small")
    assert read(path) == [*PAYLOADS, b"small"]


def test_what_a_disk_refused_after_a_reader_saw_it_is_noticed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Log(path, writable=True) as log, Log(path, writable=False) as reader:
        assert list(log.records()) == list(reader.records())
        fsync = os.fsync

        def refuse(file: int) -> None:
            assert list(reader.records()) == [b"seen too early"]
            monkeypatch.setattr(os, "fsync", fsync)
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match="Input/output error"):
            log.append(b"seen too early")
        assert not reader.is_continued()
        log.append(b"as long, another")
        assert not reader.is_continued()
    assert read(path) == [*PAYLOADS, b"as long, another"]


def test_a_log_that_cannot_be_cut_back_is_not_written_to_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(5, "Input/output error")

    with Log(path, writable=True) as log:
        assert list(log.records()) == PAYLOADS
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse)
            with pytest.raises(OSError, match="Input/output error"):
                log.append(b"x")
        with pytest.raises(InputError, match="close the store and open it"):
            log.append(b"x")


def test_files_that_are_no_log(path: Path) -> None:
    data = path.read_bytes()
    for content, message in (
        (b"", "is not a log, or cut"),
        (data[:31], "is not a log, or cut"),
        (b"x" * 64, "is not a log"),
    ):
        path.write_bytes(content)
        with pytest.raises(FormatError, match=message):
            read(path)
    path.unlink()
    with pytest.raises(FormatError, match=r"log-00000001\.qf is missing"):
        read(path)


def test_a_manifest_comes_back(tmp_path: Path) -> None:
    MANIFEST.write(tmp_path)
    assert Manifest.read(tmp_path) == MANIFEST
    (tmp_path / MANIFEST.base).write_bytes(b"abc")
    MANIFEST.check_sizes(tmp_path)
    with pytest.raises(FormatError, match="checksum is 352441c2, expected 00000009"):
        MANIFEST.check_contents(tmp_path)
    assert checksum(tmp_path / MANIFEST.base) == Checksum(3, 0x352441C2)
    (tmp_path / MANIFEST.base).write_bytes(b"ab")
    with pytest.raises(FormatError, match="must have 3 bytes; got 2"):
        MANIFEST.check_sizes(tmp_path)


def _edited(folder: Path, edit: Callable[[dict], object]) -> str:
    content = json.loads((folder / "manifest.json").read_text())
    edit(content)
    return json.dumps(content)


def test_manifests_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"manifest\.json is missing"):
        Manifest.read(tmp_path)
    MANIFEST.write(tmp_path)
    for text, message in (
        ("{", "is damaged"),
        ("[]", "is not the manifest"),
        (_edited(tmp_path, lambda m: m.update(quantforge_store=2)), "is of version 2"),
        (_edited(tmp_path, lambda m: m.update(generation=7)), "checksum"),
        (_edited(tmp_path, lambda m: m["files"].clear()), "checksum"),
    ):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(FormatError, match=message):
            Manifest.read(tmp_path)
    Manifest(2, "../x", {}, "log-00000002.qf").write(tmp_path)
    with pytest.raises(FormatError, match="names the file"):
        Manifest.read(tmp_path)


def test_leftovers_are_ours_alone(tmp_path: Path) -> None:
    keep = [MANIFEST.base, MANIFEST.log, "manifest.json", "lock", "notes.txt", "log-20261124"]
    drop = [
        "log-00000001.qf",
        "base-00000003.safetensors",
        ".log-00000003.qf.1234abcd.tmp",
        ".manifest.json.1234abcd.tmp",
        "base-00000003-1a2b3c4d-00001-of-00002.safetensors",
        "base-00000003.safetensors.index.json",
    ]
    for name in keep + drop:
        (tmp_path / name).touch()
    assert sorted(path.name for path in leftovers(tmp_path, MANIFEST)) == sorted(drop)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    lock = WriterLock(tmp_path / "lock")
    with pytest.raises(InputError, match=f"open for writing in process {os.getpid()}"):
        WriterLock(tmp_path / "lock")
    lock.release()
    WriterLock(tmp_path / "lock").release()


@contextmanager
def forked(run: Callable[[], bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield the process id of a fork and what `run` returned in it; it lives until the end."""
    ready, hold = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(ready[1], run())
            os.read(hold[0], 1)
        finally:
            os._exit(0)
    try:
        yield child, os.read(ready[0], 1)
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for end in (*ready, *hold):
            os.close(end)


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    kept = []

    def take() -> bytes:
        kept.append(WriterLock(tmp_path / "lock"))
        return b"x"

    with (
        forked(take) as (child, _),
        pytest.raises(InputError, match=f"open for writing in process {child}"),
    ):
        WriterLock(tmp_path / "lock")
    WriterLock(tmp_path / "lock").release()


def test_a_fork_does_not_hold_the_lock(tmp_path: Path) -> None:
    lock = WriterLock(tmp_path / "lock")
    with forked(lambda: b"0" if lock.is_held else b"1") as (_, said):
        assert said == b"1"
        lock.release()
        WriterLock(tmp_path / "lock").release()
