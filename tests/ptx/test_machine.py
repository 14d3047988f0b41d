"""The machine that executes PTX: what it computes, which values it lets loads return, and what it objects to."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import compiled
import numpy as np
import pytest


def kernel(body: str, threads: int = 32, shared: int = 64, buffers: int = 4) -> str:
    """A kernel in PTX. The addresses of its buffers are in %a0, %a1, ...; %block and %thread are its place."""
    loads = "\n".join(f"ld.param.u64 %a{k}, [p+{8 * k}];" for k in range(buffers))
    return f"""
        .version 8.5
        .target sm_90
        .entry test(
            .param .align 8 .b8 p[{8 * buffers}]
        )
        .maxntid {threads}, 1, 1
        {{
        .reg .pred %p<8>;
        .reg .b16 %rs<8>;
        .reg .b32 %r<8>;
        .reg .b32 %block;
        .reg .b32 %thread;
        .reg .b64 %rd<8>;
        .reg .b64 %a<4>;
        .reg .f32 %f<8>;
        .reg .f64 %d<8>;
        .shared .align 16 .b8 memory[{shared}];
        {loads}
        mov.u32 %block, %ctaid.x;
        mov.u32 %thread, %tid.x;
        {body}
        ret;
        }}
    """


def run(text: str, *buffers: np.ndarray, blocks: int = 1, seed: int = 1, in_place: bool = False) -> None:
    compiled.launcher().run(text, blocks, seed, list(buffers), in_place)


def words(count: int) -> np.ndarray:
    return np.zeros(count, np.uint32)


# What a thread of another block may read. Each test runs many interleavings, and collects what has come out.


def outcomes(body: str, seeds: int = 300) -> set[int]:
    """Block 0 and block 1 share the words of %a0; block 1 leaves what it found in the first word of %a1."""
    text, found = kernel(body, buffers=2), set()
    for seed in range(seeds):
        shared, out = np.zeros(16, np.uint64), words(4)
        run(text, shared, out, blocks=2, seed=seed)
        found.add(int(out[0]))
    return found


def message_passing(data: str, fence: str, flag: str, seen: str, fenced: str, read: str) -> str:
    """Block 0 writes 1 to a word and then to a flag; block 1 waits for the flag and reads the word."""
    return f"""
        setp.ne.u32 %p0, %thread, 0;
        @%p0 bra $done;
        setp.eq.u32 %p1, %block, 1;
        @%p1 bra $reader;
        mov.b32 %r1, 1;
        st{data}.global.u32 [%a0], %r1;
        {fence}
        {flag if "%" in flag else f"st{flag}.global.u32 [%a0+64], %r1;"}
        bra $done;
        $reader:
        ld{seen}.global.u32 %r1, [%a0+64];
        setp.eq.u32 %p2, %r1, 0;
        @%p2 bra $reader;
        {fenced}
        ld{read}.global.u32 %r2, [%a0];
        st.global.u32 [%a1], %r2;
        $done:
    """


RELAXED, RELEASE, ACQUIRE, FENCE = ".relaxed.gpu", ".release.gpu", ".acquire.gpu", "fence.acq_rel.gpu;"
RACE = "race"


def atom(order: str) -> str:
    return f"atom.add.{order}.gpu.global.u32 %r2, [%a0+64], 1;"


@pytest.mark.parametrize(
    ("data", "fence", "flag", "seen", "fenced", "read", "expected"),
    [
        # A flag that is released and acquired shows what was written before it.
        (RELAXED, "", RELEASE, ACQUIRE, "", RELAXED, {1}),
        ("", "", RELEASE, ACQUIRE, "", "", {1}),
        (RELAXED, "", atom("release"), ACQUIRE, "", RELAXED, {1}),
        ("", "", atom("acq_rel"), ACQUIRE, "", "", {1}),
        # Fences do the same.
        (RELAXED, FENCE, RELAXED, RELAXED, FENCE, RELAXED, {1}),
        ("", FENCE, RELAXED, RELAXED, FENCE, "", {1}),
        ("", FENCE, atom("relaxed"), RELAXED, FENCE, "", {1}),
        (RELAXED, FENCE, RELAXED, ACQUIRE, "", RELAXED, {1}),
        # Where either half is missing, the word may be seen after the flag.
        (RELAXED, "", RELAXED, RELAXED, "", RELAXED, {0, 1}),
        (RELAXED, "", RELEASE, RELAXED, "", RELAXED, {0, 1}),
        (RELAXED, "", RELAXED, ACQUIRE, "", RELAXED, {0, 1}),
        (RELAXED, FENCE, RELAXED, RELAXED, "", RELAXED, {0, 1}),
        (RELAXED, "", RELAXED, RELAXED, FENCE, RELAXED, {0, 1}),
        (RELAXED, "", atom("relaxed"), ACQUIRE, "", RELAXED, {0, 1}),
        (RELAXED, "", atom("acquire"), ACQUIRE, "", RELAXED, {0, 1}),
        # Weak accesses without an order are a race, and so are those of which one is weak.
        ("", "", RELAXED, ACQUIRE, "", "", RACE),
        ("", "", RELEASE, RELAXED, "", "", RACE),
        ("", "", atom("acquire"), ACQUIRE, "", "", RACE),
        ("", FENCE, RELAXED, RELAXED, "", "", RACE),
        (RELAXED, "", RELAXED, RELAXED, "", "", RACE),
        ("", "", RELAXED, RELAXED, "", RELAXED, RACE),
    ],
)
def test_message_passing(
    data: str, fence: str, flag: str, seen: str, fenced: str, read: str, expected: set[int] | str
) -> None:
    body = message_passing(data, fence, flag, seen, fenced, read)
    if expected == RACE:
        with pytest.raises(RuntimeError, match="a race in buffer 0"):
            outcomes(body)
    else:
        assert outcomes(body) == expected


def test_a_release_shows_what_a_barrier_has_shown_to_its_thread() -> None:
    """Thread 1 writes, thread 0 releases after a barrier, as the sums of a block's warps are."""
    body = f"""
        setp.eq.u32 %p1, %block, 1;
        @%p1 bra $reader;
        setp.ne.u32 %p0, %thread, 1;
        mov.b32 %r1, 1;
        @!%p0 st.relaxed.gpu.global.u32 [%a0], %r1;
        bar.sync 0;
        setp.ne.u32 %p0, %thread, 0;
        @!%p0 st.release.gpu.global.u32 [%a0+64], %r1;
        bra $done;
        $reader:
        setp.ne.u32 %p0, %thread, 0;
        @%p0 bra $done;
        $again:
        ld{ACQUIRE}.global.u32 %r1, [%a0+64];
        setp.eq.u32 %p2, %r1, 0;
        @%p2 bra $again;
        ld.relaxed.gpu.global.u32 %r2, [%a0];
        st.global.u32 [%a1], %r2;
        $done:
    """
    assert outcomes(body) == {1}


