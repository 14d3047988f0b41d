"""The machine code of the CUDA kernels, as the build left it: inspected, since it can be where it cannot be run."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pytest
from compiled import setup_py

from agr_cuda import _C

ROOT = Path(__file__).parent.parent

BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2, "8bit": 1}
MANGLED = {
    "float32": "f", "float64": "d", "bfloat16": "NS_8bfloat16E", "float16": "NS_7float16E", "8bit": "NS0_5code8E",
}  # fmt: skip


class Format(NamedTuple):
    """What a kernel's elements are stored as: Format in csrc/cuda/format.h."""

    parameter: str
    gradient: str
    state: str
    master: bool = False
    stochastic: bool = False

    def __str__(self) -> str:
        flags = ["master"] * self.master + ["stochastic"] * self.stochastic
        return "-".join([self.parameter, self.gradient, self.state, *flags])

    @property
    def weight(self) -> str:
        """What an update reads and changes."""
        return "float32" if self.master else self.parameter

    @property
    def lanes(self) -> int:
        """The elements of each tensor that a thread loads together."""
        states = [] if self.state == "8bit" else [self.state]
        return 16 // max(BYTES[t] for t in (self.weight, self.gradient, *states))

    @property
    def batches(self) -> int:
        """The loads of each tensor in a block of codes."""
        return 256 // (32 * self.lanes)

    def bits(self, stored: str) -> int:
        """The bits of an access to elements of a type."""
        return 8 * self.lanes * BYTES[stored]

    @property
    def mangled(self) -> str:
        """As it stands in the name of its kernel, where a type is written once and referred to after that."""
        first, text = "", ""
        for stored in (self.parameter, self.gradient, self.state):
            short = MANGLED[stored]
            text += "S5_" if short == first and len(short) > 1 else short
            first = first or short
        return f"6FormatI{text}Lb{self.master:d}ELb{self.stochastic:d}EE"


SAME = [Format(t, t, t) for t in ("float32", "float64", "bfloat16", "float16")]
FORMATS = [
    *SAME,
    Format("float32", "bfloat16", "float32"),
    Format("float32", "float32", "bfloat16"),
    Format("float32", "float32", "8bit"),
    Format("bfloat16", "float32", "bfloat16"),
    Format("bfloat16", "bfloat16", "float32"),
    Format("bfloat16", "float32", "bfloat16", stochastic=True),
    *(Format("bfloat16", "bfloat16", state, stochastic=True) for state in ("bfloat16", "float32", "8bit")),
    *(Format("bfloat16", "bfloat16", state, master=True) for state in ("float32", "8bit")),
    Format("bfloat16", "float32", "float32", master=True),
    *(Format("float16", gradient, "float32", master=True) for gradient in ("float16", "float32")),
]
# The states of every rule that a kernel takes: AdamW's has AMSGrad too.
RULES = {"AdamW": ("AdamWRules", [2, 3]), "Adan": ("AdanRules", [4]), "Regularize": ("RegularizeRules", [0])}
KERNELS = [(rule, format_) for rule in RULES for format_ in (SAME if rule == "Regularize" else FORMATS)]
# Every kernel adds up gradients in one place, for all kinds of tasks.
every_kernel = pytest.mark.parametrize(("rule", "format_"), KERNELS, ids=str)

# A load that leaves nothing in the first-level cache: of a tensor, not of a table. Its bits, the register it loads,
# the register that has the address, and what is added to that.
TENSOR_LOAD = re.compile(r"LDG\.E(?=\S*\.NA\b)\S*?\.(64|128)\b\S* R(\d+), (?:desc\[\w+\])?\[R(\d+)(?:\.64)?\+?(\w*)\]")
ENDS_A_RUN = re.compile(r"(BRA|BRX|JMP|BAR|BSSY|BSYNC|EXIT|CALL|RET|WARPSYNC|STG?|ATOMG?|RED)\b")


class Load(NamedTuple):
    """One wide load of a tensor's elements."""

    bits: int
    register: str
    offset: int


