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
import triton
import triton.language as tl
from agr_cuda.triton_kernels.quantization import decoded
from conftest import device_of
from helpers import ADAMW, ADAN, Method, follow, parameters, run, same_bits
from test_device_code import tool
from torch import Tensor

import agr_cuda
import agr_cuda.precision
import agr_cuda.triton
import agr_cuda.triton_gradients
from agr_cuda.quantization import code_values, in_memory_order, quantize
from agr_cuda.rounding import random_bits, round_stochastically

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
    rules, types, targets = 2, 7, 4
    # An update, and reductions with and without squares; and the update that regularizes gradients of each type.
    # And updates of other precisions, for some of the targets.
    assert len(index) == (rules * types * 3 + 4) * targets + rules * 6 * 2


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
        size = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}
        parameter, gradient, state, *options = entry["types"].split("-")
        updated = 4 if "master" in options else size[parameter]
        of_update = [updated, *[size[state]] * {"adamw": 3, "adan": 4, "regularize": 0}[entry["rule"]]]
        tensors = {"ld": [size[gradient], *(of_update if entry["kernel"] == "update" else [])]}
        tensors["st"] = tensors["ld"][1:] + ([size[parameter]] if "master" in options else [])
        if entry["rule"] == "regularize":
            tensors = {"ld": [size[gradient]], "st": [size[gradient]]}
        elements = 4 if size[parameter] == 8 else 8  # of a thread at a time
        if entry["rule"] == "regularize":
            elements *= agr_cuda.triton_gradients.BLOCKS
        assembly = (folder / f"{name}.s").read_text()
        assert not re.search(r"(atom|red)\.\S*\.f(16|32|64)", assembly), name
        for kind, sizes_there in tensors.items():
            found = re.findall(rf"{kind}\.global\S*evict_\S*?\.(v\d\.)?b(\d+)", assembly)
            wide = sum(bool(vector) for vector, _ in found)
            assert wide == sum(-(-elements * size // 16) for size in sizes_there), f"{name}: {wide} wide {kind}"
            # 512 at a time in an update; in a sum as many as of aligned ones, which makes the same of them.
            single = (4 if entry["kernel"] == "update" else 2 * elements) * len(sizes_there)
            assert len(found) - wide == single, f"{name}: {len(found) - wide} {kind} of one element"


def test_amd_code_has_wide_accesses_and_no_spills(compiled) -> None:
    folder, index = compiled
    for name, entry in index.items():
        if entry["target"] != "gfx942":
            continue
        assembly = (folder / f"{name}.s").read_text()
        spilled = dict(re.findall(r"\.([sv])gpr_spill_count:\s*(\d+)", assembly))
        # Masks and constants that are too many for scalar registers, with codes, go to lanes of vector registers.
        spilled["s"] = "0" if "uint8" in entry["types"] else spilled["s"]
        assert spilled == {"s": "0", "v": "0"}, f"{name}: {spilled}"
        assert re.search(r"\.private_segment_fixed_size:\s*0\b", assembly), name
        if "16" not in entry["types"]:  # of 16-bit elements a thread has 8 bytes
            assert re.search(r"(global|buffer)_load_dwordx4", assembly), name


@pytest.fixture(scope="module")
def counted() -> dict:
    return json.loads(say(ROOT / "tests/triton_rehearsal/count_compilations.py"))


def test_numbers_never_compile_anything_again(counted) -> None:
    """50 steps of a schedule, for models of any size: two kernels for each rule and types.

    Those that regularize gradients in place, and those of other precisions, share the first with AdamW.
    """
    assert counted["compilations"] == [2, 2, 2, 2]
    assert counted["compilations_to_round"] == 1
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


# Precision. What is stored is what the kernels compute in float32, rounded or quantized by the definition.

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PRECISIONS = [
    (F32, BF16, {}),
    (F32, F32, {"state_dtype": BF16}),
    (F32, BF16, {"state_dtype": BF16, "stochastic_rounding": True}),
    (F32, F32, {"state_dtype": "8bit"}),
    (BF16, BF16, {"stochastic_rounding": True}),
    (BF16, F32, {"stochastic_rounding": True, "state_dtype": F32}),
    (BF16, BF16, {"state_dtype": "8bit"}),
    (BF16, BF16, {"state_dtype": "8bit", "stochastic_rounding": True}),
    (BF16, BF16, {"master_weights": True}),
    (BF16, F32, {"master_weights": True, "state_dtype": "8bit"}),
    (BF16, BF16, {"master_weights": True, "state_dtype": BF16, "stochastic_rounding": True}),
    (F16, F32, {"state_dtype": F32}),
    (F16, F16, {"state_dtype": BF16, "stochastic_rounding": True}),
    (F16, F16, {"state_dtype": "8bit"}),
    (F16, F32, {"master_weights": True}),
]
SEED = 2**40 + 12_345
CASES = [
    ("adamw", ADAMW, {"weight_decay": 0.1, "max_grad_norm": 1.0}),
    ("amsgrad", ADAMW, {"amsgrad": True, "maximize": True}),
    ("adan", ADAN, {"weight_decay": 0.1}),
]


@triton.jit
def decode_all(codes, values, SIGNED: tl.constexpr):
    at = tl.arange(0, 256)
    tl.store(values + at, decoded(tl.load(codes + at), SIGNED))


def kernels_values(signed: bool) -> Tensor:
    """What the kernels take each code for."""
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    values = torch.zeros(256, device=DEVICE)
    decode_all[1,](codes, values, signed)
    return values


def stored_as_numbers(binding, key: str, signed: bool) -> Tensor:
    """An average in float32, as the kernels read it."""
    if key in binding.state:
        return binding.state[key].float()
    value = binding.state[f"{key}_codes"]
    scales = binding.state[f"{key}_scale"].repeat_interleave(256)[: value.numel()]
    numbers = torch.empty_like(value, dtype=F32)
    in_memory_order(numbers).copy_(kernels_values(signed)[in_memory_order(value).long()] * scales)
    return numbers


def assert_stored(x: Tensor, value: Tensor, stochastic: bool, step: int, index: int, array: int) -> None:
    """`x` is the float32 `value`, rounded to its type."""
    if stochastic and x.dtype == BF16:
        places = torch.arange(value.numel(), device=value.device)
        bits = random_bits(places, seed=SEED, step=step, index=index, array=array)
        rounded = round_stochastically(in_memory_order(value.detach()), bits)
    else:
        rounded = in_memory_order(value.detach()).to(x.dtype)
    assert same_bits(in_memory_order(x.detach()), rounded)


def step_beside_float32(optimizer, method: Method, options: dict, step: int) -> None:
    """Make a step, and check what is stored against a step of the same kernels with float32 for everything."""
    params = optimizer.param_groups[0]["params"]
    twins = []
    with torch.no_grad():
        for p in params:
            value = optimizer.state.get(p, {}).get("master_param", p)
            twin = torch.empty_like(p, dtype=F32).copy_(value).requires_grad_()
            twin.grad = torch.empty_like(p, dtype=F32).copy_(p.grad)
            twins.append(twin)
    plain = method.ours(twins, backend="triton", **options)
    bindings = {} if optimizer._plan is None else {b.index: b for b in optimizer._plan.bindings}
    for index, twin in enumerate(twins if bindings else []):
        averages = [spec for spec in bindings[index].specs if spec.role == "average"]
        keys = {spec.key.removesuffix("_codes"): spec.signed for spec in averages}
        state = {key: stored_as_numbers(bindings[index], key, signed).clone() for key, signed in keys.items()}
        plain.state[twin] = state | ({} if method is ADAN else {"step": torch.tensor(float(step - 1))})
    if method is ADAN:
        plain.param_groups[0]["step"] = step - 1
    plain.step()
    optimizer.step()
    for b, twin in zip(optimizer._plan.bindings, twins, strict=True):
        stochastic = b.precision.stochastic
        if b.precision.master:
            assert same_bits(b.state["master_param"], twin)
        assert_stored(b.parameter, twin, stochastic and not b.precision.master, step, b.index, 0)
        for k, spec in enumerate(spec for spec in b.specs if spec.role == "average"):
            if b.precision.quantized:
                key = spec.key.removesuffix("_codes")
                codes, scales = quantize(plain.state[twin][key], spec.signed)
                assert same_bits(b.state[f"{key}_codes"], codes), key
                assert same_bits(b.state[f"{key}_scale"], scales), key
            else:
                assert_stored(b.state[spec.key], plain.state[twin][spec.key], stochastic, step, b.index, k + 1)


def unlike_tensors(generator: torch.Generator, dtype: torch.dtype, sizes=(1, 7, 255, 256, 257, 1500)) -> list[Tensor]:
    """Of these sizes; channels_last; and in the middle of others' memory, where nothing is aligned."""
    made = [torch.randn(size, generator=generator) for size in sizes]
    made.append(torch.randn(2, 6, 9, 5, generator=generator).to(memory_format=torch.channels_last))
    made = [x.to(DEVICE, dtype) for x in made]
    made.append(torch.randn(1101, generator=generator).to(DEVICE, dtype)[1:])
    return [x.requires_grad_() for x in made]


def name_of(precision) -> str:
    parameter, gradient, options = precision
    words = [str(x).removeprefix("torch.") for x in (parameter, gradient, options.get("state_dtype", "own"))]
    return "-".join(words + [name for name in ("master_weights", "stochastic_rounding") if options.get(name)])


@pytest.mark.parametrize(("name", "method", "options"), CASES, ids=[name for name, _, _ in CASES])
@pytest.mark.parametrize("precision", PRECISIONS, ids=name_of)
def test_what_is_stored_is_rounded_from_float32(precision, name, method, options, monkeypatch, generator) -> None:
    monkeypatch.setattr(agr_cuda.precision, "SMALLEST_QUANTIZED", 0)
    parameter, gradient, stored = precision
    params = unlike_tensors(generator, parameter)
    optimizer = method.ours(params, backend="triton", rounding_seed=SEED, **stored, **options)
    for step in (1, 2, 3):
        for p in params:
            p.grad_dtype = gradient
            size = 10.0 ** (-4 * torch.rand(p.shape, generator=generator))
            p.grad = torch.empty_like(p, dtype=gradient).copy_(torch.randn(p.shape, generator=generator) * size)
        step_beside_float32(optimizer, method, options, step)


@pytest.mark.parametrize("size", [4095, 4096, 5000, 70_001])
def test_precision_of_tensors_of_many_blocks(size: int, method: Method, generator) -> None:
    """With the 8 bits of those that are large enough, and float32 of those that are not."""
    (p,) = unlike_tensors(generator, BF16, (size,))[:1]
    stored = {"state_dtype": "8bit", "stochastic_rounding": True, "rounding_seed": SEED}
    optimizer = method.ours([p], backend="triton", **stored)
    for step in (1, 2) if size < 10_000 else (1,):
        p.grad = torch.randn(size, generator=generator).to(DEVICE, BF16)
        step_beside_float32(optimizer, method, {}, step)
    assert ("exp_avg_codes" in optimizer.state[p]) == ("exp_avg" not in optimizer.state[p]) == (size >= 4096)


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_codes_are_read_to_one_unit_in_the_last_place(signed: bool) -> None:
    found, wanted = kernels_values(signed).cpu(), torch.tensor(code_values(signed))
    assert ((found.view(torch.int32) - wanted.view(torch.int32)).abs() <= 1).all()
    for code in (0, 1, 129) if signed else (0, 255):
        assert found[code] == wanted[code]


def test_decay_is_rounded_by_the_definition(generator) -> None:
    """Where all gradients are 0: p (1 - lr wd), in float32, plus the random number of that element and that step."""
    params = unlike_tensors(generator, BF16)
    values = [p.detach().clone() for p in params]
    optimizer = agr_cuda.AdamW(
        params, lr=0.5, weight_decay=0.25, backend="triton", stochastic_rounding=True, rounding_seed=SEED
    )
    for step in (1, 2, 3, 4):
        for index, (p, value) in enumerate(zip(params, values, strict=True)):
            p.grad = torch.zeros_like(p)
            places = torch.arange(p.numel(), device=DEVICE)
            bits = random_bits(places, seed=SEED, step=step, index=index, array=0)
            flat = in_memory_order(value)
            flat.copy_(round_stochastically(flat.float() * 0.875, bits))
        optimizer.step()
        for p, value in zip(params, values, strict=True):
            assert same_bits(p.detach(), value)


@pytest.mark.parametrize("special", [float("inf"), float("nan")])
def test_a_block_of_codes_with_what_is_not_finite_is_nan(special: float, generator) -> None:
    p = torch.randn(5000, generator=generator).to(DEVICE).requires_grad_()
    optimizer = agr_cuda.AdamW([p], backend="triton", agr=False, state_dtype="8bit")
    p.grad = torch.randn(5000, generator=generator).to(DEVICE)
    p.grad[300] = special
    optimizer.step()
    for key in ("exp_avg_scale", "exp_avg_sq_scale"):
        broken = optimizer.state[p][key].isnan()
        assert broken.nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize("stored", [{"master_weights": True, "state_dtype": "8bit"}, {"stochastic_rounding": True}])
def test_a_skipped_step_changes_nothing_of_any_precision(stored: dict, method: Method, generator) -> None:
    p = torch.randn(5000, generator=generator).to(DEVICE, BF16).requires_grad_()
    optimizer = method.ours([p], backend="triton", fused=True, **stored)
    run(optimizer, 2)
    before = {key: x.clone() for key, x in {**optimizer.state[p], "": p.detach()}.items()}
    optimizer.found_inf = torch.ones((), device=DEVICE)
    run(optimizer, 1)
    for key, x in {**optimizer.state[p], "": p.detach()}.items():
        assert same_bits(x, before[key]), key


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
