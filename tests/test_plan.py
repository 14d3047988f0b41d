"""The schedule: which tasks there are, in which order."""

import pytest

from agr_cuda import _C


def tasks(tensors, **limits):
    return _C.Plan(tensors, **limits).tasks


def test_a_tensor_of_one_chunk_is_one_task():
    assert tasks([(10, 4, True), (10, 4, False)], chunk_elements=10) == [("whole", 0, 0), ("whole", 1, 0)]


def test_a_tensor_without_elements_has_no_task():
    assert tasks([(0, 4, True)]) == []


def test_a_tensor_of_several_chunks_is_reduced_before_it_is_updated():
    expected = [("reduce", 0, 0), ("reduce", 0, 1), ("update", 0, 1), ("update", 0, 0)]
    assert tasks([(11, 4, True)], chunk_elements=10, window_bytes=1000) == expected


def test_a_tensor_that_is_not_regularized_is_only_updated():
    assert tasks([(11, 4, False)], chunk_elements=10) == [("update", 0, 1), ("update", 0, 0)]


def test_reductions_run_ahead_of_updates_by_a_window():
    made = tasks([(20, 4, True)] * 4, chunk_elements=10, window_bytes=160)
    kinds = [(kind, tensor) for kind, tensor, _ in made]
    r, u = [("reduce", i) for i in range(4)], [("update", i) for i in range(4)]
    assert kinds[::2] == [r[0], r[1], r[2], u[0], r[3], u[1], u[2], u[3]]


def test_what_waits_in_the_window_is_updated_while_a_large_tensors_sum_comes_together():
    made = tasks([(20, 4, True), (90, 4, True)], chunk_elements=10, window_bytes=80)
    kinds = [(kind, tensor) for kind, tensor, _ in made]
    assert kinds == [("reduce", 0)] * 2 + [("reduce", 1)] * 9 + [("update", 0)] * 2 + [("update", 1)] * 9


def test_other_tasks_stand_between_a_tensors_last_reduction_and_its_first_update():
    def between(lead):
        made = tasks([(50, 4, True), (9, 4, True), (50, 4, True)], chunk_elements=10, window_bytes=40, lead_bytes=lead)
        return made[made.index(("reduce", 0, 4)) + 1 : made.index(("update", 0, 4))]

    assert between(0) == []
    assert between(36) == [("whole", 1, 0), ("reduce", 2, 0)]
    assert between(37) == [("whole", 1, 0), ("reduce", 2, 0)]
    assert between(77) == [("whole", 1, 0), ("reduce", 2, 0), ("reduce", 2, 1)]


def test_a_tensor_is_updated_from_its_end_which_a_cache_still_holds():
    updates = [chunk for kind, _, chunk in tasks([(30, 4, True)], chunk_elements=10) if kind == "update"]
    assert updates == [2, 1, 0]


def test_with_clipping_everything_is_reduced_before_the_first_update():
    plan = _C.Plan([(20, 4, True), (5, 4, False), (20, 4, True)], clip=True, chunk_elements=10)
    kinds = [kind for kind, _, _ in plan.tasks]
    assert kinds == ["reduce"] * 5 + ["update"] * 5
    assert plan.first_update == 5


def test_the_window_is_a_share_of_the_cache_and_a_chunk_a_share_of_the_window():
    plan = _C.Plan([])
    assert 0 < plan.chunk_elements * 4 <= plan.window_bytes


@pytest.mark.parametrize("limits", [{"chunk_elements": 0}, {"window_bytes": -1}, {"lead_bytes": -1}])
def test_limits_that_make_no_sense_are_refused(limits):
    with pytest.raises(ValueError, match=f"not {next(iter(limits.values()))}"):
        _C.Plan([], **limits)


def test_a_plan_of_more_tasks_than_tickets_is_refused():
    with pytest.raises(ValueError, match=f"at most 2\\^30 chunks, not {2**30 + 1}"):
        _C.Plan([(2**29 * 10, 4, True), (2**29 * 10 + 1, 4, True)], chunk_elements=10)