@dataclass
class Kernel:
    """One kernel for one architecture."""

    resources: dict[str, int] = field(default_factory=dict)
    instructions: list[str] = field(default_factory=list, repr=False)

    def count(self, pattern: str) -> int:
        return sum(re.match(pattern, instruction) is not None for instruction in self.instructions)

    def loads(self, bits: int) -> int:
        return sum(load.bits == bits for run in self.runs for load in run)

    @cached_property
    def runs(self) -> list[list[Load]]:
        """Loads that are under way together: nothing in between uses what one of them brings, or may wait."""
        runs: list[list[Load]] = [[]]
        awaited: set[int] = set()
        for instruction in self.instructions:
            used = {int(number) for number in re.findall(r"\bR(\d+)\b", instruction)}
            load = TENSOR_LOAD.match(instruction)
            if used & awaited or ENDS_A_RUN.match(instruction):
                runs.append([])
                awaited = set()
            if load:
                bits, register = int(load[1]), int(load[2])
                runs[-1].append(Load(bits, load[3], int(load[4] or "0", 16)))
                awaited |= set(range(register, register + bits // 32))
        return [run for run in runs if run]

    def shared_memory_in_updates(self) -> tuple[int, list[str]]:
        """Count wide stores of tensors, and list reads of shared memory since the wide load before each of them."""
        stores, found, since, loaded = 0, [], [], False
        for instruction in self.instructions:
            if TENSOR_LOAD.match(instruction):
                loaded, since = True, []
            elif re.match(r"BAR\b", instruction):
                loaded = False
            elif loaded and re.match(r"LDS\b", instruction):
                since.append(instruction)
            elif loaded and re.match(r"STG\.E(?!\S*STRONG)\S*\.(64|128)\b", instruction):
                stores, found, since = stores + 1, found + since, []
        return stores, found

    def reductions(self, bits: int) -> list[int]:
        """Of every place that loads a gradient alone, how many loads of so many bits are under way together.

        They have one register as address, and lie as far apart as a block of 128 threads loads at once.
        """
        found = []
        for run in self.runs:
            registers = {load.register for load in run}
            steps = {after.offset - before.offset for before, after in itertools.pairwise(run)}
            if len(run) > 2 and len(registers) == 1 and steps == {128 * bits // 8}:
                found.append(len(run))
        return found


Kernels = dict[tuple[str, str], Kernel]


def tool(name: str) -> Path:
    """NVIDIA's tools come with Triton's wheel."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "backends/nvidia/bin" / name
    assert path.exists(), f"{path} is not there"
    return path


@dataclass
class Library:
    """The extension, and what it was compiled for."""

    path: Path
    architectures: list[str]

    def said(self, *arguments: str) -> str:
        environment = {**os.environ, "PATH": os.pathsep.join([str(tool("nvdisasm").parent), os.environ["PATH"]])}
        command = [str(tool("cuobjdump")), *arguments, str(self.path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The installed one; or, where that was built without nvcc and there now is one, one built for the purpose."""
    if _C.cuda_architectures:
        return Library(Path(_C.__file__), _C.cuda_architectures.split())
    if shutil.which("nvcc") is None:
        pytest.skip("built without nvcc, and there is none")
    folder = tmp_path_factory.mktemp("cuda")
    folders = [f"--build-temp={folder / 'temp'}", f"--build-lib={folder / 'lib'}"]
    command = [sys.executable, "setup.py", "build_ext", *folders]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "AGR_CUDA_ARCHS": "90"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return Library(next(folder.glob("lib/agr_cuda/_C*.so")), ["90"])


@pytest.fixture(scope="module")
def kernels(library: Library) -> Kernels:
    """By architecture and mangled name."""
    found: Kernels = {}
    architecture = name = ""
    for line in library.said("-sass").splitlines():
        if match := re.search(r"code for sm_(\w+)", line):
            architecture = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            name = match[1]
            if "agr_step" in name:
                assert (architecture, name) not in found
                found[architecture, name] = Kernel()
        elif "agr_step" in name and (match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", line)):
            found[architecture, name].instructions.append(match[1])
    architecture = name = ""
    for line in library.said("-res-usage").splitlines():
        if match := re.search(r"arch = sm_(\w+)", line):
            architecture = match[1]
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif "REG:" in line and (architecture, name) in found:
            found[architecture, name].resources = {k: int(v) for k, v in re.findall(r"(\w+(?:\[0\])?):(\d+)", line)}
    return found


def of(kernels: Kernels, rule: str, format_: Format) -> Iterator[tuple[str, Kernel]]:
    for (architecture, name), kernel in kernels.items():
        if RULES[rule][0] in name and format_.mangled in name:
            yield architecture, kernel


def test_every_kernel_is_there_for_every_architecture(library: Library, kernels: Kernels) -> None:
    assert {architecture for architecture, _ in kernels} == set(library.architectures)
    for rule, format_ in KERNELS:
        there = sorted(architecture for architecture, _ in of(kernels, rule, format_))
        assert there == sorted(library.architectures), f"{rule} {format_}"
    assert len(kernels) == len(KERNELS) * len(library.architectures)


def test_later_gpus_find_ptx_of_every_kernel(library: Library) -> None:
    """That of the newest, and no other."""
    ptx = library.said("-ptx")
    newest = setup_py().ptx_architecture(library.architectures[-1])
    assert set(re.findall(r"^\.target sm_(\w+)", ptx, re.MULTILINE)) == {newest}
    entries = re.findall(r"\.entry (\w*agr_step\w*)\(", ptx)
    assert len(set(entries)) == len(entries) == len(KERNELS)


def test_nothing_is_spilled_and_four_blocks_fit(kernels: Kernels) -> None:
    """Three of Adan's, where it makes random numbers or codes."""
    three = {f for f in FORMATS if f.stochastic or f.state == "8bit"}
    too_much = []
    for (architecture, name), kernel in kernels.items():
        assert kernel.instructions, name
        assert {"STACK", "LOCAL", "REG", "SHARED"} <= set(kernel.resources), name
        used = {key: kernel.resources[key] for key in ("REG", "STACK", "LOCAL")}
        used["spills"] = kernel.count(r"(LDL|STL)\b")
        most = 168 if "AdanRules" in name and any(f.mangled in name for f in three) else 128
        if used["REG"] > most or any(used[key] for key in ("STACK", "LOCAL", "spills")):
            too_much.append(f"sm_{architecture} {name}: {used}")
    assert not too_much, "\n".join(too_much)


@every_kernel
def test_tensors_are_read_and_written_in_wide_accesses(kernels: Kernels, rule: str, format_: Format) -> None:
    """Of 16 bytes for the widest type, and of as many elements for the others; codes of 4 elements are not wide."""
    states = RULES[rule][1]
    batches = format_.batches if format_.state == "8bit" else 1
    loads, stores = Counter[int](), Counter[int]()
    loads[format_.bits(format_.gradient)] += 8 + 1 + batches * len(states)  # in eights, and what remains
    for count in states:
        stores[format_.bits(format_.weight)] += batches  # or a gradient that is regularized in place
        if count > 0:
            loads[format_.bits(format_.weight)] += batches
            loads[format_.bits(format_.state)] += count * batches
            stores[format_.bits(format_.state)] += count * batches
        if format_.master:
            stores[format_.bits(format_.parameter)] += batches
    for architecture, kernel in of(kernels, rule, format_):
        for bits in (64, 128):
            assert kernel.loads(bits) >= loads[bits], f"sm_{architecture}: loads of {bits} bits"
            stored = kernel.count(rf"STG\.E(?!\S*STRONG)\S*\.{bits}\b")
            assert stored >= stores[bits], f"sm_{architecture}: {stored} stores of {bits} bits, not {stores[bits]}"


@every_kernel
def test_a_reduction_has_many_loads_under_way(kernels: Kernels, rule: str, format_: Format) -> None:
    """Eight, of every type: ptxas would put some off until the first are summed up, if it were let."""
    for architecture, kernel in of(kernels, rule, format_):
        found = kernel.reductions(format_.bits(format_.gradient))
        assert sum(loads == 8 for loads in found) >= 1, f"sm_{architecture}: {found}"


TWO_BATCHES = [f for f in FORMATS if f.state != "8bit" and not (f.stochastic and f.lanes == 8)]


@pytest.mark.parametrize("format_", TWO_BATCHES, ids=str)
def test_an_update_of_adamw_has_two_batches_of_loads_under_way(kernels: Kernels, format_: Format) -> None:
    """Of weight, gradient and two states, or three."""
    for architecture, kernel in of(kernels, "AdamW", format_):
        runs = [len(run) for run in kernel.runs if len({load.register for load in run}) > 1]
        assert sorted(runs)[-2:] == [2 * (2 + n) for n in RULES["AdamW"][1]], f"sm_{architecture}: {runs}"


def test_an_update_keeps_its_numbers_in_registers(kernels: Kernels) -> None:
    """And does not read them from shared memory between the loads of a batch and the stores of what becomes of it."""
    for (architecture, name), kernel in kernels.items():
        if "code8" in name:
            continue  # The values of codes are in shared memory.
        stores, found = kernel.shared_memory_in_updates()
        assert stores > 0, f"sm_{architecture} {name}"
        assert not found, f"sm_{architecture} {name}: {found}"


def test_a_chunk_is_prefetched(kernels: Kernels) -> None:
    """Line by line, and where there is an instruction for it, all at once: each tensor that an update reads first."""
    for rule, format_ in KERNELS:
        states = max(RULES[rule][1])
        tensors = states + 1 if states else 0
        for architecture, kernel in of(kernels, rule, format_):
            assert kernel.count(r"CCTL\.E\.PF2\b") >= tensors + 1, f"sm_{architecture} {rule} {format_}"
            ranges = kernel.count(r"UBLKPF\b")
            assert ranges >= tensors if int(architecture) >= 90 else ranges == 0, f"sm_{architecture} {rule} {format_}"


def test_parameters_of_the_kernel_are_read_from_constant_memory(kernels: Kernels) -> None:
    """Also where their place is computed: the address of a gradient, and the numbers of a group."""
    for (architecture, name), kernel in kernels.items():
        assert kernel.count(r"LDC\S* R\d+, c\[0x0\]\[R\d+") >= 4, f"sm_{architecture} {name}"


def test_no_atomic_takes_floating_point_numbers(kernels: Kernels) -> None:
    """Neither as an operation of its own, nor in a loop that compares and swaps: sums have one order."""
    for (architecture, name), kernel in kernels.items():
        atomics = [i.split()[0] for i in kernel.instructions if re.match(r"U?(ATOM|ATOMG|ATOMS|RED|REDG)\b", i)]
        assert atomics, f"sm_{architecture} {name}: no tickets"
        assert not any(re.search(r"\.(B?F\d|CAS)", i) for i in atomics), f"sm_{architecture} {name}: {set(atomics)}"


def test_nothing_waits_for_a_ticket_before_its_time(kernels: Kernels) -> None:
    """One of 64 bits would be split at once, one from an addition shared out among a warp's lanes, and one drawn before
    a loop of loads waited for by these."""
    for (architecture, name), kernel in kernels.items():
        assert kernel.count(r"ATOMG\S*\.INC\.") >= 2, f"sm_{architecture} {name}"
        assert not kernel.count(r"U?ATOMG?\S*\.64\b"), f"sm_{architecture} {name}"
        code = kernel.instructions
        last = ("0x3800", "0x1c00")  # the offsets of the eighth load of 16 bytes, and of 8
        eighths = [i for i, text in enumerate(code) if (load := TENSOR_LOAD.match(text)) and load[4] in last]
        assert len(eighths) >= 1, f"sm_{architecture} {name}"
        for i in eighths:
            assert any(re.match(r"ATOMG\S*\.INC\.", text) for text in code[i : i + 40]), f"sm_{architecture} {name}"
