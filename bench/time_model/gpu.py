"""GPUs as the time model sees them: clocks, latencies, bandwidths. Times in ns, bandwidths in bytes/ns (GB/s).

Where the constants come from:

- RRZE-HPC/gpu-benches on GitHub, its files of results. gpu-latency/gh200.txt: Hopper at 1.98 GHz, first-level cache
  32 cycles, second-level cache 280 cycles for what fits into the near partition and about 490 beyond it, DRAM 680
  cycles = 344 ns. gpu-latency/l40.txt: Ada at 2.49 GHz, 34, 274 (110 ns) and 624 cycles (251 ns). gpu-l2-cache/
  h100_pcie.txt and h200.txt: bandwidth holds up to 36 of 50 MB and 44 of 60 MB, 0.73 of the nominal size; 7.0 and 9.7
  TB/s.
  gpu-stream/gh200.txt: see memory.py. gpu-small-kernels/h200*.txt: a launch in a stream takes 2.5 us, in a graph 1.4.
- chipsandcheese.com on the H100 and the B200: second-level cache about 150 ns within a partition, DRAM no faster than
  Hopper's.
- Copies: 3.0 TB/s on an H100 SXM and 4.3 TB/s on an H200, as PyTorch's copy_ makes them; of the others, a similar share
  of their makers' figures.
- CUDA C++ Programming Guide, arithmetic throughput: float64 operations a cycle and multiprocessor 64 (9.0, 10.0), 2
  (8.9, 12.0); conversions from and to 64-bit types 16 (8.0, 9.0), 2 (8.6, 8.9). B300: 2 float64 units, by NVIDIA's data
  sheet.
- Guesses, without a source: `fence_ns`, `atomic_gap_ns`, `loaded`, `l2_copies`, `start_ns`. What they decide is said by
  `python -m bench latency --sensitivity`.
"""

from __future__ import annotations

from dataclasses import dataclass

# Of DRAM's bandwidth, what a copy with 64 KB in flight on a multiprocessor reaches in memory.py.
COPY_SHARE = 0.95


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    title: str
    multiprocessors: int
    ghz: float
    copy: float  # bytes read and written by a copy on the device
    dram_ns: float  # idle, from a load to its use
    l2_ns: float  # idle, of what the near partition of the second-level cache has
    # Of atomics and of loads at the scope of the GPU, which go to the line's own partition: the mean of near and far.
    home_ns: float
    l2_bytes: int
    l2_share: float  # of it that holds
    l2_copies: float  # of a line on average: read by one multiprocessor, it is in that one's partition and in its own
    l2_bandwidth: float
    fp64_lanes: float  # a cycle and multiprocessor
    convert_lanes: float  # conversions from and to 64-bit types, a cycle and multiprocessor
    l1_cycles: float = 32.0
    fence_ns: float = 400.0  # with a store under way
    atomic_gap_ns: float = 2.0  # between two atomics on one address
    loaded: float = 1.3  # the second-level cache's latency under load over the idle one
    issue: float = 1.0  # cycles over what the machine code says: conflicts, misses of the instruction cache
    launch_ns: float = 2500.0  # in a stream, back to back
    start_ns: float = 700.0  # until all blocks run

    def cycles(self, count: float) -> float:
        """Return the time of so many cycles."""
        return count * self.issue / self.ghz

    @property
    def dram(self) -> float:
        """Bytes/ns of DRAM's channels together."""
        return self.copy / COPY_SHARE

    @property
    def l2_trip(self) -> float:
        """The time of a load from the second-level cache."""
        return self.l2_ns * self.loaded

    @property
    def home_trip(self) -> float:
        """The time of an atomic, or of a load at the scope of the GPU."""
        return self.home_ns * self.loaded


MIB = 1 << 20
GPUS = {
    "h100": Gpu("H100 SXM", 132, 1.755, 3000, 344, 150, 205, 50 * MIB, 0.73, 1.25, 5500, 64, 16),
    "h200": Gpu("H200", 132, 1.98, 4300, 344, 142, 195, 60 * MIB, 0.73, 1.25, 7000, 64, 16),
    "b200": Gpu("B200", 148, 1.92, 6800, 420, 155, 240, 126 * MIB, 0.73, 1.25, 10000, 64, 16),
    "b300": Gpu("B300", 148, 1.92, 6800, 420, 155, 240, 126 * MIB, 0.73, 1.25, 10000, 2, 2),
    "rtx4090": Gpu("RTX 4090", 128, 2.52, 920, 251, 110, 110, 72 * MIB, 0.95, 1.0, 4500, 2, 2, l1_cycles=34.0),
}