@pytest.mark.parametrize(("tags", "expected"), [("both", {7}), ("first", {0, 7}), ("second", {7}), ("none", {0, 7})])
def test_elements_of_a_vector_become_visible_separately(tags: str, expected: set[int]) -> None:
    """Two words that each have a tag in their upper half. The reader takes the second's data and should look at its
    tag; that of the first says nothing of it."""
    check = {
        "both": "and.b32 %r3, %r1, %r2;",
        "first": "mov.u32 %r3, %r1;",
        "second": "mov.u32 %r3, %r2;",
        "none": "mov.u32 %r3, 1;",
    }
    body = f"""
        setp.ne.u32 %p0, %thread, 0;
        @%p0 bra $done;
        setp.eq.u32 %p1, %block, 1;
        @%p1 bra $reader;
        mov.b64 %rd1, 4294967303;
        st.relaxed.gpu.global.v2.u64 [%a0], {{%rd1, %rd1}};
        bra $done;
        $reader:
        ld.relaxed.gpu.global.v2.u64 {{%rd1, %rd2}}, [%a0];
        mov.b64 {{_, %r1}}, %rd1;
        mov.b64 {{%r4, %r2}}, %rd2;
        {check[tags]}
        setp.eq.u32 %p2, %r3, 0;
        @%p2 bra $reader;
        st.global.u32 [%a1], %r4;
        $done:
    """
    assert outcomes(body) == expected


