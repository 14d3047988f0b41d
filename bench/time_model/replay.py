"""The time model's events: blocks draw the tickets of a schedule, and every task takes as long as its code does.

A block has two actors, its first warp, which leads, and the other warps, which all do the same. An actor is a generator
that says what it waits for: a time, its block's other actor (a barrier), or a sum that another block publishes. The
order of what it does is that of csrc/cuda/block.h; what each part costs is in code.py, gpu.py and memory.py.

What it leaves out: conflicts of issue between blocks (a multiprocessor's slots are used to a tenth), clocks that fall
with power, that a full cache may evict what was asked for ahead, and whatever memory.py leaves out.
"""

from __future__ import annotations

import heapq
from collections.abc import Generator
from dataclasses import dataclass
from random import Random

from bench.cache_model.cache import EVICT_FIRST, EVICT_LAST, Cache
from bench.time_model.code import Code
from bench.time_model.gpu import Gpu
from bench.time_model.memory import Memory
from bench.workloads.schedule import Schedule

SEGMENT_CHUNKS = 64  # csrc/cuda/arguments.h
NORM = -1  # what is awaited for clipping, in place of a tensor
LOADS = 8  # of 16 bytes that a thread of a REDUCE has in flight
TASKS_A_LINE = 4  # of those 64 bytes that DRAM reads at once
LINE = 64  # bytes


class Barrier:
    """The barrier of a block's two actors."""

    def __init__(self) -> None:
        self.arrived: tuple[Actor, float] | None = None


@dataclass(frozen=True)
class Sum:
    """What an actor waits for: a tensor's abs-sum, or the norm."""

    of: int


Wish = float | Barrier | Sum
Actor = Generator[Wish, float, None]
Part = Generator[Wish, float, float]  # of an actor; returns the time at which it is done


@dataclass(frozen=True)
class Outcome:
    """One step, replayed. Times in ns."""

    ns: float
    elements: int
    ideal_bytes: int  # every tensor read or written once
    read_bytes: float  # by DRAM
    written_bytes: float
    second_reads: int  # chunks whose gradient an UPDATE needs after a REDUCE has read it
    cache_hits: int  # those of them that the cache still held
    waited: float  # share of the blocks' time spent waiting for sums

    @property
    def total(self) -> float:
        """Bytes that DRAM moves for an element."""
        return (self.read_bytes + self.written_bytes) / self.elements

    @property
    def hit_share(self) -> float:
        """The share of second reads that do not go to DRAM; 1 where there are none."""
        return self.cache_hits / self.second_reads if self.second_reads else 1.0

    def share_of_copy(self, gpu: Gpu, launch: bool = False) -> float:
        """Return the ideal's bytes over the time, with a launch or without, as a share of a copy's bandwidth."""
        return self.ideal_bytes / (self.ns + (gpu.launch_ns if launch else 0.0)) / gpu.copy


@dataclass(frozen=True)
class Chunk:
    """A task, with what is known of its chunk."""

    ticket: int
    kind: str
    tensor: int
    chunk: int
    elements: int


@dataclass
class Arrival:
    """A chunk's sum that was counted, and the time at which its block knows whether it was the last."""

    tensor: int
    known: float
    completes: bool  # a segment


