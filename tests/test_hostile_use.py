"""What programs do that nobody should: it gives an error or the right answer, and never half a step."""

import threading

import pytest
import torch
from conftest import device_of
from helpers import Method

import agr_cuda
from agr_cuda.plan import StepPlan


def leaf(values, grad, dtype=torch.float32):
    p = torch.nn.Parameter(torch.tensor(values, dtype=dtype))
    p.grad = torch.tensor(grad, dtype=dtype)
    return p


def no_memory_zeros():
    return torch._efficientzerotensor(4)


def negative_view():
    return torch._neg_view(torch.tensor([-1.0, 2.0, -3.0, 4.0]))


def freed():
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("make", [no_memory_zeros, negative_view], ids=lambda make: make.__name__)
def test_gradients_that_are_not_what_their_memory_says(method: Method, make) -> None:
    results = []
    for gradient in (make(), make().clone() + 0.0):
        p = torch.nn.Parameter(torch.ones(4))
        optimizer = method.ours([p], agr=False)
        for _ in range(2):
            p.grad = gradient
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results)


def test_a_gradient_whose_memory_was_taken_away_is_an_error(method: Method) -> None:
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = freed()
    with pytest.raises(RuntimeError):
        method.ours([p], backend="cpu").step()
    assert torch.equal(p.detach(), torch.ones(4))


def test_two_threads_may_step_one_optimizer(method: Method) -> None:
    params = [leaf([1.0] * 70_001, [0.1] * 70_001) for _ in range(3)]
    optimizer = method.ours(params)
    threads = [threading.Thread(target=lambda: [optimizer.step() for _ in range(100)]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    if method.name == "Adan":
        assert optimizer.param_groups[0]["step"] == 200
    else:
        assert all(optimizer.state[p]["step"] == 200 for p in params)


def test_denormal_abs_sums_in_float64(backend) -> None:
    p = leaf([1.0] * 4, [1e-310, 0, 0, 0], torch.float64)
    p.data, p.grad = p.data.to(device_of(backend)), p.grad.to(device_of(backend))
    agr_cuda.AdamW([p], weight_decay=0, backend=backend).step()
    assert torch.equal(p.detach().cpu(), torch.ones(4, dtype=torch.float64))


def test_clipping_nothing_by_an_eps_of_zero(method: Method, backend) -> None:
    p = leaf([1.0, 2.0], [0.0, 0.0])
    optimizer = method.ours([p], eps=0.0, max_grad_norm=1.0, backend=backend)
    optimizer.step()
    p.grad = None
    optimizer.step()


def test_an_interrupt_after_the_update_does_not_make_the_next_step_a_first_one(monkeypatch) -> None:
    def interrupt(_):
        raise KeyboardInterrupt

    results = []
    for interrupted in (False, True):
        p = leaf([1.0, 2.0, 3.0], [1.0, -2.0, 0.5])
        optimizer = agr_cuda.Adan([p])
        with monkeypatch.context() as patch:
            if interrupted:
                patch.setattr(StepPlan, "increment_versions", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    optimizer.step()
            else:
                optimizer.step()
        p.grad = torch.tensor([0.3, 1.0, -1.0])
        optimizer._plan = None
        optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)


def test_after_a_restart_every_parameter_has_a_first_step(backend) -> None:
    p, q = leaf([1.0, 2.0], [1.0, 1.0]), leaf([1.0, 2.0], [1.0, 2.0])
    optimizer = agr_cuda.Adan([p, q], backend=backend)
    optimizer.step()
    optimizer.restart_opt()
    q.grad = None
    optimizer.step()
    q.grad = torch.tensor([1.0, 2.0])
    optimizer.step()
    assert not optimizer.state[q]["exp_avg_diff"].any()


def test_state_that_vanishes_is_made_anew(method: Method, backend) -> None:
    p, q = leaf([1.0, 2.0], [1.0, 1.0]), leaf([1.0, 2.0], [1.0, 2.0])
    optimizer = method.ours([p, q], backend=backend)
    optimizer.step()
    optimizer.state[q].clear()
    optimizer.step()
    assert optimizer.state[q]["exp_avg"].any()


@pytest.mark.parametrize("change", ["max_grad_norm", "lr in place", "eps in place", "betas in place"])
def test_bad_numbers_that_come_later_are_noticed(method: Method, change) -> None:
    p = leaf([1.0, 2.0], [1.0, 1.0])
    betas = [0.9] * (3 if method.name == "Adan" else 2)
    optimizer = method.ours([p], lr=torch.tensor(1e-3), eps=torch.tensor(1e-8))
    optimizer.param_groups[0]["betas"] = betas
    optimizer.step()
    before = p.detach().clone()
    if change == "max_grad_norm":
        optimizer.max_grad_norm = -1
    elif change in ("lr in place", "eps in place"):
        optimizer.param_groups[0][change.split()[0]].fill_(-1)
    else:
        betas[0] = 1.5
    with pytest.raises(ValueError, match=r"it must be at least 0"):
        optimizer.step()
    assert torch.equal(p.detach(), before)


def test_a_parameter_twice_in_a_group_is_refused(method: Method) -> None:
    p = leaf([1.0], [1.0])
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="more than once"):
        method.ours([p, p])


def test_groups_from_elsewhere_get_the_options_that_they_lack(method: Method) -> None:
    p = leaf([1.0, 2.0], [1.0, 1.0])
    optimizer = method.ours([p])
    optimizer.__setstate__({"state": optimizer.state, "param_groups": [{"params": [p], "lr": 0.1}]})
    optimizer.step()
    assert optimizer.param_groups[0]["agr"] is True


def test_an_expanded_gradient_is_refused_before_any_is_regularized() -> None:
    good, bad = leaf([1.0, 2.0], [1.0, 2.0]), torch.nn.Parameter(torch.ones(4))
    bad.grad = torch.ones(1).expand(4)
    with pytest.raises(RuntimeError, match="expanded"):
        agr_cuda.regularize_gradients_([good, bad])
    assert good.grad.tolist() == [1.0, 2.0]


def test_an_empty_tensor_of_any_strides_is_dense():
    empty = torch.empty(1, 3, 4, 0).contiguous(memory_format=torch.channels_last).requires_grad_()
    empty.grad = torch.empty_like(empty)
    optimizer = agr_cuda.AdamW([empty], fused=True)
    optimizer.step()
    assert optimizer.backends == ["cpu"]
