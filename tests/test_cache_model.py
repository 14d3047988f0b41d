"""The cache model: what a schedule costs in DRAM's bytes, and the command that prints it."""

from __future__ import annotations

import json
from math import inf
from pathlib import Path

import pytest

from agr_cuda import _C
from bench.__main__ import main
from bench.cache_model.cache import EVICT_FIRST, EVICT_LAST, NORMAL, Cache
from bench.cache_model.replay import Machine, Traffic, piece_bytes, replay
from bench.workloads import shapes
from bench.workloads.formats import FORMATS
from bench.workloads.schedule import Task, Tensor

CHUNK = 1024  # elements
CHUNK_BYTES = 4 * CHUNK
BLOCKS = 8
ADAMW, ADAN = 3, 5  # tensors besides the gradient that an UPDATE reads and writes
SEVERAL_CHUNKS: list[Tensor] = [(40 * CHUNK, 4, True), (7 * CHUNK + 3, 4, True), (25 * CHUNK, 4, True)]


def tasks(tensors: list[Tensor], window: int = 20 * CHUNK_BYTES, lead: int = 0) -> list[Task]:
    return _C.Plan(tensors, chunk_elements=CHUNK, window_bytes=window, lead_bytes=lead).tasks


def traffic(
    tensors: list[Tensor],
    cache_bytes: float,
    streams: int = ADAMW,
    order: list[Task] | None = None,
    most_pieces: int = 100_000,
    in_place: bool = False,
    **more: int,
) -> Traffic:
    machine = Machine(cache_bytes, BLOCKS, **more)
    return replay(
        tensors, tasks(tensors) if order is None else order, CHUNK, streams, streams, machine, most_pieces, in_place
    )


# The cache


def test_lines_leave_by_priority_and_then_by_age() -> None:
    cache = Cache(4)
    for key, priority in enumerate((EVICT_LAST, NORMAL, EVICT_FIRST, NORMAL)):
        assert not cache.read(key, 1, priority)
    for newcomer in range(4, 8):
        cache.read(newcomer, 1, EVICT_LAST)
    gone = [2, 1, 3, 0]  # the first evicted first
    for count, key in enumerate(gone, 1):
        again = Cache(4)
        for old, priority in enumerate((EVICT_LAST, NORMAL, EVICT_FIRST, NORMAL)):
            again.read(old, 1, priority)
        for newcomer in range(4, 4 + count):
            again.read(newcomer, 1, EVICT_LAST)
        assert again.read_bytes == 4 + count
        held = [old for old in range(4) if any(old in lines for lines in again._classes)]
        assert held == sorted(set(range(4)) - set(gone[:count])), key


def test_a_line_that_is_read_again_is_the_youngest_and_takes_the_new_priority() -> None:
    cache = Cache(2)
    cache.read(0, 1, NORMAL)
    cache.read(1, 1, NORMAL)
    assert cache.read(0, 1, NORMAL)
    cache.read(2, 1, NORMAL)
    assert cache.read(0, 1, EVICT_FIRST)
    cache.read(3, 1, NORMAL)
    assert not cache.read(0, 1, NORMAL)


def test_a_written_line_is_written_back_once() -> None:
    cache = Cache(2)
    cache.write(0, 2, EVICT_FIRST)
    assert cache.written_bytes == 0
    cache.read(1, 1, NORMAL)
    assert cache.written_bytes == 2
    cache.write(2, 1, NORMAL)
    cache.write(2, 1, EVICT_FIRST)  # again, while it is there
    assert cache.used == 2
    cache.flush()
    cache.flush()
    assert (cache.read_bytes, cache.written_bytes, cache.used) == (1, 3, 0)


def test_what_is_in_use_displaces_lines_and_stays() -> None:
    cache = Cache(3)
    cache.read(0, 1, EVICT_LAST)
    cache.read(1, 1, EVICT_LAST)
    cache.hold(2)
    assert not cache.read(0, 1, EVICT_LAST)
    assert not cache.read(1, 1, EVICT_LAST)
    cache.release(2)
    assert cache.read(1, 1, EVICT_LAST)


