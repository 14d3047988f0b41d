"""A plan is reused from step to step, and made anew exactly when something that it depends on has changed."""

import ctypes
import gc
import weakref

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import agr_cuda
from agr_cuda.native import native

OPTIMIZERS = [agr_cuda.AdamW, agr_cuda.Adan]


@pytest.fixture(params=OPTIMIZERS, ids=lambda optimizer: optimizer.__name__)
def make(request):
    return request.param


@pytest.fixture(params=["exchange-api", "python-methods"], autouse=True)
def read_tensors(request):
    """Tensors are read through DLPack's exchange interface, or as in releases that lack it."""
    core = native()
    core.use_exchange_api(request.param == "exchange-api")
    yield request.param
    core.use_exchange_api(True)


def parameters(*shapes):
    generator = torch.Generator().manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return made


def replanned(optimizer):
    """Make a step and say whether it planned anew."""
    before = optimizer._plan
    optimizer.step()
    return optimizer._plan is not before


def test_nothing_changed(make):
    optimizer = make(parameters((5, 7), (3,), (2, 3, 4, 5)))
    assert replanned(optimizer)
    for _ in range(3):
        assert not replanned(optimizer)


def test_new_gradients_of_the_same_layout_and_new_numbers_keep_the_plan(make):
    given = parameters((5, 7), (3,))
    optimizer = make(given)
    optimizer.step()
    for lr in (0.1, 0.2):
        for parameter in given:
            parameter.grad = torch.randn_like(parameter)
        optimizer.param_groups[0].update(lr=lr, weight_decay=lr, eps=lr, maximize=lr > 0.1)
        assert not replanned(optimizer)


def test_gradients_set_to_none_and_computed_again_keep_the_plan(make):
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    optimizer = make(model.parameters())
    for step in range(4):
        optimizer.zero_grad(set_to_none=True)
        model(torch.randn(3, 4)).square().sum().backward()
        assert replanned(optimizer) == (step == 0)


def change_parameter_data(given, optimizer):
    given[0].data = given[0].data.clone()


def change_parameter_size(given, optimizer):
    given[0].data = torch.randn(9, 7)
    given[0].grad = torch.randn(9, 7)
    optimizer.state.pop(given[0])


def change_parameter_layout(given, optimizer):
    given[0].data = given[0].data.t().contiguous().t()


def change_parameter_type(given, optimizer):
    given[1].data = given[1].data.double()
    given[1].grad = torch.randn(3, dtype=torch.float64)


def gain_gradient(given, optimizer):
    given[2].grad = torch.randn_like(given[2])


def change_gradient_layout(given, optimizer):
    given[0].grad = torch.randn(7, 5).t()


def load_state(given, optimizer):
    optimizer.load_state_dict(optimizer.state_dict())


def replace_state_tensor(given, optimizer):
    optimizer.state[given[0]]["exp_avg"] = optimizer.state[given[0]]["exp_avg"].clone()


def repoint_state_tensor(given, optimizer):
    state = optimizer.state[given[0]]["exp_avg_sq"]
    state.data = state.data.clone()


def replace_state_of_parameter(given, optimizer):
    optimizer.state[given[0]] = dict(optimizer.state[given[0]])


def drop_state(given, optimizer):
    optimizer.state.clear()


def replace_state(given, optimizer):
    optimizer.state = type(optimizer.state)(dict, optimizer.state)


def add_group(given, optimizer):
    optimizer.add_param_group({"params": parameters((4,))})


def append_to_group(given, optimizer):
    optimizer.param_groups[0]["params"].extend(parameters((4,)))


def replace_parameter(given, optimizer):
    optimizer.param_groups[0]["params"][0] = parameters((5, 7))[0]


def replace_group_list(given, optimizer):
    optimizer.param_groups[0]["params"] = list(optimizer.param_groups[0]["params"])


def replace_groups(given, optimizer):
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]


def toggle_agr(given, optimizer):
    optimizer.param_groups[0]["agr"] = False


