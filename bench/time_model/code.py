"""What the CUDA kernel's code costs on its paths: dependent round trips to memory, and cycles of issue.

How to bring it up to date after a change of csrc/cuda. Triton's wheel has the tools (backends/nvidia/bin):

    AGR_CUDA_ARCHS=90 pip install --no-build-isolation -e .
    cuobjdump -sass agr_cuda/_C*.so        # the machine code; nvdisasm -hex adds the control words

Cycles are the sums of the stall counts of a path's instructions (bits 41 to 44 of the upper half of a 128-bit
instruction), read from the first instruction behind one barrier, or wait for a load, to the next; of loops, one turn.
Instructions that wait for a scoreboard count as the latency that they wait for: 30 cycles for a shuffle or what is in
shared memory, 45 for a shuffle of a float64 with its addition. Round trips are loads whose result the next load's
address, or a barrier, needs. Those of version 0.1.0 were read that way (nvcc 13.0, sm_90). Those of the fields that
CHANGES sets are estimates from the source, to be replaced when its machine code is there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import Any

from bench.time_model.gpu import Gpu
from bench.workloads.formats import ACCESSES

ALL = 1 << 30  # batches
PREFETCHED_SHARE = 1 / 8  # of the cache; as in csrc/cuda/executor.cpp

# By rule and bytes of an element. Cycles of one batch of an update: 16 bytes of each tensor for each thread.
UPDATE_CYCLES = {("AdamW", 4): 150.0, ("AdamW", 2): 310.0, ("Adan", 4): 200.0, ("Adan", 2): 800.0}
# Batches that are in flight, as registers allow.
BATCHES = {("AdamW", 4): 2, ("AdamW", 2): 2, ("Adan", 4): 2, ("Adan", 2): 1}
# By bytes of an element. Cycles of one 16-byte load of a REDUCE: compensated additions of its elements.
SUM_CYCLES = {4: 233 / 8, 2: 526 / 8}
# The same for squares in float64, where two instructions make and add each: float64's, and conversions to it.
SQUARE_CYCLES = {4: 8.0, 2: 16.0}
SQUARE_FP64 = {4: 4, 2: 8}
# And in float32, by multiply-adds, with one compensated addition a load.
FLOAT32_SQUARE_CYCLES = {4: 11.0, 2: 15.0}


@dataclass(frozen=True)
class Code:
    """What a kernel does. The defaults are version 0.1.0's."""

    rule: str  # "AdamW" or "Adan"
    itemsize: int
    update_cycles: float
    sum_cycles: float
    square_cycles: float
    square_fp64: int  # of a warp for one load; as many conversions
    batches: int  # of an update's loads in flight
    clips: bool = False
    threads: int = 128  # of a block
    blocks: int = 4  # of a multiprocessor
    chunk_bytes: int = 16 << 10

    # The tables of rows and tasks.
    tables_in_l1: bool = False  # a row stays in the first-level cache; False: every acquire invalidates it
    row_trips: int = 1  # from the task to all that an update needs of the row
    task_ahead: bool = False  # a task's line is asked for long before its ticket is drawn
    first_ticket_given: bool = False  # a block's first ticket is its own number
    ticket_first: bool = False  # the next ticket is drawn when a task begins, and not behind its first loads

    # REDUCE, and the same part of WHOLE.
    address_trips: int = 1  # to the gradient's address
    reduce_cycles: float = 150.0  # until the loads are out
    tail_cycles: float = 404.0  # from a thread's sums to the warp's in shared memory: 5 shuffles of a float64
    tail_fp64: int = 13  # of a warp: the accumulators of a thread, and the shuffles' additions
    tail_converts: int = 8
    square_tail_fp64: int = 9
    square_tail_converts: int = 0

    # Accounting: a chunk's sum, what it completes, and what that publishes.
    arrive_cycles: float = 320.0  # adds the warps' sums and stores the chunk's
    fenced: bool = True  # a fence before each arrival and publication; False: words carry the epoch
    arrival_hidden: bool = False  # its result is looked at behind the next task's first loads
    complete_cycles: float = 300.0  # adds the sums of a segment or a tensor
    norm_cycles: float = 500.0  # from the sum of squares to the clipping factor
    norm_fp64: int = 30
    numbers_published: bool = False  # whoever completes a tensor makes its numbers, for all UPDATEs
    publish_cycles: float = 200.0  # makes them where options and step count are as before
    publish_fp64: int = 10

    # UPDATE and WHOLE.
    row_cycles: float = 105.0  # until the row's load is out
    fetched_batches: int = 1  # whose p, m and v an UPDATE asks for before S is there
    prefetched_share: float = 0.0  # or as many as fit into this share of the cache, of all blocks
    whole_fetched_batches: int = 1  # and a WHOLE
    fetch_rolls: bool = False  # as many batches ahead all the way, instead of once
    gradient_fetched: bool = False  # so is the gradient
    gradient_before_row: bool = False  # WHOLE asks for its gradient before it reads the row
    words_before_row: bool = False  # UPDATE asks for its tensor's numbers before it reads the row
    prepare_cycles: float = 600.0  # a chunk's numbers, all made by the first thread
    prepare_fp64: int = 14
    words_cycles: float = 60.0  # the same for an UPDATE that reads them
    numbers_beside: bool = False  # WHOLE: another warp makes what depends on step count and options meanwhile
    beside_cycles: float = 100.0  # that, where they are as before
    whole_cycles: float = 200.0  # and then what the first thread makes
    whole_fp64: int = 10
    first_cycles: float = 1700.0  # a block's first numbers: powers of the betas at step 1,000
    first_fp64: int = 115
    loads_cycles: float = 45.0  # until a batch's loads are out
    rolled: bool = False  # a batch's loads are out before the arithmetic of the batch before

    # The end.
    finish_cycles: float = 60.0
    counted_last: bool = True  # the last block raises the step counts

    @property
    def lanes(self) -> int:
        """Elements of a 16-byte load."""
        return 16 // self.itemsize

    @property
    def streams(self) -> int:
        """Tensors besides the gradient, which are read and written."""
        return (ACCESSES[self.rule] - 1) // 2

    @property
    def batch_elements(self) -> int:
        """Elements of a block's batch."""
        return self.threads * self.lanes

    def fetched(self, gpu: Gpu, whole: bool) -> int:
        """Return how many batches of p, m and v a task asks for before it waits."""
        if whole:
            return self.whole_fetched_batches
        of_all = self.batch_elements * self.itemsize * self.streams * gpu.multiprocessors * self.blocks
        return max(self.fetched_batches, int(min(ALL, self.prefetched_share * gpu.l2_bytes / of_all)))