# What moves


@pytest.mark.parametrize(("streams", "ideal"), [(ADAMW, 28), (ADAN, 44)])
def test_with_everything_in_the_cache_nothing_moves_twice(streams: int, ideal: int) -> None:
    found = traffic(SEVERAL_CHUNKS, inf, streams)
    assert found.total == ideal
    assert found.ceiling == found.hit_share == 1
    assert found.written == 4 * streams


@pytest.mark.parametrize(("streams", "ideal"), [(ADAMW, 28), (ADAN, 44)])
def test_without_a_cache_the_gradient_is_read_twice(streams: int, ideal: int) -> None:
    found = traffic(SEVERAL_CHUNKS, 0, streams)
    assert found.total == ideal + 4
    assert found.ceiling == ideal / (ideal + 4)
    assert found.hit_share == 0
    assert found.written == 4 * streams


@pytest.mark.parametrize("cache_bytes", [0, 10 * CHUNK_BYTES, inf])
def test_without_agr_nothing_moves_twice_and_nobody_waits(cache_bytes: float) -> None:
    found = traffic([(elements, itemsize, False) for elements, itemsize, _ in SEVERAL_CHUNKS], cache_bytes)
    assert found.total == 28
    assert found.second_reads == found.waited == 0


def test_a_tensor_of_one_chunk_is_read_once() -> None:
    found = traffic([(CHUNK, 4, True), (5, 4, True)] * 20, 0)
    assert found.total == 28
    assert found.second_reads == found.waited == 0


@pytest.mark.parametrize(("cache_bytes", "total"), [(0, 12), (inf, 8)])
def test_gradients_changed_in_place_are_written_once(cache_bytes: float, total: int) -> None:
    found = traffic(SEVERAL_CHUNKS, cache_bytes, 0, in_place=True)
    assert found.total == total
    assert found.written == 4
    assert found.ceiling == 8 / total


def test_sixteen_bit_types_move_half() -> None:
    assert traffic([(elements, 2, True) for elements, _, _ in SEVERAL_CHUNKS], 0).total == 16


def test_a_cache_holds_the_end_of_a_tensor_of_twice_its_size() -> None:
    found = traffic([(1000 * CHUNK, 4, True)], 500 * CHUNK_BYTES)
    in_use = ADAMW * BLOCKS  # chunks that blocks are working on are in the cache too
    assert (500 - 2 * in_use) / 1000 < found.hit_share < 0.5
    assert found.total == pytest.approx(32 - 4 * found.hit_share)


def test_in_reading_order_a_cache_without_hints_holds_nothing_that_is_asked_for() -> None:
    tensors: list[Tensor] = [(1000 * CHUNK, 4, True)]
    forward = sorted(tasks(tensors))  # "reduce" before "update", chunks ascending
    assert traffic(tensors, 800 * CHUNK_BYTES, order=forward, hints=False).hit_share < 0.01
    assert traffic(tensors, 800 * CHUNK_BYTES, hints=False).hit_share > 0.15
    # With hints, what missed asks for no place, and the end stays.
    assert traffic(tensors, 800 * CHUNK_BYTES, order=forward).hit_share > 0.7


def test_a_larger_cache_never_moves_more() -> None:
    totals = [traffic(SEVERAL_CHUNKS, 4 * CHUNK_BYTES * size).total for size in range(30)]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] == 32
    assert totals[-1] == 28


def test_hints_keep_the_stream_of_parameters_and_state_from_displacing_gradients() -> None:
    tensors: list[Tensor] = [(200 * CHUNK, 4, True)]
    with_hints, without = (traffic(tensors, 250 * CHUNK_BYTES, hints=hints) for hints in (True, False))
    assert with_hints.hit_share == 1
    assert without.hit_share < 0.6