def begin_to_clip(given, optimizer):
    optimizer.max_grad_norm = 1.0


def change_foreach(given, optimizer):
    optimizer.param_groups[0]["foreach"] = True


CHANGES = [
    change_parameter_data, change_parameter_size, change_parameter_layout, change_parameter_type,
    gain_gradient, change_gradient_layout, load_state, replace_state_tensor, repoint_state_tensor,
    replace_state_of_parameter, drop_state, replace_state, add_group, append_to_group, replace_parameter,
    replace_group_list, replace_groups, toggle_agr, begin_to_clip, change_foreach,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_noticed_and_the_result_is_the_references(make, change):
    results = []
    for backend in (None, "reference"):
        given = parameters((5, 7), (3,), (2, 3, 4, 5))
        given[2].grad = None
        optimizer = make(given, backend=backend)
        optimizer.step()
        optimizer.step()
        torch.manual_seed(1)
        change(given, optimizer)
        assert backend == "reference" or replanned(optimizer)
        if backend == "reference":
            optimizer.step()
        optimizer.step()
        assert not (backend is None and replanned(optimizer))
        if backend == "reference":
            optimizer.step()
        now = [p for group in optimizer.param_groups for p in group["params"]]
        results.append([*now, *(optimizer.state[p][key] for p in now for key in sorted(optimizer.state[p]))])
    assert len(results[0]) == len(results[1])
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-7)


def test_a_gradient_that_is_missing_keeps_the_plan(make):
    results = []
    for backend in (None, "reference"):
        given = parameters((5, 7), (3,), (2, 3, 4, 5))
        optimizer = make(given, backend=backend)
        optimizer.step()
        for step in range(6):
            generator = torch.Generator().manual_seed(step)
            for i, parameter in enumerate(given):
                gradient = torch.randn(parameter.shape, generator=generator)
                parameter.grad = gradient if (step + i) % 3 else None
            assert not replanned(optimizer)
        results.append([*given, *(optimizer.state[p][key] for p in given for key in sorted(optimizer.state[p]))])
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-7)


def test_gradients_are_not_kept_alive_beyond_the_step(make):
    given = parameters((5, 7))
    optimizer = make(given)
    optimizer.step()
    gradient = weakref.ref(given[0].grad)
    given[0].grad = None
    assert gradient() is None


class Memory(ctypes.Array):
    """Of a tensor; it has references that are weak."""

    _type_, _length_ = ctypes.c_float, 6


def test_gradients_are_kept_alive_until_the_step_is_made(make):
    given = parameters((6,))
    optimizer = make(given)
    optimizer.step()
    memory = Memory()
    given[0].grad = torch.frombuffer(memory, dtype=torch.float32)
    alive = weakref.ref(memory)
    del memory
    schedule = optimizer._plan
    assert schedule.fits(optimizer.param_groups, optimizer.state)
    given[0].grad = None
    assert alive() is not None
    schedule.release()
    assert alive() is None


class WithGradientOfItsOwn(torch.nn.Parameter):
    """Its gradient is not where PyTorch keeps others'."""

    @property
    def grad(self):
        return self.other_grad

    @grad.setter
    def grad(self, value):
        self.other_grad = value


