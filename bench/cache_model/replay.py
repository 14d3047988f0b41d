"""A cache model: replays a plan's schedule on a GPU's blocks and second-level cache, and counts DRAM's bytes.

Blocks draw tickets in the schedule's order and each does its tasks at a speed of its own: a task lasts as long as the
bytes it moves, plus a fixed overhead, give or take a quarter. Accesses interleave in *pieces* of a few KB by a queue of
events. An UPDATE waits until its tensor's REDUCEs are done and the last of them has published the abs-sum.

What it leaves out: the cache is empty at first and fully associative; a block is no faster for finding something in the
cache or for others' waiting. The second makes the share of time spent waiting an upper bound: as long as those at work
have enough in flight to fill DRAM's bandwidth, somebody's waiting costs nothing.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf

from bench.cache_model.cache import EVICT_FIRST, EVICT_LAST, NORMAL, Cache
from bench.workloads.schedule import Schedule, Task, Tensor

FINEST_PIECE = 4096  # bytes of gradient
# 128 threads with two loads of 16 bytes each: what a block has in flight of each tensor, however coarse the pieces are.
IN_FLIGHT = 4096  # bytes of one tensor
# Drawing a ticket, looking up the task and waiting for its first loads takes about 1 microsecond, in which all blocks
# together would move this much at the H200's 4.8 TB/s. So does publishing an abs-sum, besides reading the partial ones.
OVERHEAD = 4_800_000  # bytes
PARTIAL = 8  # bytes of a chunk's partial abs-sum; the block that finishes a segment last reads those of all its chunks
SPREAD = 0.25  # by which tasks are faster or slower than their bytes say


@dataclass(frozen=True)
class Machine:
    """What the schedule runs on. The defaults are an H200 with four blocks on each of 132 multiprocessors."""

    cache_bytes: float = 52_428_800
    blocks: int = 528
    on_chip_bytes: int = 0  # shared memory of all blocks together, in which REDUCE keeps the end of large tensors
    on_chip_above: int = 0  # a tensor is large if it has more bytes of gradient than this
    hints: bool = True  # False: all lines have one priority, so that the cache keeps what was used last
    prefetched_bytes: int = 0  # of parameters and state, by all blocks together, while their updates wait


@dataclass(frozen=True)
class Traffic:
    """What a replay counted."""

    elements: int
    ideal_bytes: int  # every tensor read or written once
    read_bytes: int  # by DRAM
    written_bytes: int
    second_reads: int  # bytes of gradient that an UPDATE needs after a REDUCE has read them
    cache_hits: int  # those of them that the cache still held
    on_chip_hits: int  # and those that never left the multiprocessor
    waited: float  # share of the blocks' time spent waiting for an abs-sum
    idle: float  # share of it after the last ticket was drawn

    @property
    def read(self) -> float:
        """Bytes that DRAM reads for an element."""
        return self.read_bytes / self.elements

    @property
    def written(self) -> float:
        """Bytes that DRAM writes for an element."""
        return self.written_bytes / self.elements

    @property
    def total(self) -> float:
        """Bytes that DRAM moves for an element."""
        return self.read + self.written

    @property
    def ceiling(self) -> float:
        """The most of DRAM's bandwidth that a step can reach, counted on the ideal's bytes."""
        return self.ideal_bytes / (self.read_bytes + self.written_bytes)

    @property
    def reach(self) -> float:
        """The ceiling if nothing else uses the bandwidth that waiting blocks leave."""
        return self.ceiling * (1.0 - self.waited)

    @property
    def hit_share(self) -> float:
        """The share of second reads that do not go to DRAM; 1 where there are none."""
        return (self.cache_hits + self.on_chip_hits) / self.second_reads if self.second_reads else 1.0


class Replay:
    """One pass through a schedule; see `replay`."""

    def __init__(
        self, schedule: Schedule, reads: float, writes: float, machine: Machine, piece_bytes: int, in_place: bool
    ) -> None:
        schedule.check()
        self.schedule, self.reads, self.writes, self.machine = schedule, reads, writes, machine
        self.piece_bytes, self.in_place = piece_bytes, in_place
        self.moved = 1 + reads + writes + in_place  # by an UPDATE, for each byte of gradient
        self.cache = Cache(machine.cache_bytes)
        self.tickets = iter(schedule.tasks)
        self.reduces = schedule.reduces
        self.unreduced = list(self.reduces)  # those that are not done
        self.published = [count == 0 for count in self.reduces]
        largest = max((itemsize for _, itemsize, _ in schedule.tensors), default=1)
        self.pieces = -(-schedule.chunk_elements * largest // piece_bytes)  # that a chunk has at most
        self.on_chip: dict[tuple[int, int], int] = {}  # bytes kept of a chunk
        self.on_chip_used = 0
        self.second_reads = self.cache_hits = self.on_chip_hits = 0
        # Events, as (time, block): a block goes on. The unit of time is what one block takes to move a byte.
        self.overhead = OVERHEAD // machine.blocks
        self.events: list[tuple[float, int]] = [(0.0, block) for block in range(machine.blocks)]
        self.waiting: dict[int, list[int]] = {}  # tensor: blocks
        self.now = self.waited = 0.0
        self.random = random.Random(0)

    def run(self) -> Traffic:
        """Do all tasks."""
        blocks = [self.block(number) for number in range(self.machine.blocks)]
        finished: list[float] = []
        while self.events:
            self.now, number = heapq.heappop(self.events)
            lasts = next(blocks[number], None)
            if lasts is None:
                finished.append(self.now)
            elif lasts < inf:
                heapq.heappush(self.events, (self.now + lasts, number))
        self.cache.flush()
        time = max(1.0, self.now) * self.machine.blocks
        return Traffic(
            elements=self.schedule.elements,
            ideal_bytes=round(self.schedule.gradient_bytes * self.moved),
            read_bytes=round(self.cache.read_bytes),
            written_bytes=round(self.cache.written_bytes),
            second_reads=self.second_reads,
            cache_hits=self.cache_hits,
            on_chip_hits=self.on_chip_hits,
            waited=self.waited / time,
            idle=sum(self.now - end for end in finished) / time,
        )

    def block(self, number: int) -> Iterator[float]:
        """One block: yields how long what it just began lasts; inf for until it is woken."""
        for kind, tensor, chunk in self.tickets:
            size = self.schedule.elements_of(tensor, chunk) * self.schedule.tensors[tensor][1]
            pace = 1.0 + SPREAD * (2.0 * self.random.random() - 1.0)
            if kind == "reduce":
                yield from self.reduce(tensor, chunk, size, pace)
            else:
                yield from self.update(tensor, chunk, size, pace, number)

    def reduce(self, tensor: int, chunk: int, size: int, pace: float) -> Iterator[float]:
        """Read a chunk's gradient, asking the cache to keep it unless it stays on chip."""
        keep = self.keep_on_chip(tensor, chunk, size)
        priority = NORMAL if not self.machine.hints else EVICT_FIRST if keep else EVICT_LAST
        overhead = self.overhead
        for line, piece in self.lines(tensor, chunk, size):
            self.cache.read(line, piece, priority)
            yield pace * (overhead + piece)
            overhead = 0
        self.unreduced[tensor] -= 1
        if self.unreduced[tensor] == 0:
            yield self.overhead + PARTIAL * self.reduces[tensor]
            self.published[tensor] = True
            for block in self.waiting.pop(tensor, ()):
                heapq.heappush(self.events, (self.now, block))

    def update(self, tensor: int, chunk: int, size: int, pace: float, number: int) -> Iterator[float]:
        """Update a chunk, as WHOLE does too: there the gradient is read once, as if it were not regularized."""
        cache, reads, overhead = self.cache, self.reads, self.overhead
        # What is prefetched is not evicted before it is used: lines that were written go first.
        ahead = min(size, int(self.machine.prefetched_bytes / (self.machine.blocks * reads))) if reads else 0
        cache.hold(reads * ahead)
        if not self.published[tensor]:
            # The first loads of parameters and state, which the overhead stands for, are issued before the wait.
            yield pace * overhead
            overhead = 0
            if not self.published[tensor]:
                since = self.now
                self.waiting.setdefault(tensor, []).append(number)
                yield inf
                self.waited += self.now - since
        kept = self.on_chip.pop((tensor, chunk), 0)
        priority = EVICT_FIRST if self.machine.hints else NORMAL
        if self.reduces[tensor]:
            self.second_reads += size
            self.on_chip_hits += kept
        for line, piece in self.lines(tensor, chunk, size):
            if not kept and cache.read(line, piece, priority):
                self.cache_hits += piece
            cache.read_bytes += reads * piece
            prefetched = min(piece, ahead)
            ahead -= prefetched
            if prefetched:
                # However coarse the piece, what was prefetched is used first, and then no longer held.
                yield pace * (overhead + self.moved * prefetched)
                overhead = 0
                cache.release(reads * prefetched)
            if rest := piece - prefetched:
                held = reads * min(rest, IN_FLIGHT)
                cache.hold(held)
                yield pace * (overhead + self.moved * rest)
                overhead = 0
                cache.release(held)
            if self.writes:
                cache.write(line + 1, self.writes * piece, priority)
            if self.in_place:
                cache.write(line, piece, priority)
        self.on_chip_used -= kept

    def lines(self, tensor: int, chunk: int, size: int) -> Iterator[tuple[int, int]]:
        """Yield key and bytes of a chunk's pieces of gradient; the next key is that of what is written beside it."""
        line = 2 * self.schedule.chunk_number(tensor, chunk) * self.pieces
        for begin in range(0, size, self.piece_bytes):
            yield line, min(self.piece_bytes, size - begin)
            line += 2

    def keep_on_chip(self, tensor: int, chunk: int, size: int) -> bool:
        """Keep a chunk's gradient on chip if it is of the end of a large tensor and there is room."""
        elements, itemsize, _ = self.schedule.tensors[tensor]
        room = self.machine.on_chip_bytes
        from_end = (elements - chunk * self.schedule.chunk_elements) * itemsize
        if elements * itemsize <= self.machine.on_chip_above or max(from_end, self.on_chip_used + size) > room:
            return False
        self.on_chip[tensor, chunk] = size
        self.on_chip_used += size
        return True


