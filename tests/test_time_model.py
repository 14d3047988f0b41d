"""The time model: what steps take on GPUs in its replay, and the command that prints it."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from functools import cache
from math import inf, prod
from pathlib import Path

import pytest
import torch

from agr_cuda import _C
from bench.__main__ import main
from bench.cache_model.replay import Machine
from bench.cache_model.replay import replay as replay_traffic
from bench.time_model import memory, prediction
from bench.time_model.code import (
    CHANGES,
    IDEAS,
    KERNELS,
    SQUARES_IN_FLOAT32,
    Code,
    changes,
    version_0_1_0,
    words,
)
from bench.time_model.gpu import GPUS, MIB, Gpu
from bench.time_model.prediction import GUESSES, median_outcome, schedule_for
from bench.time_model.replay import Outcome, Replay
from bench.workloads.schedule import Schedule
from bench.workloads.shapes import model_set

SMALL = ("321x64", "200x4096", "7x200000")
NOISE = 1.03  # what chance does to a step's time: when blocks start, and which channels they meet
RULES = ("AdamW", "Adan")


def schedule(gpu: Gpu, code: Code, name: str) -> Schedule:
    return schedule_for(gpu, code, model_set(name), torch.float32 if code.itemsize == 4 else torch.bfloat16)


@pytest.fixture(autouse=True)
def few_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "MOST_REPLAYS", 3)


@cache
def step(name: str, gpu: Gpu = GPUS["h100"], code: Code | None = None, **of_the_gpu: float) -> Outcome:
    code = words("AdamW", 4) if code is None else code
    return median_outcome(replace(gpu, **of_the_gpu), code, schedule(gpu, code, name))


# What is done


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_task_is_done_once_and_each_blocks_in_the_order_of_their_tickets(kernel: str, clips: bool) -> None:
    code = KERNELS[kernel]("AdamW", 4, clips)
    for name in ("7x200000", "2000x100"):
        replayed = Replay(GPUS["h100"], code, schedule(GPUS["h100"], code, name))
        replayed.run()
        assert all(tickets == sorted(tickets) for tickets in replayed.done)
        done = sorted(ticket for tickets in replayed.done for ticket in tickets)
        assert done == list(range(len(replayed.schedule.tasks)))
        assert not any(replayed.waiting.values())


def test_no_update_begins_its_arithmetic_before_its_tensor_is_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, float] = {}
    write = memory.Memory.write
    monkeypatch.setattr(
        memory.Memory, "write", lambda self, now, size: written.setdefault("first", now) and write(self, now, size)
    )
    for make in KERNELS.values():
        for clips in (False, True):
            written.clear()
            code = make("AdamW", 4, clips)
            replayed = Replay(GPUS["h100"], code, schedule(GPUS["h100"], code, "3x3000000"))
            replayed.run()
            assert written["first"] > min(replayed.published.values())
            if clips:
                assert written["first"] > max(replayed.published.values()), "the norm is the last"


def test_a_schedule_that_updates_before_it_reduces_is_refused() -> None:
    with pytest.raises(ValueError, match="smaller ticket"):
        Replay(GPUS["h100"], words("AdamW", 4), Schedule([(10, 4, True)], [("update", 0, 0), ("reduce", 0, 0)], 4096))


def test_chance_depends_on_a_seed_and_decides_little() -> None:
    code = words("AdamW", 4)
    tickets = schedule(GPUS["h100"], code, "7x200000")
    first, again, other = (Replay(GPUS["h100"], code, tickets, seed).run() for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert other.ns == pytest.approx(first.ns, rel=0.1)
    assert median_outcome(GPUS["h100"], code, tickets).ns == pytest.approx(first.ns, rel=0.1)


# What moves


def tables(outcome: Outcome, code: Code) -> float:
    """Bytes that are no tensor's."""
    return outcome.read_bytes + outcome.written_bytes - outcome.elements * code.itemsize * (1 + 2 * code.streams)