def test_a_class_may_say_itself_what_its_gradient_is(make):
    one, other = parameters((5, 7), (11,)), parameters((5, 7), (11,))
    theirs = [WithGradientOfItsOwn(p.detach()) for p in other]
    optimizers = make(one, lr=1e-2), make(theirs, lr=1e-2)
    for _ in range(2):
        for p, q in zip(one, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(one, theirs, strict=True):
        assert torch.equal(p, q)


class WithGradientsTenfold(torch.Tensor):
    """It answers for its attributes itself."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            answer = function(*args, **(kwargs or {}))
            return 10 * answer if function == torch.Tensor.grad.__get__ and answer is not None else answer


def test_a_class_may_answer_for_its_attributes(make):
    one, theirs = torch.zeros(4, requires_grad=True), torch.zeros(4).as_subclass(WithGradientsTenfold).requires_grad_()
    # With an eps so large a step moves by a multiple of the gradient.
    options = {"agr": False, "eps": 1e3, "weight_decay": 0.0, "lr": 1.0}
    optimizers = make([one], **options), make([theirs], **options)
    for _ in range(3):
        one.grad, theirs.grad = torch.full((4,), 10.0), torch.ones(4)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(theirs.detach().as_subclass(torch.Tensor), one.detach())
    assert one.abs().min() > 0


class WithMemoryOfItsOwn(torch.Tensor):
    """It dispatches for itself, though it is a plain tensor to look at."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return super().__torch_dispatch__(function, types, args, kwargs or {})


def test_a_gradient_that_dispatches_for_itself_is_planned_anew(make):
    given = parameters((5, 7))
    optimizer = make(given)
    optimizer.step()
    given[0].grad = torch.randn(5, 7).as_subclass(WithMemoryOfItsOwn)
    assert replanned(optimizer)


def test_a_gradients_end_may_lead_to_another_step(make):
    given = parameters((6,))
    optimizer = make(given)
    optimizer.step()
    memory = Memory()
    given[0].grad = torch.frombuffer(memory, dtype=torch.float32)
    steps = []
    weakref.finalize(memory, lambda: steps.append(optimizer.step()))
    del memory
    schedule = optimizer._plan
    assert schedule.fits(optimizer.param_groups, optimizer.state)
    given[0].grad = torch.ones(6)
    schedule.release()
    assert steps == [None]


def test_gradients_are_let_go_after_a_step_that_fails(make):
    given = parameters((6,), (3,))
    optimizer = make(given)
    optimizer.step()
    gradient = weakref.ref(given[0].grad)
    given[1].grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="must be dense"):
        optimizer.step()
    given[0].grad = None
    assert gradient() is None


def test_a_step_counts_as_one_change_of_every_parameter(make):
    given = parameters((5, 7), (11,), ())
    optimizer = make([{"params": given}, {"params": parameters((3,)), "foreach": True}])
    optimizer.step()
    before = [p._version for p in given]
    optimizer.step()
    assert [p._version for p in given] == [version + 1 for version in before]


def test_parameters_made_in_inference_mode(make):
    with torch.inference_mode():
        given = [torch.randn(5), torch.randn(7)]
    for p in given:
        p.grad = torch.randn(p.shape)
    optimizer = make(given)
    before = [p.clone() for p in given]
    for _ in range(2):
        optimizer.step()
    assert not any(torch.equal(p, was) for p, was in zip(given, before, strict=True))


def test_an_optimizer_that_its_parameters_refer_to_is_collected(make):
    given = parameters((5, 7))
    optimizer = make(given)
    optimizer.step()
    given[0].optimizer = optimizer
    alive = weakref.ref(optimizer), weakref.ref(given[0])
    del optimizer, given
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


def test_autograd_notices_that_a_step_came_before_backward(make):
    given = parameters((5, 5))
    optimizer = make(given)
    loss = (given[0] @ given[0]).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_gradient_that_becomes_a_view_of_its_negative_is_taken_as_what_it_stands_for(make):
    one, other = parameters((5, 7), (11,)), parameters((5, 7), (11,))
    optimizers = make(one, lr=1e-2), make(other, lr=1e-2)
    for optimizer in optimizers:
        optimizer.step()
    for p, q in zip(one, other, strict=True):
        g = torch.randn_like(p)
        p.grad, q.grad = torch._neg_view(-g), g
        assert p.grad.is_neg()
    for optimizer in optimizers:
        optimizer.step()
    for p, q in zip(one, other, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not hasattr(torch, "_lazy_clone"), reason="needs copy-on-write")
