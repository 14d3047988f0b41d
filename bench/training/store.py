"""The file in which finished runs lie, a line each, so that an interrupted comparison goes on where it was."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.training.run import Result


class UnusableStoreError(ValueError):
    """The file holds runs of another setting, is damaged, or is another process's."""


class Store:
    """Finished runs, by key. A line that was cut off when a process ended is dropped, its run is run again.

    Args:
        path: the file; made if missing, with its folder.
        setting: what all its runs have in common, as what JSON has.

    Raises:
        UnusableStoreError: where the file's runs have something else in common, a line before its last is damaged, or
            another process is adding to it.
    """

    def __init__(self, path: Path, setting: Mapping[str, Any]) -> None:
        self.results: dict[str, Result] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed, however the process ends
        except BlockingIOError as error:
            raise UnusableStoreError(f"{path} is in use by another process: wait, or choose another --tag") from error
        self._file.seek(0)
        whole = self._file.read()
        complete = whole[: whole.rfind(b"\n") + 1]
        lines = [_parsed(path, number, line) for number, line in enumerate(complete.splitlines(), 1)]
        wanted = json.loads(json.dumps(setting))
        if lines and lines[0] != wanted:
            there = lines[0] if isinstance(lines[0], dict) else {}
            differing = [name for name in {**wanted, **there} if there.get(name) != wanted.get(name)]
            self._file.close()
            raise UnusableStoreError(
                f"{path} holds runs with other settings ({', '.join(differing)}): remove it, or choose another --tag"
            )
        self._file.truncate(len(complete))
        if not lines:
            self._write(wanted)
        for line in lines[1:]:
            result = Result.of_record(line)
            self.results[result.run.key] = result

    def add(self, result: Result) -> None:
        """Keep a result, on the disk before this returns."""
        self._write(result.record())
        self.results[result.run.key] = result

    def _write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _parsed(path: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UnusableStoreError(
            f"{path}, line {number} is damaged ({error}): remove that line, or choose another --tag"
        ) from error