def test_a_word_is_never_seen_to_go_back() -> None:
    """Block 0 writes 1, 2, 3; what block 1 reads in turn does not decrease; block 0 sees its own stores."""
    body = """
        setp.ne.u32 %p0, %thread, 0;
        @%p0 bra $done;
        setp.eq.u32 %p1, %block, 1;
        @%p1 bra $reader;
        mov.b32 %r1, 1;
        $write:
        st.relaxed.gpu.global.u32 [%a0], %r1;
        ld.relaxed.gpu.global.u32 %r2, [%a0];
        setp.ne.u32 %p2, %r1, %r2;
        @%p2 st.global.u32 [%a1], %r1;
        add.u32 %r1, %r1, 1;
        setp.lt.u32 %p2, %r1, 4;
        @%p2 bra $write;
        bra $done;
        $reader:
        mov.b32 %r3, 0;
        $again:
        ld.relaxed.gpu.global.u32 %r2, [%a0];
        setp.lt.u32 %p2, %r2, %r3;
        @%p2 st.global.u32 [%a1], 9;
        mov.u32 %r3, %r2;
        setp.lt.u32 %p2, %r3, 3;
        @%p2 bra $again;
        $done:
    """
    assert outcomes(body) == {0}


@pytest.mark.parametrize(("waits", "in_place"), [(True, True), (True, False), (False, True)])
def test_what_is_changed_in_place_must_have_been_read(waits: bool, in_place: bool) -> None:
    """Block 0 reads a word, and passes on what it has read; block 1, which has waited for that, changes the word."""
    body = f"""
        setp.ne.u32 %p0, %thread, 0;
        @%p0 bra $done;
        setp.eq.u32 %p1, %block, 1;
        @%p1 bra $writer;
        ld.global.u32 %r1, [%a0];
        add.u32 %r1, %r1, 1;
        st.relaxed.gpu.global.u32 [%a0+64], %r1;
        bra $done;
        $writer:
        ld.relaxed.gpu.global.u32 %r1, [%a0+64];
        setp.eq.u32 %p2, %r1, {0 if waits else 99};
        @%p2 bra $writer;
        st.global.u32 [%a0], 5;
        $done:
    """
    memory = np.zeros(16, np.uint64)

    def run_all() -> None:
        for seed in range(50):
            memory[:] = 0
            run(kernel(body, buffers=1), memory, blocks=2, seed=seed, in_place=in_place)

    if waits and in_place:
        run_all()
    else:
        with pytest.raises(RuntimeError, match="a race in buffer 0"):
            run_all()


def test_atomic_operations_lose_nothing() -> None:
    body = """
        atom.add.relaxed.gpu.global.u32 %r1, [%a0], 1;
        atom.global.inc.u32 %r1, [%a0+4], 9;
        red.relaxed.gpu.global.add.u64 [%a0+8], 4294967296;
    """
    counters = words(4)
    run(kernel(body, threads=64), counters, blocks=3)
    assert counters.tolist() == [192, 192 % 10, 0, 192]


# What is wrong with a kernel, and is said.

