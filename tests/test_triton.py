"""What is Triton's alone: when it is imported, what it compiles and when, and sums of more chunks than a block adds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import device_of
from helpers import Method, follow, parameters, run
from test_device_code import tool

import agr_cuda
import agr_cuda.triton
import agr_cuda.triton_gradients

ROOT = Path(__file__).parent.parent
DEVICE = device_of("triton")


def say(*command: str | Path, **environment: str) -> str:
    """What a Python program prints that runs where nobody asks for the interpreter."""
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    cache = {"TRITON_CACHE_DIR": str(ROOT / "build/triton-cache")}  # by what is compiled, so that it never grows stale
    where = {"PYTHONPATH": os.pathsep.join([str(ROOT), kept.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        env=kept | cache | where | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


# Importing.

# torch.optim.Optimizer itself imports PyTorch's compiler, and that triton, where it is there.
STEPS_ON_THE_CPU = """
import sys
{before}
import torch
import agr_cuda
agr_cuda.available_backends()
print(sorted(name for name in sys.modules if name.split(".")[0] == "triton"))
p = torch.nn.Parameter(torch.ones(5))
p.grad = torch.ones(5)
agr_cuda.AdamW([p]).step()
print("agr_cuda.triton_kernels" in sys.modules)
"""

WITHOUT_TRITON = """
import importlib.abc
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find(name, package)
sys.meta_path.insert(0, Hidden())
"""


def test_triton_is_not_imported_until_a_gpu_needs_it() -> None:
    assert say("-c", STEPS_ON_THE_CPU.format(before="")).split() == ["[]", "False"]


def test_everything_else_works_without_triton() -> None:
    program = STEPS_ON_THE_CPU.format(before=WITHOUT_TRITON) + (
        "from agr_cuda.backends import why_missing\n"
        "print(why_missing('triton'))\n"
        "try:\n"
        "    agr_cuda.AdamW([p], backend='triton')\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    nothing, kernels, reason, error = say("-c", program).splitlines()
    assert (nothing, kernels) == ("[]", "False")
    assert reason == "Triton is not installed: pip install 'triton>=3.2'"
    assert error.startswith(f"backend='triton' is not there: {reason}. There are ")


@pytest.mark.parametrize(("found", "reason"), [("3.1.0", "3.1.0"), ("2.3.1", "2.3.1"), ("3.2.0", None), ("4.0", None)])
def test_an_old_triton_is_not_used(found: str, reason: str | None, monkeypatch) -> None:
    monkeypatch.setattr(agr_cuda.triton, "_version", lambda: found)
    said = agr_cuda.triton.why_missing.__wrapped__()
    if reason is None:
        assert said is None
    else:
        assert said == f"Triton is of version {reason}, and 'triton>=3.2' is needed"


# Compiling.


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, str]]]:
    """A folder with every kernel for every target, and by file name what they are."""
    folder = tmp_path_factory.mktemp("triton")
    say(ROOT / "tests/triton_rehearsal/compile_kernels.py", folder)
    return folder, json.loads((folder / "index.json").read_text())


def test_every_variant_compiles_for_every_target(compiled) -> None:
    _, index = compiled
    rules, types, targets = 2, 6, 4
    # An update, and reductions with and without squares; and the update that regularizes gradients of each type.
    assert len(index) == (rules * types * 3 + 4) * targets


def test_nvidia_code_spills_nothing(compiled) -> None:
    folder, index = compiled
    for name in (name for name, entry in index.items() if entry["target"].startswith("sm")):
        command = [tool("cuobjdump"), "-res-usage", folder / f"{name}.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        used = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
        assert used.keys() == {"REG", "STACK", "LOCAL"}, name
        assert (used["STACK"], used["LOCAL"]) == (0, 0), f"{name}: {used}"


def test_nvidia_code_has_wide_accesses_where_addresses_are_aligned_and_only_there(compiled) -> None:
    """Of elements, whose accesses say what shall stay in the cache. Single ones are of the unaligned, and of tails."""
    folder, index = compiled
    for name, entry in index.items():
        if not entry["target"].startswith("sm"):
            continue
        sizes = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
        parameter, gradient = (sizes[t] for t in entry["types"].split("-"))
        of_update = [parameter] * {"adamw": 4, "adan": 5, "regularize": 0}[entry["rule"]]
        tensors = {"ld": [gradient, *(of_update if entry["kernel"] == "update" else [])]}
        tensors["st"] = [gradient] if entry["rule"] == "regularize" else tensors["ld"][1:]
        elements = 4 if parameter == 8 else 8  # of a thread at a time
        if entry["rule"] == "regularize":
            elements *= agr_cuda.triton_gradients.BLOCKS
        assembly = (folder / f"{name}.s").read_text()
        assert not re.search(r"(atom|red)\.\S*\.f(16|32|64)", assembly), name
        for kind, sizes_there in tensors.items():
            found = re.findall(rf"{kind}\.global\S*evict_\S*?\.(v\d\.)?b(\d+)", assembly)
            wide = sum(bool(vector) for vector, _ in found)
            assert wide == sum(elements * size // 16 for size in sizes_there), f"{name}: {wide} wide {kind}"
            # 512 at a time in an update; in a sum as many as of aligned ones, which makes the same of them.
            single = (4 if entry["kernel"] == "update" else 2 * elements) * len(sizes_there)
            assert len(found) - wide == single, f"{name}: {len(found) - wide} {kind} of one element"


def test_amd_code_has_wide_accesses_and_no_spills(compiled) -> None:
    folder, index = compiled
    for name, entry in index.items():
        if entry["target"] != "gfx942":
            continue
        assembly = (folder / f"{name}.s").read_text()
        spilled = re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s*(\d+)", assembly)
        assert len(spilled) == 2, name
        assert spilled == ["0", "0"], f"{name}: {spilled}"
        if "16" not in name:  # of 16-bit elements a thread has 8 bytes
            assert re.search(r"(global|buffer)_load_dwordx4", assembly), name


@pytest.fixture(scope="module")
def counted() -> dict:
    return json.loads(say(ROOT / "tests/triton_rehearsal/count_compilations.py"))


def test_numbers_never_compile_anything_again(counted) -> None:
    """50 steps of a schedule, for models of any size: two kernels for each rule and types.

    Those that regularize gradients in place share the first with AdamW.
    """
    assert counted["compilations"] == [2, 2, 2, 2]
    assert counted["compilations_to_regularize"] == [1, 1]


def test_a_step_is_two_launches(counted) -> None:
    launches = ["reduce_step", "update_step"]
    assert counted["steps"]["same"] == {"launches": launches, "operations": []}
    assert counted["steps"]["new"] == {"launches": launches, "operations": ["aten.copy_.default"]}


def test_regularizing_gradients_is_two_launches(counted) -> None:
    launches = ["reduce_step", "regularize_step"]
    assert counted["regularized"]["same"] == {"launches": launches, "operations": []}
    assert counted["regularized"]["new"] == {"launches": launches, "operations": ["aten.copy_.default"]}


# Sums.


@pytest.mark.parametrize("chunk", [16, 64])
@pytest.mark.parametrize("sums", [8, 1024])
def test_sums_of_many_chunks(chunk: int, sums: int, method: Method, monkeypatch, generator) -> None:
    """A tensor's sum is that of its chunks, however many, and however many of those are added at once."""
    limits = {"BLOCK": 16, "REST": 8, "CHUNK": chunk, "MAX_CHUNKS": 1 << 20, "SUMS": sums, "TENSORS": 2}
    for name, value in limits.items():
        monkeypatch.setattr(agr_cuda.triton, name, value)
    params = parameters(generator, [(7,), (401,), (0,), (16, 5), (64,)], device=DEVICE)
    optimizer = method.ours(params, backend="triton", max_grad_norm=0.5)
    follow(method, optimizer, generator, 0.5, steps=2)


