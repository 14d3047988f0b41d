"""What the benchmarks measure with: shapes of models, statistics, and steps that take turns."""

from __future__ import annotations

from math import prod

import pytest
import torch

from bench.measuring import clocks, races, stats
from bench.measuring.clocks import Timing
from bench.measuring.races import Lane
from bench.workloads import shapes
from bench.workloads.tensors import PrivateGradients, Workload

SHAPES = ((3, 4), (7,), (1,))


# Shapes


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [
        ("gpt2", 148, 124_439_808),
        ("resnet50", 161, 25_557_032),
        ("vit-b-16", 152, 86_567_656),
        ("321x64", 321, 20_544),
        ("321x4096", 321, 1_314_816),
    ],
)
def test_sets_have_the_known_sizes(name: str, tensors: int, elements: int) -> None:
    model = shapes.model_set(name)
    assert len(model.shapes) == tensors
    assert model.elements == sum(prod(shape) for shape in model.shapes) == elements


def test_models_are_in_the_order_of_their_parameters() -> None:
    gpt2, resnet50, vit = (shapes.model_set(name).shapes for name in ("gpt2", "resnet50", "vit-b-16"))
    assert gpt2[:6] == ((50257, 768), (1024, 768), (768,), (768,), (768, 2304), (2304,))
    assert gpt2[6:14] == ((768, 768), (768,), (768,), (768,), (768, 3072), (3072,), (3072, 768), (768,))
    assert resnet50[:4] == ((64, 3, 7, 7), (64,), (64,), (64, 64, 1, 1))
    assert resnet50[-2:] == ((1000, 2048), (1000,))
    assert vit[:4] == ((1, 1, 768), (768, 3, 16, 16), (768,), (1, 197, 768))
    assert vit[6:10] == ((2304, 768), (2304,), (768, 768), (768,))


@pytest.mark.parametrize("name", ["llama", "0x64", "3x0", "3x", "x4", "3x4x5", "-3x4", ""])
def test_other_names_of_sets_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="allowed are gpt2, resnet50, vit-b-16, or COUNTxELEMENTS"):
        shapes.model_set(name)


# Statistics


def test_summary_of_known_numbers() -> None:
    assert stats.summarize([5.0, 1.0, 2.0, 4.0, 3.0]) == stats.Summary(3.0, 2.0, 4.0, 1.0, 5)
    assert stats.summarize([1.0, 2.0, 3.0, 4.0]) == stats.Summary(2.5, 1.75, 3.25, 1.0, 4)
    assert stats.summarize([7.0]) == stats.Summary(7.0, 7.0, 7.0, 7.0, 1)
    with pytest.raises(ValueError, match="at least one"):
        stats.summarize([])


def test_a_medians_interval_has_the_ranks_of_the_sign_test() -> None:
    """Those of statistical tables: 1 and 6 of 6 values, 2 and 9 of 10, 40 and 61 of 100."""
    assert stats.median_interval([]) is None
    assert stats.median_interval([1.0, 2.0, 3.0, 4.0, 5.0]) is None
    for count, lower, upper in ((6, 1, 6), (10, 2, 9), (100, 40, 61)):
        values = [float(value) for value in range(count, 0, -1)]
        assert stats.median_interval(values) == (lower, upper)
    assert stats.median_interval([1.0] * 2000) == (1.0, 1.0)


def test_paired_ratios_cancel_drift_that_the_ratio_of_medians_does_not() -> None:
    yardstick = [1.0, 1.0, 10.0, 10.0, 10.0]
    values = [2.0, 2.0, 20.0, 20.0, 30.0]
    assert stats.paired_ratios(values, yardstick) == stats.Summary(2.0, 2.0, 2.0, 2.0, 5)
    assert stats.ratio_of_medians([3.0, 3.0, 9.0], [1.0, 6.0, 6.0]) == 0.5
    assert stats.paired_ratios([3.0, 3.0, 9.0], [1.0, 6.0, 6.0]).median == 1.5
    assert stats.ratio_of_fastest([3.0, 2.0, 9.0], [8.0, 6.0, 4.0]) == 0.5
    with pytest.raises(ValueError, match="got 1 and 2"):
        stats.paired_ratios([1.0], [1.0, 2.0])


# Interleaving


def test_a_race_visits_every_lane_once_a_round_in_changing_order() -> None:
    log: list[str] = []
    lanes = [Lane(name, lambda name=name: log.append(name)) for name in "abcd"]
    counter = iter(range(1000))

    def clock(action: clocks.Action) -> Timing:
        action()
        return Timing(float(next(counter)), 0.0)

    timings = races.race(
        lanes, clock, rounds=20, seconds=1e-9, new_round=lambda number: log.append(f"<{number}"),
        between=lambda: log.append(">"),
    )  # fmt: skip
    assert len(log) == races.FEWEST_ROUNDS * 6, "time was up at once, so the fewest rounds are taken"
    rounds = [log[begin : begin + 6] for begin in range(0, len(log), 6)]
    assert [(r[0], r[-1]) for r in rounds] == [(f"<{number}", ">") for number in range(len(rounds))]
    assert all(sorted(r[1:5]) == list("abcd") for r in rounds)
    for number, r in enumerate(rounds):
        for name in "abcd":
            assert timings[name][number].step == 4 * number + r[1:5].index(name)

    log.clear()
    races.race(lanes, clock, rounds=20, seconds=60, new_round=lambda number: None)
    assert len({tuple(log[begin : begin + 4]) for begin in range(0, 80, 4)}) > 5


def test_the_collector_is_off_in_a_race_and_on_again_after_it() -> None:
    import gc

    states: list[bool] = []
    lane = Lane("a", lambda: states.append(gc.isenabled()))
    races.race([lane], clocks.cpu_clock, rounds=2, seconds=1, new_round=lambda number: None)
    assert states == [False, False]
    assert gc.isenabled()


def test_a_lane_undoes_its_surroundings_where_its_step_fails() -> None:
    def fail() -> None:
        raise RuntimeError("no step")

    log: list[str] = []
    lane = Lane("a", fail, before=lambda: log.append("before"), after=lambda: log.append("after"))
    with pytest.raises(RuntimeError, match="no step"):
        lane.visit(clocks.cpu_clock)
    assert log == ["before", "after"]


def test_rounds_take_two_sets_of_gradients_in_turn() -> None:
    workload = Workload(SHAPES, torch.device("cpu"), torch.float32)
    first = [parameter.grad for parameter in workload.parameters]
    workload.turn(1)
    second = [parameter.grad for parameter in workload.parameters]
    workload.turn(2)
    assert all(p.grad is g for p, g in zip(workload.parameters, first, strict=True))
    assert not any(a is b for a, b in zip(first, second, strict=True))
    assert [tuple(parameter.shape) for parameter in workload.parameters] == list(SHAPES)


def test_private_gradients_are_restored_and_the_shared_ones_left_alone() -> None:
    workload = Workload(SHAPES, torch.device("cpu"), torch.float32)
    expected = [gradient.clone() for gradient in workload.gradients]
    private = PrivateGradients(workload)
    for _ in range(2):
        private.lend()
        for parameter, value in zip(workload.parameters, expected, strict=True):
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, value)
            parameter.grad.zero_()
        private.take_back()
        for parameter, gradient in zip(workload.parameters, workload.gradients, strict=True):
            assert parameter.grad is gradient
        assert all(map(torch.equal, workload.gradients, expected))