def test_a_copy_on_write_clone_of_a_parameter_keeps_its_values(make):
    made = parameters((5, 7), (11,))
    optimizer = make(made)
    optimizer.step()
    clones = [torch._lazy_clone(p.detach()) for p in made]
    before = [p.detach().clone() for p in made]
    optimizer.step()
    for p, clone, was in zip(made, clones, before, strict=True):
        assert torch.equal(clone, was)
        assert not torch.equal(p, was)


@pytest.mark.parametrize("freed", ["parameter", "exp_avg", "exp_avg_sq"])
def test_a_parameter_without_gradient_may_have_lost_its_memory(make, freed):
    given = parameters((5, 7), (11,), (3,))
    later = given[2].grad
    given[2].grad = None
    optimizer = make(given)
    optimizer.step()
    given[0].grad = None
    tensor = given[0] if freed == "parameter" else optimizer.state[given[0]][freed]
    tensor.untyped_storage().resize_(0)
    optimizer.step()
    given[2].grad = later
    assert replanned(optimizer)
    assert optimizer.state[given[2]]["exp_avg"].any()


def test_state_that_was_replaced_while_its_parameter_has_no_gradient_is_freed(make):
    given = parameters((5, 7), (11,))
    optimizer = make(given)
    optimizer.step()
    given[0].grad = None
    replaced = weakref.ref(optimizer.state[given[0]]["exp_avg"])
    optimizer.state[given[0]]["exp_avg"] = optimizer.state[given[0]]["exp_avg"].clone()
    optimizer.step()
    gc.collect()
    assert replaced() is None


def test_state_that_is_moved_frees_its_memory_at_once(make):
    given = parameters((5, 7), (11,))
    optimizer = make(given)
    optimizer.step()
    state = optimizer.state[given[0]]["exp_avg"]
    memory = StorageWeakRef(state.untyped_storage())
    state.data = state.data.clone()
    assert memory.expired()


def test_models_may_swap_their_tensors_between_steps(make):
    model = torch.nn.Linear(4, 4)
    optimizer = make(model.parameters())
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for _ in range(4):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        model.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
    assert model.weight.dtype == model.weight.grad.dtype == torch.float64


def test_a_kept_gradient_that_becomes_the_negative_of_itself_is_noticed(make):
    results = []
    for stands_for_its_negative in (False, True):
        given = parameters((5, 7), (11,))
        optimizer = make(given, lr=1e-2)
        for _ in range(3):
            optimizer.step()
        for p in given:
            p.grad.data = torch._neg_view(p.grad.data) if stands_for_its_negative else -p.grad.data
        for _ in range(3):
            optimizer.step()
        assert optimizer.backends == ["cpu"]
        results.append(given)
    for p, q in zip(*results, strict=True):
        assert torch.equal(p, q)


def test_a_gradient_that_no_kernel_takes_does_not_keep_kernels_away(make):
    given = parameters((4,))
    optimizer = make(given)
    given[0].grad = torch._efficientzerotensor(4)
    optimizer.step()
    assert optimizer.backends == ["reference"]
    given[0].grad = torch.ones(4)
    optimizer.step()
    assert optimizer.backends == ["cpu"]


class WithGradientThatMayFail(torch.nn.Parameter):
    fails = False

    @property
    def grad(self):
        if type(self).fails:
            raise KeyboardInterrupt
        return self.other_grad

    @grad.setter
    def grad(self, value):
        self.other_grad = value


def test_a_step_after_an_interrupted_one_counts_as_a_change_of_every_parameter(make):
    one, other = torch.nn.Parameter(torch.ones(4)), WithGradientThatMayFail(torch.ones(3))
    one.grad, other.grad = torch.ones(4), torch.ones(3)
    optimizer = make([one, other])
    optimizer.step()
    one.grad = None
    optimizer.step()
    one.grad = torch.ones(4)
    WithGradientThatMayFail.fails = True
    try:
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    finally:
        WithGradientThatMayFail.fails = False
    before = one._version
    optimizer.step()
    assert one._version == before + 1