def piece_bytes(tasks: Sequence[Task], chunk_bytes: int, most_pieces: int) -> int:
    """Return the finest piece with which a schedule has about `most_pieces`: 4 KB, or up to a chunk if it is large.

    So the time of a replay stays bounded. The larger the model, the less a coarse piece matters: it shifts an access by
    less than a chunk's duration, and a cache holds many chunks.
    """
    pieces = max(1, min(-(-chunk_bytes // FINEST_PIECE), most_pieces // max(1, len(tasks))))
    return -(-chunk_bytes // pieces)


def replay(
    tensors: Sequence[Tensor],
    tasks: Sequence[Task],
    chunk_elements: int,
    reads: float,
    writes: float,
    machine: Machine,
    most_pieces: int = 400_000,
    in_place: bool = False,
) -> Traffic:
    """Replay a schedule.

    Args:
        tensors: What the schedule was made for.
        tasks: The schedule, in the order of the tickets.
        chunk_elements: Elements of a chunk.
        reads: Bytes besides the gradient that an UPDATE reads, for each byte of gradient: where all have one type,
            AdamW 3, Adan 5, and 0 for what changes gradients alone.
        writes: Those that it writes.
        machine: What it runs on.
        most_pieces: About how many accesses are replayed one by one; a larger model gets coarser ones.
        in_place: Whether an UPDATE also writes the gradient.
    """
    chunk_bytes = chunk_elements * max((itemsize for _, itemsize, _ in tensors), default=1)
    piece = piece_bytes(tasks, chunk_bytes, most_pieces)
    return Replay(Schedule(tensors, tasks, chunk_elements), reads, writes, machine, piece, in_place).run()
