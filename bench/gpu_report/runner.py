"""Runs stages of commands one after the other, each under its time limit, with everything they print in one log.

Knows nothing of GPUs, and needs nothing but Python: what it watches over may hang, crash, or not be installed.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

GRACE = 6.0  # seconds before its limit at which a command is asked to stop, so that it can write what it has
LEAST = 0.1  # seconds with which a command is begun
TAIL_LINES = 40  # kept of a failed command's output
READ_BYTES = 400_000  # of a command's output that digests see, from its end

Status = Literal["ok", "failed", "skipped"]


class Skip(Exception):
    """A stage that cannot run here; the message says why."""


@dataclass(frozen=True)
class Command:
    """One program to run."""

    words: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)  # beside the runner's own
    limit: float | None = None  # seconds; none: the stage's


@dataclass(frozen=True)
class Run:
    """How a command ended."""

    command: Command
    code: int | None  # exit code; None: stopped at its limit
    seconds: float
    output: str  # the end of what it printed

    @property
    def problem(self) -> str:
        """What went wrong, or nothing."""
        words = self.command.words
        program = " ".join([Path(words[0]).name, *words[1:4]] if "-m" in words[1:2] else [Path(words[0]).name])
        if self.code is None and not self.seconds:
            return f"no time was left for {program}"
        if self.code is None:
            return f"{program} was stopped after {self.seconds:.0f} s"
        return f"{program} ended with exit code {self.code}" if self.code else ""


@dataclass(frozen=True)
class Digest:
    """What a stage's outputs say."""

    lines: Sequence[str] = ()  # for the summary
    figures: Mapping[str, Any] = field(default_factory=dict)  # for the report, ready for JSON
    problem: str = ""  # makes the stage fail, whatever the exit codes


@dataclass(frozen=True)
class Stage:
    """Commands that belong together, and how to read what they leave."""

    name: str
    seconds: float  # its time limit; what earlier stages leave of theirs comes on top
    commands: Callable[[], Sequence[Command]]  # raises Skip where they cannot run
    digest: Callable[[Sequence[Run]], Digest]  # runs whether or not the commands succeeded


@dataclass(frozen=True)
class Outcome:
    """A stage that is over."""

    name: str
    status: Status
    seconds: float
    reason: str = ""  # why it failed or was skipped
    lines: Sequence[str] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    tail: Sequence[str] = ()  # the last lines of the output of the commands that failed


def run_command(command: Command, limit: float, log: Path) -> Run:
    """Run one command with its output at the end of `log`; interrupt it shortly before its limit, kill it at that.

    The command leads a process group of its own, so that killing reaches whatever it started. Interrupted is the
    leader alone, as by Ctrl-C in a script: pytest then reports the tests so far, and a benchmark has written its sets.
    """
    begin = time.monotonic()
    with log.open("ab") as file:
        file.write(f"\n$ {shlex.join(command.words)}\n".encode())
        file.flush()
        start = file.tell()
        try:
            process = subprocess.Popen(
                command.words,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **command.environment},
                start_new_session=True,
            )
        except OSError as error:
            file.write(f"{error}\n".encode())
            return Run(command, 127, time.monotonic() - begin, str(error))
        try:
            code = _wait(process, limit)
        finally:
            _kill_group(process)
    seconds = time.monotonic() - begin
    with log.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(start, end - READ_BYTES))
        output = file.read().decode(errors="replace")
    return Run(command, code, seconds, output)


def _wait(process: subprocess.Popen[bytes], limit: float) -> int | None:
    """Return the exit code, or None if the process had to be stopped."""
    grace = min(GRACE, limit / 4)
    try:
        return process.wait(max(0.0, limit - grace))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):  # the group is killed next
        process.wait(grace)
    return None


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the process and of everything it started."""
    with suppress(ProcessLookupError, PermissionError):  # all gone; macOS says the latter of zombies
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_stage(stage: Stage, limit: float, log: Path) -> Outcome:
    """Run a stage's commands, all of them even if one fails, and digest what they left. Raises nothing of its own."""
    begin = time.monotonic()

    def outcome(status: Status, **more: Any) -> Outcome:
        return Outcome(stage.name, status, time.monotonic() - begin, **more)

    with log.open("a") as file:
        file.write(f"\n{'=' * 40} {stage.name}\n")
    try:
        commands = stage.commands()
    except Skip as reason:
        return outcome("skipped", reason=str(reason))
    runs = []
    for command in commands:
        left = min(limit - (time.monotonic() - begin), command.limit or limit)
        runs.append(run_command(command, left, log) if left >= LEAST else Run(command, None, 0.0, ""))
    try:
        digest = stage.digest(runs)
    except Exception as error:  # a stage's strange output must not cost the other stages
        failed = any(run.problem for run in runs)  # then there need not be any output
        digest = Digest(problem="" if failed else f"its output could not be read: {type(error).__name__}: {error}")
    problems = [problem for problem in (*(run.problem for run in runs), digest.problem) if problem]
    tail = [line for run in runs if run.problem for line in run.output.splitlines()[-TAIL_LINES:]]
    return outcome(
        "failed" if problems else "ok",
        reason="; ".join(problems),
        lines=digest.lines,
        figures=digest.figures,
        tail=tail,
    )


def run_stages(stages: Sequence[Stage], log: Path, after: Callable[[Outcome], object]) -> list[Outcome]:
    """Run the stages in turn and call `after` with each one's outcome.

    A stage may last until the sum of its own limit and those before it: no longer in all than the sum of all limits,
    and whoever is quick leaves time to those who follow.
    """
    outcomes = []
    deadline = time.monotonic()
    for stage in stages:
        deadline += stage.seconds
        outcomes.append(run_stage(stage, deadline - time.monotonic(), log))
        after(outcomes[-1])
    return outcomes