class Replay:
    """One step of a schedule on a GPU."""

    def __init__(self, gpu: Gpu, code: Code, schedule: Schedule, seed: int = 0) -> None:
        schedule.check()
        self.gpu, self.code, self.schedule = gpu, code, schedule
        self.memory = Memory(gpu, seed)
        self.cache = Cache(gpu.l2_bytes * gpu.l2_share / gpu.l2_copies)
        self.random = Random(seed)
        self.events: list[tuple[float, int, Actor]] = []
        self.serial = 0
        self.blocks = min(gpu.multiprocessors * code.blocks, len(schedule.tasks))
        # Only where no task waits: else tickets must be handed out in order.
        self.given = code.first_ticket_given and not any(kind == "reduce" for kind, _, _ in schedule.tasks)
        self.next_ticket = self.blocks if self.given else 0
        self.tickets_free = self.finish_free = 0.0  # the two counters that all blocks share
        self.in_segment: dict[tuple[int, int], int] = {}  # tensor and segment: chunks that have arrived
        self.in_tensor: dict[int, int] = {}  # segments that have
        self.tensors_reduced = 0
        self.published: dict[int, float] = {}
        self.waiting: dict[int, list[tuple[Actor, float]]] = {}
        self.in_l2: dict[tuple[str, int], float] = {}  # lines of tables, and when they came
        self.in_l1: dict[tuple[int, str, int], float] = {}  # by multiprocessor
        self.fp64_free = [0.0] * gpu.multiprocessors
        self.finished: list[float] = []
        self.done: list[list[int]] = []  # by block: its tickets in the order in which it did them
        self.second_reads = self.cache_hits = 0
        self.waited = 0.0

    def run(self) -> Outcome:
        """Do all tasks."""
        for number in range(self.blocks):
            block = Block(self, number)
            self.done.append(block.done)
            start = self.gpu.start_ns * (0.3 + 0.7 * number / self.blocks) + 20 * self.random.random()
            for leads in (True, False):
                actor = block.run(leads)
                next(actor)  # to its first wish, for the time at which it starts
                self.at(start, actor)
        while self.events:
            now, _, actor = heapq.heappop(self.events)
            self.resume(actor, now)
        # The next step would find DRAM busy with what this one has left.
        end = max(*self.finished, self.memory.drained)
        if self.code.counted_last:
            end += self.gpu.l2_ns * 2 * -(-len(self.schedule.tensors) // self.code.threads)
        return Outcome(
            ns=end,
            elements=self.schedule.elements,
            ideal_bytes=self.schedule.gradient_bytes * (1 + 2 * self.code.streams),
            read_bytes=self.memory.read_bytes,
            written_bytes=self.memory.written_bytes,
            second_reads=self.second_reads,
            cache_hits=self.cache_hits,
            waited=self.waited / (end * self.blocks),
        )

    def at(self, time: float, actor: Actor) -> None:
        """Let an actor go on at this time."""
        self.serial += 1
        heapq.heappush(self.events, (time, self.serial, actor))

    def resume(self, actor: Actor, now: float) -> None:
        """Let an actor go on until its next wish, and note that."""
        try:
            wish = actor.send(now)
        except StopIteration:
            return
        if isinstance(wish, Barrier):
            if wish.arrived is None:
                wish.arrived = actor, now
            else:
                other, since = wish.arrived
                wish.arrived = None
                time = max(now, since) + self.gpu.cycles(30)
                self.at(time, other)
                self.at(time, actor)
        elif isinstance(wish, Sum):
            if wish.of in self.published:
                self.at(max(now, self.published[wish.of]), actor)
            else:
                self.waiting.setdefault(wish.of, []).append((actor, now))
        else:
            self.at(wish, actor)

    # What blocks share.

    def draw(self, now: float) -> tuple[float, int]:
        """Draw a ticket. Returns when it is there, and its number."""
        half = self.gpu.home_trip / 2
        self.tickets_free = max(self.tickets_free, now + half) + self.gpu.atomic_gap_ns
        self.next_ticket += 1
        return self.tickets_free + half, self.next_ticket - 1

    def line(self, table: str, index: int, now: float) -> float:
        """Read a table's line: from DRAM the first time, then from the second-level cache. Returns when it has come."""
        came = self.in_l2.get((table, index))
        if came is None:
            came = self.in_l2[table, index] = self.memory.read(now, LINE)
        return max(came, now + self.gpu.l2_trip)

    def row(self, multiprocessor: int, tensor: int, now: float) -> float:
        """Read a row, from the first-level cache where it stays. Returns when it has come."""
        if not self.code.tables_in_l1:
            return self.line("row", tensor, now)
        key = multiprocessor, "row", tensor
        came = self.in_l1.get(key)
        if came is None:
            came = self.in_l1[key] = self.line("row", tensor, now)
            return came
        return max(came, now + self.gpu.cycles(self.gpu.l1_cycles))

    def task(self, ticket: int, now: float) -> float:
        """Read a ticket's task. Returns when it has come."""
        if ticket >= len(self.schedule.tasks):
            return now
        if self.code.task_ahead and ticket >= self.blocks:
            return now + self.gpu.l2_trip
        return self.line("task", ticket // TASKS_A_LINE, now)

    def fp64(self, multiprocessor: int, now: float, operations: float, converts: float) -> float:
        """Queue instructions at a multiprocessor's float64 units. Returns when they are through."""
        gpu = self.gpu
        takes = gpu.cycles(operations * 32 / gpu.fp64_lanes + converts * 32 / gpu.convert_lanes)
        self.fp64_free[multiprocessor] = max(self.fp64_free[multiprocessor], now) + takes
        return self.fp64_free[multiprocessor]

    def publish(self, of: int, now: float) -> None:
        """Publish a sum, which those who wait see a while later."""
        self.published[of] = now
        for actor, since in self.waiting.pop(of, ()):
            self.waited += now - since
            self.at(now, actor)


class Block:
    """One block of the grid."""

    def __init__(self, replay: Replay, number: int) -> None:
        self.replay, self.gpu, self.code = replay, replay.gpu, replay.code
        self.number, self.multiprocessor = number, number % replay.gpu.multiprocessors
        self.barrier = Barrier()
        self.tasks: list[Chunk | None] = [None, None]  # the double buffer in shared memory
        self.arrival: Arrival | None = None
        self.has_numbers = False
        self.hit = False  # whether the cache has the gradient of the task that was looked up last
        self.looked_up = -1  # its ticket
        self.done: list[int] = []

    def run(self, leads: bool) -> Actor:
        """Do what the first warp does, or what the others do."""
        now: float = yield 0.0
        if leads:
            now = yield from self.first_task(now)
        now = yield self.barrier
        buffer = 0
        while (task := self.tasks[buffer]) is not None:
            if leads:
                self.done.append(task.ticket)
            part = self.reduce if task.kind == "reduce" else self.update
            now = yield from part(now, task, buffer ^ 1, leads)
            buffer ^= 1
        if leads:
            now = yield from self.see_arrival(now)
            yield from self.finish(now)

    def first_task(self, now: float) -> Part:
        """Read the epoch, draw a ticket and read its task."""
        drawn, ticket = (now, self.number) if self.replay.given else self.replay.draw(now)
        epoch = self.replay.line("epoch", 0, now)
        now = yield drawn if self.replay.given else max(drawn, epoch)
        now = yield max(self.replay.task(ticket, now), epoch)
        self.tasks[0] = self.chunk_of(ticket)
        return now

    def chunk_of(self, ticket: int) -> Chunk | None:
        """Return a ticket's task, or None behind the last."""
        schedule = self.replay.schedule
        if ticket >= len(schedule.tasks):
            return None
        kind, tensor, chunk = schedule.tasks[ticket]
        return Chunk(ticket, kind, tensor, chunk, schedule.elements_of(tensor, chunk))

    def share(self, leads: bool) -> float:
        """Return what an actor does of a block's work."""
        first = 32 / self.code.threads
        return first if leads else 1 - first

    # REDUCE, and the same part of WHOLE.

    def reduce(self, now: float, task: Chunk, buffer: int, leads: bool) -> Part:
        """Add up a chunk's gradient, and account for it."""
        replay, gpu, code = self.replay, self.gpu, self.code
        if leads:
            drawn, ticket = replay.draw(now) if code.ticket_first else (0.0, 0)
        now = yield now + gpu.cycles(code.reduce_cycles) + code.address_trips * gpu.l2_trip
        came, left = self.ask_for_gradient(now, task, leads)
        if leads:
            replay.cache.read(replay.schedule.chunk_number(task.tensor, task.chunk), self.bytes_of(task), EVICT_LAST)
            if not code.ticket_first:
                drawn, ticket = replay.draw(now)
            now = yield from self.see_arrival(now)
        now = yield from self.sum_up(now, task, came, left, leads)
        if leads:
            now = yield from self.next_task(now, drawn, ticket, buffer)
        now = yield self.barrier
        if leads:
            now = yield from self.arrive(now, task)
        return now

    def bytes_of(self, task: Chunk) -> int:
        """Return the bytes of a task's gradient."""
        return task.elements * self.code.itemsize

    def ask_for_gradient(self, now: float, task: Chunk, leads: bool) -> tuple[float, float]:
        """Issue the first loads of a gradient. Returns when they have come, and bytes that are left."""
        size = self.bytes_of(task) * self.share(leads)
        part = min(size, LOADS * 16 * self.code.threads * self.share(leads))
        port = self.replay.memory.pass_port(now, part)
        return max(port, self.replay.memory.read(now, part)), size - part

    def sum_up(self, now: float, task: Chunk, came: float, left: float, leads: bool) -> Part:
        """Add up what comes, issue the other loads, and write the warps' sums to shared memory."""
        gpu, code, memory = self.gpu, self.code, self.replay.memory
        a_load = code.sum_cycles + (code.square_cycles if code.clips else 0.0)
        now = yield max(now, came)
        while left > 0:
            now += gpu.cycles(LOADS * a_load)
            part = min(left, LOADS * 16 * code.threads * self.share(leads))
            left -= part
            port = memory.pass_port(now, part)
            now = yield max(port, memory.read(now, part))
        loads = max(1, -(-task.elements // code.batch_elements))
        warps = 1 if leads else code.threads // 32 - 1
        operations, converts = code.tail_fp64, code.tail_converts
        if code.clips:
            operations += code.square_tail_fp64 + code.square_fp64 * loads
            converts += code.square_tail_converts + code.square_fp64 * loads
        through = self.replay.fp64(self.multiprocessor, now, operations * warps, converts * warps)
        now = yield max(through, now + gpu.cycles(a_load * min(loads, LOADS) + code.tail_cycles))
        return now

    def next_task(self, now: float, drawn: float, ticket: int, buffer: int) -> Part:
        """Read the next ticket's task, for all threads."""
        now = yield max(now, drawn)
        now = yield self.replay.task(ticket, now)
        self.tasks[buffer] = self.chunk_of(ticket)
        return now

    # Accounting, by the first warp.

    def arrive(self, now: float, task: Chunk) -> Part:
        """Store a chunk's sum and count it."""
        replay, gpu, code = self.replay, self.gpu, self.code
        row = replay.row(self.multiprocessor, task.tensor, now)
        now = yield row + gpu.cycles(code.arrive_cycles) + self.fence()
        segment = task.chunk // SEGMENT_CHUNKS
        chunks = min(SEGMENT_CHUNKS, replay.schedule.reduces[task.tensor] - segment * SEGMENT_CHUNKS)
        key = task.tensor, segment
        replay.in_segment[key] = replay.in_segment.get(key, 0) + 1
        known = now + gpu.home_trip + gpu.atomic_gap_ns
        self.arrival = Arrival(task.tensor, known, replay.in_segment[key] == chunks)
        if not code.arrival_hidden:
            now = yield from self.see_arrival(now)
        return now

    def see_arrival(self, now: float) -> Part:
        """Look at the result of the last arrival. Whoever completes a segment, a tensor or the norm adds it up."""
        replay, gpu, code = self.replay, self.gpu, self.code
        if self.arrival is None:
            return now
        arrival, self.arrival = self.arrival, None
        now = yield max(now, arrival.known)
        if not arrival.completes:
            return now
        tensor = arrival.tensor
        now = yield replay.row(self.multiprocessor, tensor, now) + self.sums_trip() + gpu.cycles(code.complete_cycles)
        segments = -(-replay.schedule.reduces[tensor] // SEGMENT_CHUNKS)
        if segments > 1:
            now = yield now + self.fence() + gpu.home_trip
            replay.in_tensor[tensor] = replay.in_tensor.get(tensor, 0) + 1
            if replay.in_tensor[tensor] < segments:
                return now
            now = yield now + self.sums_trip() * -(-segments // 128) + gpu.cycles(code.complete_cycles)
        if code.numbers_published:
            now = yield from self.numbers(now, tensor, code.publish_cycles, code.publish_fp64)
        now = yield now + self.fence()
        replay.publish(tensor, now + gpu.home_trip / 2)
        if code.clips:
            now = yield from self.complete_norm(now)
        return now

    def complete_norm(self, now: float) -> Part:
        """Count a tensor's sum of squares. The last to do so makes the clipping factor."""
        replay, gpu, code = self.replay, self.gpu, self.code
        now = yield now + self.fence() + gpu.home_trip
        replay.tensors_reduced += 1
        tensors = len(replay.schedule.tensors)
        if replay.tensors_reduced == tensors:
            now = yield now + self.sums_trip() * -(-tensors // 128) + gpu.cycles(code.complete_cycles)
            through = replay.fp64(self.multiprocessor, now, code.norm_fp64, 4)
            now = yield max(through, now + gpu.cycles(code.norm_cycles)) + self.fence()
            replay.publish(NORM, now + gpu.home_trip / 2)
        return now

    def fence(self) -> float:
        """Return the time of a fence, 0 where there is none."""
        return self.gpu.fence_ns if self.code.fenced else 0.0

    def sums_trip(self) -> float:
        """Return the time of reading what others wrote: behind an acquire, or at the scope of the GPU."""
        return self.gpu.l2_trip if self.code.fenced else self.gpu.home_trip

    def numbers(self, now: float, tensor: int, cycles: float, operations: int) -> Part:
        """Make a tensor's numbers, from its step count and the group's options."""
        now = yield self.replay.line("step", tensor, now)
        if not self.has_numbers:
            self.has_numbers = True
            now = yield now + self.gpu.l2_trip + self.gpu.cycles(self.code.first_cycles)
            now = yield self.replay.fp64(self.multiprocessor, now, self.code.first_fp64, 8)
        through = self.replay.fp64(self.multiprocessor, now, operations, 6)
        now = yield max(through, now + self.gpu.cycles(cycles))
        return now

    # UPDATE and WHOLE.

    def update(self, now: float, task: Chunk, buffer: int, leads: bool) -> Part:
        """Apply the rule to a chunk."""
        replay, gpu, code = self.replay, self.gpu, self.code
        whole = task.kind == "whole"
        came = left = drawn = asked = 0.0
        ticket = 0
        if leads and code.ticket_first:
            drawn, ticket = replay.draw(now)
        now = yield now + gpu.cycles(code.row_cycles)
        asked = now
        if whole and code.gradient_before_row:
            came, left = self.ask_for_gradient(now, task, leads)
        for trip in range(code.row_trips):
            now = yield (
                replay.row(self.multiprocessor, task.tensor, now)
                if trip == 0 or code.tables_in_l1
                else now + gpu.l2_trip
            )
        if whole and not code.gradient_before_row:
            came, left = self.ask_for_gradient(now, task, leads)
        fetched: list[float] = []
        for batch in range(min(self.batches_of(task), code.fetched(gpu, whole))):
            self.fetch(now, task, batch, fetched, leads)
        if leads:
            if not code.ticket_first:
                drawn, ticket = replay.draw(now)
            if not code.words_before_row:
                asked = now
        ready = now
        if leads and whole and code.numbers_beside:
            ready = self.numbers_beside(now, task.tensor)
        if leads:
            now = yield from self.see_arrival(now)
        if whole:
            now = yield from self.sum_up(now, task, came, left, leads)
            now = yield self.barrier
        if leads:
            now = yield from self.prepare(now, task, asked, ready, drawn, ticket, buffer)
        now = yield self.barrier
        return (yield from self.batches(now, task, fetched, leads))

    def batches_of(self, task: Chunk) -> int:
        """Return the number of a chunk's batches."""
        return -(-task.elements // self.code.batch_elements)

    def batch_bytes(self, task: Chunk, batch: int, leads: bool) -> float:
        """Return an actor's bytes of a batch, of each tensor."""
        elements = min(self.code.batch_elements, task.elements - batch * self.code.batch_elements)
        return elements * self.code.itemsize * self.share(leads)

    def look_up(self, task: Chunk) -> None:
        """See whether the cache has a task's gradient. The first actor to ask does so for both."""
        replay = self.replay
        if self.looked_up == task.ticket:
            return
        self.looked_up = task.ticket
        self.hit = True  # WHOLE has just read it
        if replay.schedule.reduces[task.tensor]:
            key = replay.schedule.chunk_number(task.tensor, task.chunk)
            self.hit = replay.cache.read(key, self.bytes_of(task), EVICT_FIRST)
            replay.second_reads += 1
            replay.cache_hits += self.hit

    def fetch(self, now: float, task: Chunk, batch: int, fetched: list[float], leads: bool) -> None:
        """Ask for an actor's p, m and v of a batch, which the cache then holds; note when they will have come."""
        size, code = self.batch_bytes(task, batch, leads), self.code
        streams = code.streams
        if code.gradient_fetched:
            self.look_up(task)
            streams += not self.hit
        fetched.append(self.replay.memory.read(now, size * streams))
        self.replay.cache.hold(int(size) * code.streams)

    def numbers_beside(self, now: float, tensor: int) -> float:
        """Return when another warp of a WHOLE has made the numbers that do not depend on the sum."""
        code = self.code
        now = self.replay.line("step", tensor, now) + self.gpu.cycles(code.beside_cycles)
        if not self.has_numbers:
            self.has_numbers = True
            now += self.gpu.l2_trip + self.gpu.cycles(code.first_cycles)
            now = self.replay.fp64(self.multiprocessor, now, code.first_fp64, 8)
        return now

    def prepare(
        self, now: float, task: Chunk, asked: float, ready: float, drawn: float, ticket: int, buffer: int
    ) -> Part:
        """Wait for the sums and make the update's numbers, and read the next task.

        Args:
            now: The time.
            task: The task.
            asked: When an UPDATE asks for its tensor's numbers, where they are published.
            ready: When another warp of a WHOLE has made what it makes.
            drawn: When the next ticket is there.
            ticket: Its number.
            buffer: Where the next task goes.
        """
        replay, gpu, code = self.replay, self.gpu, self.code
        if task.kind == "whole" and code.numbers_beside:
            now = yield max(now, ready)
            through = replay.fp64(self.multiprocessor, now, code.whole_fp64, 6)
            now = yield max(through, now + gpu.cycles(code.whole_cycles))
        elif task.kind == "update" and code.numbers_published:
            if code.clips:
                now = yield Sum(NORM)
            now = yield Sum(task.tensor)
            # A load that found them in time, or that was repeated until it did.
            now = yield max(asked, replay.published[task.tensor], replay.published.get(NORM, 0.0)) + gpu.home_trip
            now = yield now + gpu.cycles(code.words_cycles)
        else:
            now = yield max(replay.line("step", task.tensor, now), drawn)
            # The product with the group's sign waits for the next task, whose load has the same scoreboard.
            now = yield max(replay.task(ticket, now), now + gpu.l2_trip)
            if task.kind == "update":
                if code.clips:
                    now = yield Sum(NORM)
                    now = yield now + gpu.home_trip + gpu.l2_trip
                if replay.schedule.reduces[task.tensor]:
                    now = yield Sum(task.tensor)
                now = yield now + gpu.home_trip + gpu.l2_trip
            now = yield from self.numbers(now, task.tensor, code.prepare_cycles, code.prepare_fp64)
        return (yield from self.next_task(now, drawn, ticket, buffer))

    def batches(self, now: float, task: Chunk, fetched: list[float], leads: bool) -> Part:
        """Load, compute and store a chunk, some batches at a time; those of `fetched` come when that says."""
        gpu, code, memory, cache = self.gpu, self.code, self.replay.memory, self.replay.cache
        self.look_up(task)
        count = self.batches_of(task)
        issue, arithmetic = gpu.cycles(code.loads_cycles), gpu.cycles(code.update_cycles)

        def load(batch: int, issued: float) -> float:
            """Issue a batch's loads. Returns when they have come."""
            size = self.batch_bytes(task, batch, leads)
            came = memory.pass_port(issued, size * (code.streams + 1)) + gpu.l2_trip
            missing = 0.0
            if batch < len(fetched):
                came = max(came, fetched[batch])
            else:
                missing = size * code.streams
                cache.hold(int(size) * code.streams)
            if not self.hit and not (batch < len(fetched) and code.gradient_fetched):
                missing += size
            return max(came, memory.read(issued, missing)) if missing else came

        def store(batch: int, time: float) -> None:
            """Issue a batch's stores."""
            size = self.batch_bytes(task, batch, leads)
            memory.pass_port(time, size * code.streams)
            memory.write(time, size * code.streams)
            cache.release(int(size) * code.streams)
            if code.fetch_rolls and len(fetched) < count:
                self.fetch(time, task, len(fetched), fetched, leads)

        now += gpu.cycles(35)
        if code.rolled:
            coming = [load(batch, now + issue) for batch in range(min(2, count))]
            for batch in range(count):
                now = yield max(now, coming[batch]) + arithmetic
                store(batch, now)
                if batch + 2 < count:
                    coming.append(load(batch + 2, now + issue / 2))
            return now
        for begin in range(0, count, code.batches):
            together = range(begin, min(begin + code.batches, count))
            came = max(load(batch, now + issue) for batch in together)
            now = yield came + arithmetic * len(together)
            for batch in together:
                store(batch, now)
        return now

    # The end.

    def finish(self, now: float) -> Part:
        """Count a block that has no more tasks."""
        replay, gpu = self.replay, self.gpu
        now = yield now + gpu.fence_ns
        replay.finish_free = max(replay.finish_free, now + gpu.home_trip / 2) + gpu.atomic_gap_ns
        now = yield replay.finish_free + gpu.home_trip / 2
        replay.finished.append(now + gpu.cycles(self.code.finish_cycles))
        return now