WRONG = {
    "a race between threads": ("st.global.u32 [%a0], %thread;", "a race in buffer 0"),
    "a race in shared memory": (
        "st.shared.u32 [memory], %thread; ld.shared.u32 %r1, [memory];",
        "a race in shared memory",
    ),
    "no barrier between write and read": (
        """
        mul.lo.u32 %r1, %thread, 4;
        mov.b32 %r2, memory;
        add.u32 %r2, %r2, %r1;
        st.shared.u32 [%r2], %r1;
        ld.shared.u32 %r3, [memory];
        """,
        "a race in shared memory",
    ),
    "out of bounds": ("ld.global.u32 %r1, [%a0+16];", "an access outside of all memory: 4 bytes .*0 after buffer 0"),
    "partly out of bounds": ("ld.global.v2.u64 {%rd1, %rd2}, [%a0+8];", "outside of all memory|misaligned"),
    "outside of the parameters": ("ld.param.u64 %rd1, [p+32];", "outside of the parameters"),
    "outside of shared memory": ("ld.shared.u32 %r1, [memory+4096];", "outside of shared memory"),
    "misaligned": ("ld.global.u32 %r1, [%a0+2];", "a misaligned access"),
    "read only": ("st.global.u32 [%a1], 1;", "a write to buffer 1, which is only read"),
    "a register that was never written is stored": ("st.global.u32 [%a0], %r1;", "a store of what was never written"),
    "shared memory that was never written decides": (
        "ld.shared.u32 %r1, [memory]; setp.eq.u32 %p1, %r1, 0; @%p1 bra $x; $x:",
        "a decision by what was never written",
    ),
    "an address that was never written": ("ld.global.u32 %r1, [%rd1];", "an operand that was never written"),
    "some of a block at a barrier": (
        "setp.lt.u32 %p1, %thread, 32; @%p1 bra $x; bar.sync 0; $x:",
        "an exit of threads that a barrier waits for|nobody can go on",
    ),
    "some of a warp at a barrier": (
        "setp.lt.u32 %p1, %thread, 7; @%p1 bra $x; bar.warp.sync -1; $x:",
        "after lanes have left|nobody can go on",
    ),
    "different barriers": (
        "setp.lt.u32 %p1, %thread, 32; @%p1 bra $x; bar.sync 0; bra $y; $x: bar.sync 0; $y:",
        "warps at different barriers",
    ),
    "a mask that leaves lanes out": ("bar.warp.sync 1;", "a mask that leaves lanes out"),
    "a vote by what was never written": ("vote.sync.any.pred %p1, %p2, -1;", "a vote by what was never written"),
    "no end": ("$x: bra $x;", "a launch that does not end"),
    "accesses of different sizes": (
        "ld.relaxed.gpu.global.u32 %r1, [%a0]; ld.relaxed.gpu.global.u64 %rd1, [%a0];",
        "strong accesses of different sizes",
    ),
    "no cache policy": (
        "mov.b64 %rd1, 7; ld.global.L2::cache_hint.u32 %r1, [%a0], %rd1;",
        "a cache policy that is none",
    ),
    "a misaligned bulk prefetch": ("cp.async.bulk.prefetch.L2.global [%a0], 8;", "a misaligned prefetch"),
    "a prefetch out of bounds": ("cp.async.bulk.prefetch.L2.global [%a0], 32;", "outside of all memory: 32 bytes"),
    "an unknown instruction": ("add.sat.s32 %r1, %thread, 1;", "unknown instruction `add.sat.s32 %r1, %thread, 1`"),
    "an unknown modifier": ("ld.volatile.global.u32 %r1, [%a0];", "unknown instruction `ld.volatile"),
    "an unknown operand": ("mov.u32 %r1, %laneid;", "unknown operand %laneid"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name: str) -> None:
    body, message = WRONG[name]
    body = body.replace("; ", ";\n").replace(": ", ":\n")
    read_only = words(4)
    read_only.flags.writeable = False
    with pytest.raises(RuntimeError, match=message):
        run(kernel(body, threads=64, shared=256), words(4), read_only)


def test_what_is_right_is_let_be() -> None:
    body = """
        mul.lo.u32 %r1, %thread, 4;
        cvt.u64.u32 %rd1, %r1;
        mov.b32 %r2, memory;
        add.u32 %r2, %r2, %r1;
        st.shared.u32 [%r2], %r1;
        bar.sync 0;
        ld.shared.u32 %r3, [memory+4];
        add.u64 %rd2, %a0, %rd1;
        createpolicy.fractional.L2::evict_last.b64 %rd3, 1.0;
        prefetch.global.L2 [%rd2];
        prefetch.global.L2::evict_last [%rd2];
        cp.async.bulk.prefetch.L2.global [%a0], 256;
        cp.async.bulk.prefetch.L2.global.L2::cache_hint [%a0+16], 16, %rd3;
        st.global.L2::cache_hint.u32 [%rd2], %r3, %rd3;
        nanosleep.u32 40;
        fence.acq_rel.gpu;
    """
    out = words(64)
    run(kernel(body, threads=64, shared=256), out)
    assert out.tolist() == [4] * 64


# What it computes.


def computed(body: str, inputs: Sequence[np.ndarray], result: str, size: int) -> np.ndarray:
    """The register `result`, of `size` bytes, in each of 32 threads; inputs are in %r0, %r1, ... or %rd0, %rd1, ..."""
    loads = []
    for k, values in enumerate(inputs):
        register = f"%rd{k}" if values.itemsize == 8 else f"%r{k}"
        loads.append(f"mad.lo.u32 %r7, %thread, {values.itemsize}, 0;")
        loads.append(f"cvt.u64.u32 %rd7, %r7; add.u64 %rd7, %a{k + 1}, %rd7;")
        loads.append(f"ld.global.b{8 * values.itemsize} {register}, [%rd7];")
    store = f"""
        mul.lo.u32 %r7, %thread, {size};
        cvt.u64.u32 %rd7, %r7; add.u64 %rd7, %a0, %rd7;
        st.global.b{8 * size} [%rd7], {result};
    """
    out = np.zeros(32 * size, np.uint8)
    run(kernel("\n".join([*loads, body, store])), out, *inputs)
    return out


def floats(dtype: type) -> np.ndarray:
    special = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-40, 3.5]
    return np.array(special, dtype)