def test_coarse_pieces_predict_nearly_what_fine_ones_do() -> None:
    tensors: list[Tensor] = [(30 * 8 * CHUNK, 4, True), (90 * 8 * CHUNK, 4, True)] * 3
    plan = _C.Plan(tensors, chunk_elements=8 * CHUNK, window_bytes=20 * 8 * CHUNK_BYTES, lead_bytes=0)
    fine, coarse = (
        replay(tensors, plan.tasks, 8 * CHUNK, ADAMW, ADAMW, Machine(60 * 8 * CHUNK_BYTES, 4), pieces)
        for pieces in (10**6, 1)
    )
    assert 28.1 < fine.total < 31.9
    assert coarse.total == pytest.approx(fine.total, rel=0.01)
    assert coarse.waited == pytest.approx(fine.waited, abs=0.01)


def test_a_larger_model_gets_coarser_pieces() -> None:
    order = tasks([(100 * CHUNK, 4, True)])
    sizes = [piece_bytes(order, 32768, most_pieces) for most_pieces in (10**6, 4 * len(order), len(order), 1)]
    assert sizes == [4096, 8192, 32768, 32768]


# What is kept on chip


def test_the_end_of_a_large_tensor_is_kept_on_chip() -> None:
    tensors: list[Tensor] = [(100 * CHUNK, 4, True)]
    room = 30 * CHUNK_BYTES
    assert traffic(tensors, 0, on_chip_bytes=room).on_chip_hits == room
    assert traffic(tensors, 0, on_chip_bytes=room).total == 32 - 4 * 0.3
    reduces_and_updates_of_the_end = tasks(tensors)[:130]
    assert traffic(tensors, 0, order=reduces_and_updates_of_the_end, on_chip_bytes=room).on_chip_hits == room
    alone, beside = (traffic(tensors, 60 * CHUNK_BYTES, on_chip_bytes=kept) for kept in (0, room))
    assert beside.on_chip_hits == room
    # What is kept takes nothing from the cache, but blocks are busy when the cache is first asked for something.
    assert alone.cache_hits - ADAMW * BLOCKS * CHUNK_BYTES <= beside.cache_hits <= alone.cache_hits
    assert beside.total < alone.total


def test_what_is_kept_on_chip_is_of_large_tensors_and_fits() -> None:
    tensors: list[Tensor] = [(20 * CHUNK, 4, True), (50 * CHUNK, 4, True)] * 3
    room = 10 * CHUNK_BYTES
    # With a window for everything all is reduced before the first update, so that one tensor's end fills the room.
    found = traffic(tensors, 0, order=tasks(tensors, window=10**9), on_chip_bytes=room, on_chip_above=20 * CHUNK_BYTES)
    assert found.on_chip_hits == room
    one_by_one = traffic(tensors, 0, order=tasks(tensors, window=0), on_chip_bytes=room)
    assert one_by_one.on_chip_hits == 6 * room, "each has all the room"
    large_alone = traffic(tensors[1:2], 0, on_chip_bytes=room, on_chip_above=50 * CHUNK_BYTES)
    assert large_alone.on_chip_hits == 0


# Waiting


def test_one_large_tensor_makes_blocks_wait_unless_there_is_other_work() -> None:
    large: Tensor = (5 * BLOCKS * CHUNK, 4, True)
    alone = traffic([large], inf)
    assert alone.waited > 0.01
    others: list[Tensor] = [(CHUNK, 4, True)] * (2 * BLOCKS)
    tensors = [large, *others]
    assert traffic(tensors, inf, order=tasks(tensors, window=0, lead=0)).waited > 0.01
    led = traffic(tensors, inf, order=tasks(tensors, window=0, lead=2 * BLOCKS * CHUNK_BYTES))
    assert led.waited == 0


def test_a_schedule_that_updates_before_it_reduces_is_refused() -> None:
    with pytest.raises(ValueError, match="smaller ticket"):
        traffic([(CHUNK, 4, True)], inf, order=[("update", 0, 0)] * BLOCKS + [("reduce", 0, 0)])