def test_large_tensors_have_larger_chunks() -> None:
    of = agr_cuda.triton.chunk_elements
    assert of(0) == of(1000) == of(16_384 * 2048) == 16_384
    for elements in (16_384 * 2048 + 1, 10**9, 10**12):
        assert of(elements) % 1024 == 0
        assert 1900 < -(-elements // of(elements)) <= 2048


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_types_that_other_tests_leave_out(dtype: torch.dtype, method: Method, generator) -> None:
    params = parameters(generator, [(7,), (), (64, 33), (1009,)], dtype, DEVICE)
    optimizer = method.ours(params, backend="triton", lr=1e-2, eps=1e-3, max_grad_norm=2.0)
    follow(method, optimizer, generator, 2.0, steps=6)


def test_addresses_beyond_2_to_the_63() -> None:
    """Intel's GPUs have them; a table's words have signs."""
    for address in (0, 1, 2**63 - 1, 2**63, 0xFF00_0000_0000_0010, 2**64 - 1):
        found = agr_cuda.triton._address(SimpleNamespace(data_ptr=lambda address=address: address))
        assert torch.tensor([found], dtype=torch.int64).item() == found
        assert found % 2**64 == address


def test_graphs_send_from_memory_of_their_own(monkeypatch, generator) -> None:
    """A captured copy reads it each time it is replayed. What steps in between send is not kept."""
    launch_class = agr_cuda.triton.TritonLaunch
    made: list[weakref.ref] = []

    def pinned(self):
        memory = torch.empty(self._step_buffer.shape, dtype=torch.int64)
        made.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr(launch_class, "_new_pinned_buffer", pinned)
    optimizer = agr_cuda.AdamW(parameters(generator, [(5,), (31,)], device=DEVICE), backend="triton", capturable=True)
    run(optimizer, 1)
    (launch,) = optimizer._plan.launches
    launch._uses_pinned_memory = True
    run(optimizer, 1)
    spare = len(launch._spare_buffers)
    assert spare == agr_cuda.triton.SPARE_BUFFERS
    for captures in (1, 2):
        monkeypatch.setattr(launch_class, "capturing", lambda self: True)
        before = len(made)
        run(optimizer, 1)
        assert len(made) == before, "memory is pinned within a capture"
        monkeypatch.setattr(launch_class, "capturing", lambda self: False)
        run(optimizer, 3)
        assert len(launch._spare_buffers) == spare
        sent = {id(memory): memory.clone() for memory in launch._graph_buffers}
        assert len(sent) == captures
        assert sent.keys() <= optimizer._graph_tensors.keys()
        run(optimizer, 1)
        assert all(torch.equal(memory, sent[id(memory)]) for memory in launch._graph_buffers)
    assert sum(reference() is not None for reference in made) == spare + 2


def test_groups_count_their_steps_on_the_device_where_a_graph_needs_it(generator) -> None:
    groups = [{"params": parameters(generator, [(5,), (31,)], device=DEVICE), "capturable": k > 0} for k in range(3)]
    optimizer = agr_cuda.Adan(groups, backend="triton")
    run(optimizer, 3)
    assert [torch.is_tensor(group["step"]) for group in optimizer.param_groups] == [False, True, True]
    assert [int(group["step"]) for group in optimizer.param_groups] == [3, 3, 3]
    assert [group["step"] for group in optimizer.state_dict()["param_groups"]] == [3, 3, 3]