@pytest.mark.parametrize("bits", [32, 64])
def test_the_smaller_and_the_larger_number(bits: int) -> None:
    """A NaN gives the other operand, and -0 is less than 0."""
    dtype, unsigned = (np.float32, np.uint32) if bits == 32 else (np.float64, np.uint64)
    every = np.array(list(product(floats(dtype), repeat=2)), dtype)[:64]
    register, size = ("%r", 4) if bits == 32 else ("%rd", 8)
    for half in (every[:32], every[32:]):
        a, b = half[:, 0].copy(), half[:, 1].copy()
        for name, choose in (("min", np.fmin), ("max", np.fmax)):
            body = f"{name}.f{bits} {register}2, {register}0, {register}1;"
            found = computed(body, [a.view(unsigned), b.view(unsigned)], f"{register}2", size).view(dtype)
            expected = choose(a, b)
            both_zero = (a == 0) & (b == 0)
            sign = np.signbit(a) | np.signbit(b) if name == "min" else np.signbit(a) & np.signbit(b)
            expected[both_zero] = np.where(sign, -0.0, 0.0)[both_zero]
            np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(np.signbit(found[found == 0]), np.signbit(expected[expected == 0]))


def test_conversions_of_16_bits() -> None:
    """Of float16 numbers of every size, and of the ties between each and the next, and of what is beside those."""
    for first in range(0, 1 << 16, 509):
        halves = (np.arange(first, first + 32) % (1 << 16)).astype(np.uint16)
        wide = halves.view(np.float16).astype(np.float32)
        found = computed("cvt.u16.u32 %rs0, %r0; cvt.f32.f16 %f0, %rs0;", [halves.astype(np.uint32)], "%f0", 4)
        np.testing.assert_array_equal(found.view(np.float32), wide)
        with np.errstate(all="ignore"):
            following = np.nextafter(halves.view(np.float16), np.float16(np.inf)).astype(np.float32)
            tie = ((wide.astype(np.float64) + following) / 2).astype(np.float32)
            for x in (wide, tie, np.nextafter(tie, np.float32(-np.inf)), np.nextafter(tie, np.float32(np.inf))):
                body = "mov.b32 %f0, %r0; cvt.rn.f16.f32 %rs0, %f0; cvt.u32.u16 %r1, %rs0;"
                found = computed(body, [x.view(np.uint32)], "%r1", 4)
                expected = np.where(np.isnan(x), 0x7FFF, x.astype(np.float16).view(np.uint16))
                np.testing.assert_array_equal(found.view(np.uint32), expected)