@pytest.mark.parametrize("itemsize", [4, 2])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("make", KERNELS.values())
def test_with_a_large_cache_every_tensor_is_read_and_written_once(make: type[Code], rule: str, itemsize: int) -> None:
    code = make(rule, itemsize)
    for name in SMALL:
        found = step(name, code=code, l2_bytes=10_000 * MIB)
        lines = model_set(name).shapes
        assert 0 < tables(found, code) < 64 * (3 * len(lines) + len(schedule(GPUS["h100"], code, name).tasks))
        assert found.written_bytes == pytest.approx(found.elements * itemsize * code.streams)
        assert found.hit_share == 1


@pytest.mark.parametrize("rule", RULES)
def test_without_a_cache_gradients_of_several_chunks_are_read_twice(rule: str) -> None:
    code = words(rule, 4)
    found = step("7x200000", code=code, l2_share=0.0)
    assert found.hit_share == 0
    assert found.total == pytest.approx(4 * (2 + 2 * code.streams), rel=1e-2)
    whole = step("200x4096", code=code, l2_share=0.0)
    assert whole.total == pytest.approx(4 * (1 + 2 * code.streams), rel=1e-2)


def test_the_cache_model_counts_the_same_bytes() -> None:
    gpu, code = replace(GPUS["h100"], l2_share=1.0, l2_copies=1.0, l2_bytes=20 * MIB), version_0_1_0("AdamW", 4)
    tensors = [(prod(shape), 4, True) for shape in model_set("2x9000000").shapes]
    chunk = code.chunk_bytes // 4
    plan = _C.Plan(tensors, chunk_elements=chunk, window_bytes=gpu.l2_bytes // 8, lead_bytes=0)
    time = Replay(gpu, code, Schedule(tensors, plan.tasks, chunk)).run()
    on = Machine(gpu.l2_bytes, gpu.multiprocessors * 4)
    traffic = replay_traffic(tensors, plan.tasks, chunk, code.streams, code.streams, on)
    assert 0.2 < traffic.hit_share < 0.8
    assert time.hit_share == pytest.approx(traffic.hit_share, abs=0.1)
    assert time.total == pytest.approx(traffic.total, rel=0.02)


def test_what_is_asked_for_ahead_takes_the_gradients_place_in_the_cache() -> None:
    code = words("Adan", 4)
    whole = replace(code, prefetched_share=inf)
    everything, some = (step("6x1000000", code=each).hit_share for each in (whole, code))
    assert everything < 0.5 < 0.9 < some


# How long it takes


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", SMALL)
def test_no_step_is_faster_than_its_bytes(name: str, kernel: str) -> None:
    for gpu in GPUS.values():
        found = step(name, gpu, KERNELS[kernel]("AdamW", 4))
        assert found.ns >= (found.read_bytes + found.written_bytes) / gpu.dram
        assert found.ns > gpu.start_ns + gpu.dram_ns


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    "better",
    [
        {"copy": 6000},
        {"dram_ns": 200},
        {"loaded": 1.0},
        {"fence_ns": 0},
        {"issue": 0.5},
        {"l2_bandwidth": 20_000},
        {"fp64_lanes": 1000, "convert_lanes": 1000},
    ],
    ids=lambda better: next(iter(better)),
)
def test_a_better_gpu_is_not_slower(name: str, kernel: str, better: dict[str, float]) -> None:
    code = KERNELS[kernel]("AdamW", 4)
    assert step(name, code=code, **better).ns <= NOISE * step(name, code=code).ns


def test_more_elements_take_longer() -> None:
    times = [step(name).ns for name in ("100x4096", "400x4096", "1600x4096")]
    assert times == sorted(times)
    assert times[2] > 3 * times[1]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_takes_something_away_makes_no_step_slower(name: str, rule: str, change: str) -> None:
    before = version_0_1_0(rule, 4)
    gpu = GPUS["b200"]  # whose cache has room for what is asked for ahead
    assert step(name, gpu, replace(before, **CHANGES[change])).ns <= NOISE * step(name, gpu, before).ns


@pytest.mark.parametrize("gpu", ["h100", "b200", "rtx4090"])
@pytest.mark.parametrize("clips", [False, True])
def test_small_tensors_gain_from_all_changes_together(gpu: str, clips: bool) -> None:
    for name in ("321x64", "321x4096"):
        before, after = (step(name, GPUS[gpu], make("AdamW", 4, clips)).ns for make in (version_0_1_0, words))
        assert after < 0.97 * before


