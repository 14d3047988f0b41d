"""The schedule: which tasks there are, in which order."""

import pytest

from agr_cuda import _C


def tasks(tensors, **limits):
    return _C.Plan(tensors, **limits).tasks


def test_a_tensor_of_one_chunk_is_one_task():
    given = [(10, 4, True), (10, 4, False)]
    assert tasks(given, chunk_elements=10) == [((0, 0), (0, 0)), (None, (1, 0))]


def test_a_tensor_without_elements_has_no_task():
    assert tasks([(0, 4, True)]) == []


def test_a_tensor_of_several_chunks_is_reduced_before_it_is_updated():
    expected = [((0, 0), None), ((0, 1), None), (None, (0, 0)), (None, (0, 1))]
    assert tasks([(11, 4, True)], chunk_elements=10, window_bytes=1000) == expected


def test_a_tensor_that_is_not_regularized_is_only_updated():
    assert tasks([(11, 4, False)], chunk_elements=10) == [(None, (0, 0)), (None, (0, 1))]


def test_reductions_run_ahead_of_updates_by_a_window_and_then_beside_them():
    given = tasks([(20, 4, True)] * 4, chunk_elements=10, window_bytes=160)
    reduced = [task[0] for task in given if task[0]]
    updated = [task[1] for task in given if task[1]]
    assert reduced == updated == [(tensor, chunk) for tensor in range(4) for chunk in range(2)]
    assert [tuple(chunk is not None for chunk in task) for task in given] == (
        4 * [(True, False)] + 4 * [(True, True)] + 4 * [(False, True)]
    )


def test_a_tensor_larger_than_the_window_is_updated_from_its_end():
    given = tasks([(30, 4, True)], chunk_elements=10, window_bytes=100)
    assert [task[1] for task in given if task[1]] == [(0, 2), (0, 1), (0, 0)]


def test_with_clipping_everything_is_reduced_before_the_first_update():
    plan = _C.Plan([(20, 4, True), (5, 4, False), (20, 4, True)], clip=True, chunk_elements=10)
    reduced = [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]
    assert plan.tasks == [(chunk, None) for chunk in reduced] + [(None, chunk) for chunk in reversed(reduced)]
    assert plan.first_update == 5


def test_the_window_is_a_share_of_the_cache_and_a_chunk_a_share_of_the_window():
    plan = _C.Plan([])
    assert 0 < plan.chunk_elements * 4 <= plan.window_bytes


@pytest.mark.parametrize("limits", [{"chunk_elements": 0}, {"window_bytes": -1}])
def test_limits_that_make_no_sense_are_refused(limits):
    with pytest.raises(ValueError, match=str(next(iter(limits.values())))):
        _C.Plan([], **limits)