@pytest.mark.parametrize("mode", ["idx", "up", "down", "bfly"])
def test_shuffles(mode: str) -> None:
    lane = np.arange(32, dtype=np.uint32)
    clamp = 0 if mode == "up" else 31
    for distance in (0, 1, 5, 16, 31):
        source = {"idx": lane * 0 + distance, "up": lane - distance, "down": lane + distance, "bfly": lane ^ distance}
        from_lane = source[mode].astype(np.int32)
        expected = np.where((from_lane >= 0) & (from_lane < 32), from_lane, lane)
        found = computed(f"shfl.sync.{mode}.b32 %r1|%p1, %thread, {distance}, {clamp}, -1;", [], "%r1", 4)
        np.testing.assert_array_equal(found.view(np.uint32), expected)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("setp.eq.u32 %p1, %thread, 5; vote.sync.any.pred %p2, %p1, -1; selp.b32 %r1, 1, 0, %p2;", 1),
        ("setp.eq.u32 %p1, %thread, 99; vote.sync.any.pred %p2, %p1, -1; selp.b32 %r1, 1, 0, %p2;", 0),
        ("setp.ne.u32 %p1, %thread, 5; vote.sync.all.pred %p2, %p1, -1; selp.b32 %r1, 1, 0, %p2;", 0),
        ("setp.ne.u32 %p1, %thread, 99; vote.sync.all.pred %p2, %p1, -1; selp.b32 %r1, 1, 0, %p2;", 1),
        ("prmt.b32 %r1, 0x33221100, 0x77665544, 0x9735U;", 0x00773355),
        ("bfe.u32 %r1, 0xabcd1234, 8, 12;", 0xD12),
        ("bfi.b32 %r1, 0xff, 0x12345678, 4, 8;", 0x12345FF8),
        ("mov.b32 %r1, {%rs1, %rs2};", 0x00020001),
        ("cvta.param.u64 %rd1, p; ld.u64 %rd2, [%rd1+8]; sub.u64 %rd3, %rd2, %a1; cvt.u32.u64 %r1, %rd3;", 0),
        ("mov.b64 %rd1, p; ld.param.u64 %rd2, [%rd1+8]; sub.u64 %rd3, %rd2, %a1; cvt.u32.u64 %r1, %rd3;", 0),
        ("shr.s32 %r1, -8, 1;", 0xFFFFFFFC),
        ("shr.u32 %r1, -8, 99;", 0),
        ("cvt.rzi.u64.f64 %rd1, 0dBFF0000000000000; cvt.u32.u64 %r1, %rd1;", 0),
    ],
)
def test_instructions(body: str, expected: int) -> None:
    body = "mov.b16 %rs1, 1; mov.b16 %rs2, 2; " + body
    assert set(computed(body.replace("; ", ";\n"), [], "%r1", 4).view(np.uint32).tolist()) == {expected}