# The command


def test_llama_is_in_the_order_of_its_parameters_and_asked_for_by_name() -> None:
    model = shapes.model_set("llama-3.2-1b")
    assert (len(model.shapes), model.elements) == (146, 1_235_814_400)
    assert model.shapes[0] == (128256, 2048)
    assert model.shapes[1:5] == ((2048, 2048), (512, 2048), (512, 2048), (2048, 2048))
    assert model.shapes[5:10] == ((8192, 2048), (8192, 2048), (2048, 8192), (2048,), (2048,))
    assert model.shapes[-1] == (2048,)
    assert model.name not in shapes.DEFAULT_SETS
    assert model.name in shapes.ALLOWED_SETS


def run(folder: Path, *more: str) -> dict[str, list[dict[str, object]]]:
    """The JSON of a run on small sets and a small GPU."""
    machine = ["--l2=262144", "--blocks=8", "--chunk=1024"]
    assert main(["traffic", "--sets", "3x100000", "20x500", *machine, "--out", str(folder), "--tag=small", *more]) == 0
    document: dict[str, list[dict[str, object]]] = json.loads((folder / "traffic-float32-small.json").read_text())
    return document


def test_traffic_predicts_every_rule_at_every_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tmp_path)["predictions"]
    expected = [
        (name, rule, share)
        for name in ("3x100000", "20x500")
        for rule in ("AdamW", "Adan", "gradients")
        for share in (1, 0.5)
    ]
    assert [(row["set"], row["rule"], row["share"]) for row in found] == expected
    assert [row["ideal_bytes"] for row in found[::2]] == [n * k for n in (300_000, 10_000) for k in (28, 44, 8)]
    totals = [row["total"] for row in found]
    assert 28 < totals[0] < totals[1] < 32
    assert 8 < totals[4] < totals[5] < 12
    assert totals[6:] == [28, 28, 44, 44, 8, 8]
    assert "3 tensors of 100,000" in capsys.readouterr().out


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_moves_its_bytes_and_reads_its_gradients_a_second_time(name: str, tmp_path: Path) -> None:
    machine = ["--l2=1", "--blocks=8", "--chunk=1024", "--window=0", "--lead=0", "--share=1"]
    asked = ["traffic", "--sets=3x100000", f"--precision={name}", *machine, "--out", str(tmp_path), "--tag=small"]
    assert main(asked) == 0
    found = json.loads((tmp_path / f"traffic-{name}-small.json").read_text())["predictions"]
    gradient = FORMATS[name].gradient.itemsize
    for row in found:
        assert row["ideal_bytes"] == 300_000 * FORMATS[name].bytes_moved(row["rule"])
        assert row["read"] == pytest.approx(FORMATS[name].bytes_read(row["rule"]) + gradient, rel=1e-5)
        assert row["written"] == pytest.approx(FORMATS[name].bytes_written(row["rule"]), rel=1e-5)


def test_on_chip_says_what_it_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tmp_path, "--on-chip=131072", "--share=1")["predictions"]
    assert [row["on_chip_bytes"] for row in found] == [0, 131072] * 6
    assert found[1]["total"] < found[0]["total"]
    assert f"{found[0]['total'] - found[1]['total']:.2f}" in capsys.readouterr().out


def test_a_sweep_says_which_window_and_lead_are_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tmp_path, "--sweep", "--share=1")["sweep"]
    own = [row for row in found if row["set"] == "3x100000"]
    assert len({(row["window_bytes"], row["lead_bytes"]) for row in own}) == len(own) > 10
    assert len({row["waited"] for row in own if row["lead_bytes"] == 0}) > 1, "windows differ"
    assert len({row["waited"] for row in own if row["window_bytes"] == 16384}) > 1, "leads differ"
    line = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("3 tensors of 100,000, share 1:")
    )
    highest = max(row["reach"] for row in own)
    assert float(line.rpartition(" ")[2].rstrip("%")) == pytest.approx(100 * highest, abs=0.16)