def version_0_1_0(rule: str, itemsize: int, clips: bool = False) -> Code:
    """Return the code of version 0.1.0, whose blocks release and acquire sums."""
    return Code(
        rule,
        itemsize,
        update_cycles=UPDATE_CYCLES[rule, itemsize],
        sum_cycles=SUM_CYCLES[itemsize],
        square_cycles=SQUARE_CYCLES[itemsize],
        square_fp64=SQUARE_FP64[itemsize],
        batches=BATCHES[rule, itemsize],
        clips=clips,
        row_trips=2 if rule == "AdamW" else 1,  # AdamW's rule, and after the branch the rest
    )


# What was changed since. Each is a set of fields; together they are the code of `words`.
CHANGES: dict[str, dict[str, Any]] = {
    "sums as words with the epoch: no fences": {"fenced": False},
    "no acquires: rows stay in the first-level cache": {"tables_in_l1": True},
    "two shuffles for a chunk's sum": {"arrive_cycles": 150.0},
    "arrivals seen behind the next loads": {"arrival_hidden": True},
    "numbers published with S": {"numbers_published": True},
    "WHOLE's numbers made by another warp": {"numbers_beside": True},
    "p, m, v asked for: as much as an eighth of the cache holds": {
        "prefetched_share": PREFETCHED_SHARE,
        "whole_fetched_batches": ALL,
    },
    "WHOLE asks for its gradient before the row": {"gradient_before_row": True},
    "a block's first ticket is its number, where no task waits": {"first_ticket_given": True},
    "rule in the task": {"row_trips": 1},
    "gradient's address by a constant load": {"address_trips": 0},
    "tasks asked for ahead": {"task_ahead": True},
    "step counts raised by who publishes": {"counted_last": False},
    "accumulators joined in float32": {
        "tail_cycles": 360.0,
        "tail_fp64": 6,
        "tail_converts": 2,
        "square_tail_fp64": 6,
        "square_tail_converts": 2,
    },
}
SQUARES_IN_FLOAT32 = "squares in float32"


def changes(code: Code) -> dict[str, dict[str, Any]]:
    """Return CHANGES with what applies to this code alone."""
    if not code.clips:
        return CHANGES
    squares = {"square_cycles": FLOAT32_SQUARE_CYCLES[code.itemsize], "square_fp64": 0}
    return {**CHANGES, SQUARES_IN_FLOAT32: squares}


def words(rule: str, itemsize: int, clips: bool = False) -> Code:
    """Return today's code, whose sums are words that carry the epoch."""
    code = version_0_1_0(rule, itemsize, clips)
    for fields in changes(code).values():
        code = replace(code, **fields)
    return code


KERNELS = {"0.1.0": version_0_1_0, "words": words}
# What might be changed next.
IDEAS: dict[str, dict[str, Any]] = {
    "chunks of 32 KB": {"chunk_bytes": 32 << 10},
    "update's loads rolled": {"rolled": True},
    "chunks of 32 KB, loads rolled": {"chunk_bytes": 32 << 10, "rolled": True},
    "3 blocks a multiprocessor": {"blocks": 3},
    "5 blocks a multiprocessor": {"blocks": 5},
    "UPDATE asks for its numbers before the row": {"words_before_row": True},
    "the next ticket drawn when a task begins": {"ticket_first": True},
    "the gradient asked for too": {"gradient_fetched": True},
    "p, m, v asked for: as much as a quarter of the cache holds": {"prefetched_share": 0.25},
    "p, m, v of the whole chunk asked for": {"prefetched_share": inf},
    "p, m, v asked for all the way, by as much": {"fetch_rolls": True},
}
