"""The machine code of the CUDA kernels, as the build left it: inspected, since it can be where it cannot be run."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agr_cuda import _C

ARCHITECTURES = _C.cuda_architectures.split()
# Types of parameter, gradient and state as they stand in a kernel's mangled name; bytes of each one's loads.
TYPES = {
    "float32": ("fff", 16, 16),
    "float64": ("ddd", 16, 16),
    "bfloat16": ("NS_8bfloat16ES4_S4_", 16, 16),
    "float16": ("NS_7float16ES4_S4_", 16, 16),
    "bfloat16, float32": ("NS_8bfloat16EfS4_", 8, 16),
    "float16, float32": ("NS_7float16EfS4_", 8, 16),
}
RULES = {"AdamW": ("AdamWRules", 2), "Adan": ("AdanRules", 4)}

pytestmark = pytest.mark.skipif(not ARCHITECTURES, reason="built without nvcc")


@dataclass
class Kernel:
    """One kernel for one architecture."""

    resources: dict[str, int] = field(default_factory=dict)
    instructions: list[str] = field(default_factory=list)

    def count(self, pattern: str) -> int:
        return sum(re.match(pattern, instruction) is not None for instruction in self.instructions)


def tool(name: str) -> Path:
    """NVIDIA's tools come with Triton's wheel."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "backends/nvidia/bin" / name
    assert path.exists(), f"{path} is not there"
    return path


def said(*arguments: str) -> str:
    command = [tool("cuobjdump"), *arguments, _C.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def kernels() -> dict[tuple[str, str], Kernel]:
    """By architecture and mangled name."""
    found: dict[tuple[str, str], Kernel] = {}
    architecture = name = ""
    for line in said("-sass").splitlines():
        if match := re.search(r"code for sm_(\w+)", line):
            architecture = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            name = match[1]
            if "agr_step" in name:
                found[architecture, name] = Kernel()
        elif "agr_step" in name and (match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", line)):
            found[architecture, name].instructions.append(match[1])
    architecture = name = ""
    for line in said("-res-usage").splitlines():
        if match := re.search(r"arch = sm_(\w+)", line):
            architecture = match[1]
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif "REG:" in line and (architecture, name) in found:
            found[architecture, name].resources = {k: int(v) for k, v in re.findall(r"(\w+(?:\[0\])?):(\d+)", line)}
    return found


def of(kernels: dict[tuple[str, str], Kernel], rules: str, types: str) -> Iterator[tuple[str, Kernel]]:
    for (architecture, name), kernel in kernels.items():
        if f"{rules}E{types}EEv" in name:
            yield architecture, kernel


def test_every_kernel_is_there_for_every_architecture(kernels) -> None:
    assert {architecture for architecture, _ in kernels} == set(ARCHITECTURES)
    for rules, _ in RULES.values():
        for types, _, _ in TYPES.values():
            assert sorted(a for a, _ in of(kernels, rules, types)) == sorted(ARCHITECTURES), f"{rules} {types}"
    assert len(kernels) == len(RULES) * len(TYPES) * len(ARCHITECTURES)


def test_later_gpus_find_ptx_of_the_newest() -> None:
    listed = re.findall(r"sm_(\w+)\.ptx", said("-lptx"))
    assert set(listed) == {ARCHITECTURES[-1]}


def test_nothing_is_spilled_and_four_blocks_fit(kernels) -> None:
    for (architecture, name), kernel in kernels.items():
        assert kernel.instructions, name
        assert kernel.resources["STACK"] == 0, f"sm_{architecture} {name}"
        assert kernel.resources["LOCAL"] == 0, f"sm_{architecture} {name}"
        assert kernel.resources["REG"] <= 128, f"sm_{architecture} {name}"
        assert not kernel.count(r"(LDL|STL)\b"), f"sm_{architecture} {name}"


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("rule", RULES)
def test_tensors_are_read_and_written_in_wide_accesses(kernels, rule: str, types: str) -> None:
    rules, states = RULES[rule]
    mangled, own, of_gradient = TYPES[types]
    widths = {16: "128", 8: "64"}
    for architecture, kernel in of(kernels, rules, mangled):
        wide = kernel.count(r"LDG\.E(\.\w+)*\.128")
        loads = wide if own == 16 else kernel.count(rf"LDG\.E(\.\w+)*\.{widths[own]}")
        stores = kernel.count(rf"STG\.E(\.\w+)*\.{widths[own]}")
        assert loads >= 2 + states, f"sm_{architecture}: {loads} loads"
        assert stores >= 1 + states, f"sm_{architecture}: {stores} stores"
        assert wide >= 8, f"sm_{architecture}: {wide} wide loads, of {of_gradient} bytes of the gradient"


@pytest.mark.parametrize("rule", RULES)
def test_a_reduction_has_eight_loads_under_way(kernels, rule: str) -> None:
    """Eight of the gradient, one after the other, before the first addition that uses one of them."""
    rules, _ = RULES[rule]
    for architecture, kernel in of(kernels, rules, TYPES["float32"][0]):
        run = longest = 0
        for instruction in kernel.instructions:
            if re.match(r"LDG\.E(\.\w+)*\.128", instruction):
                run += 1
            elif re.match(r"FADD|FFMA|FMUL|BAR|STG", instruction):
                run = 0
            longest = max(longest, run)
        assert longest >= 8, f"sm_{architecture}: {longest}"


def test_no_atomic_adds_floating_point_numbers(kernels) -> None:
    for (architecture, name), kernel in kernels.items():
        atomics = [i for i in kernel.instructions if re.match(r"(ATOM|ATOMG|RED|REDG)\b", i)]
        assert atomics, f"sm_{architecture} {name}: no tickets"
        assert not any(re.search(r"\.(F16|F32|F64|BF16)", i) for i in atomics), f"sm_{architecture} {name}"