@pytest.mark.parametrize("scarce", ["fp64_lanes", "convert_lanes"])
def test_squares_in_float32_matter_where_there_are_few_float64_units(scarce: str) -> None:
    before = version_0_1_0("AdamW", 2, clips=True)
    after = replace(before, **changes(before)[SQUARES_IN_FLOAT32])
    gpu = replace(GPUS["h100"], **{scarce: 1})
    assert step("7x200000", gpu, after).ns < 0.9 * step("7x200000", gpu, before).ns


def test_clipping_costs_a_second_read_and_a_wait() -> None:
    with_clip, without = (step("200x4096", code=words("AdamW", 4, clips)) for clips in (True, False))
    assert with_clip.second_reads == 200
    assert without.second_reads == 0
    assert with_clip.ns > without.ns
    assert with_clip.waited > 0 == without.waited


# What it is made of


def test_every_change_and_idea_changes_the_code() -> None:
    names = {field.name for field in fields(Code)}
    for rule in RULES:
        before, after = version_0_1_0(rule, 4, clips=True), words(rule, 4, clips=True)
        assert before != after
        asked = [(before, values) for values in changes(before).values()] + [(after, idea) for idea in IDEAS.values()]
        for code, values in asked:
            assert values.keys() <= names
            if rule == "AdamW":
                assert replace(code, **values) != code


def test_every_guess_is_about_a_gpu() -> None:
    names = {field.name for field in fields(Gpu)}
    assert all(guess.keys() <= names for guess in GUESSES.values())


def test_the_memory_fits_published_measurements() -> None:
    fits = memory.stream_fits()
    assert len(fits) == 21
    assert memory.misfit(fits) < 0.06
    assert all(0.8 < fit.modelled / fit.measured < 1.25 for fit in fits)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))
def test_a_copy_makes_the_bandwidth_that_a_gpu_is_said_to_have(gpu: Gpu) -> None:
    assert memory.copy_bandwidth(gpu) == pytest.approx(gpu.copy, rel=0.02)


# The command


def run(folder: Path, *more: str) -> list[dict[str, object]]:
    """The predictions of a run on small sets."""
    assert main(["latency", "--sets", "30x500", "3x20000", "--out", str(folder), "--tag=small", *more]) == 0
    document = json.loads((folder / "latency-float32-small.json").read_text())
    assert document["settings"]["tag"] == "small"
    predictions: list[dict[str, object]] = document["predictions"]
    return predictions


def test_latency_predicts_every_kernel_on_every_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tmp_path, "--gpus", "h100", "rtx4090")
    expected = [
        (gpu, name, rule, kernel)
        for gpu in ("H100 SXM", "RTX 4090")
        for name in ("30x500", "3x20000")
        for rule in RULES
        for kernel in KERNELS
    ]
    assert [(row["gpu"], row["set"], row["rule"], row["kernel"]) for row in found] == expected
    assert all(0 < row["share_of_copy_with_launch"] < row["share_of_copy"] for row in found)
    out = capsys.readouterr().out
    assert "30 tensors of 500" in out
    assert "words" in out


def test_changes_are_shown_each_alone_and_all_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tmp_path, "--gpus=h200", "--rules=Adan", "--changes", "--clip")
    named = ["as it is", *CHANGES, SQUARES_IN_FLOAT32, "as it is", *IDEAS]
    assert [row["variant"] for row in found] == 2 * named
    assert f"{100 * (found[1]['ns'] / found[0]['ns'] - 1):+.1f}%" in capsys.readouterr().out


def test_sensitivity_shows_every_guess(tmp_path: Path) -> None:
    found = run(tmp_path, "--gpus=h100", "--rules=AdamW", "--sensitivity", "--kernels=words")
    assert [row["variant"] for row in found] == 2 * ["as it is", *GUESSES]
    assert {row["kernel"] for row in found} == {"words"}


def test_the_memory_is_checked_without_writing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["latency", "--check-memory", "--out", str(tmp_path)]) == 0
    assert "triad" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
