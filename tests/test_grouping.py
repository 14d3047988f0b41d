"""parameter_groups: which parameters have weight decay and AGR."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import agr_cuda


class Model(nn.Module):
    """One parameter of every kind, tied embeddings, and layers that differ in their number alone."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.position = nn.Parameter(torch.zeros(1, 5, 8))
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(3))
        self.wide_norm = nn.LayerNorm((4, 8))
        self.convolution = nn.Conv1d(8, 4, 3)
        self.batch_norm = nn.BatchNorm1d(4)
        self.gain = nn.Parameter(torch.ones(8))
        self.relative_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.temperature = nn.Parameter(torch.zeros(()))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight


def names_by_options(groups):
    return {(group["weight_decay"], group["agr"]): set(group["param_names"]) for group in groups}


def test_matrices_have_decay_and_agr_and_others_neither():
    model = Model()
    groups = agr_cuda.parameter_groups(model, weight_decay=0.1)
    found = names_by_options(groups)
    assert list(found) == [(0.1, True), (0.0, False)]
    matrices = {"embedding.weight", "position", "convolution.weight"}
    for i in range(3):
        of_layer = "self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"
        matrices |= {f"layers.{i}.{name}" for name in of_layer}
    assert found[0.1, True] == matrices
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert found[0.0, False] == trained - matrices
    named = dict(model.named_parameters())
    for group in groups:
        assert len(group["params"]) == len(group["param_names"])
        assert all(p is named[name] for name, p in zip(group["param_names"], group["params"], strict=True))
    kinds = groups.kinds
    assert {kinds[name] for name in ("wide_norm.weight", "batch_norm.bias", "layers.0.norm1.weight")} == {"norm"}
    assert kinds["relative_bias_table"] == kinds["layers.0.linear1.bias"] == "bias"
    assert (kinds["gain"], kinds["temperature"], kinds["embedding.weight"]) == ("vector", "scalar", "embedding")


def test_kinds_choose_what_has_decay_and_agr():
    groups = agr_cuda.parameter_groups(
        Model(), 0.2, weight_decay_on=("matrix",), agr_on=("matrix", "embedding", "norm", "bias", "vector")
    )
    found = names_by_options(groups)
    assert "embedding.weight" in found[0.0, True]
    assert "gain" in found[0.0, True]
    assert found[0.0, False] == {"temperature"}
    assert "position" in found[0.2, True]
    without = names_by_options(agr_cuda.parameter_groups(Model(), 0.2, agr=False))
    assert set(without) == {(0.2, False), (0.0, False)}


def test_names_patterns_and_the_model_exclude():
    model = Model()
    model.no_weight_decay = lambda: {"position"}
    groups = agr_cuda.parameter_groups(model, exclude=["layers.*.linear1.weight", "head.*"])
    excluded = {name for name, kind in groups.kinds.items() if kind == "excluded"}
    # A pattern fits a tied parameter under any of its names.
    assert excluded == {"position", "embedding.weight", *(f"layers.{i}.linear1.weight" for i in range(3))}
    assert excluded <= names_by_options(groups)[0.0, False]


def test_groups_train_and_keep_names():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))
    for make in (agr_cuda.AdamW, agr_cuda.Adan, torch.optim.AdamW):
        optimizer = make(agr_cuda.parameter_groups(model, 0.5), lr=0.1)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
        assert [group["agr"] for group in optimizer.param_groups] == [True, False]
        assert optimizer.param_groups[0]["param_names"] == ["0.weight", "2.weight"]
        before = [p.detach().clone() for p in model.parameters()]
        model(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
        assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_the_table():
    lines = repr(agr_cuda.parameter_groups(Model(), 0.1)).splitlines()
    assert lines[0].split() == ["group", "parameters", "kind", "tensors", "elements", "weight_decay", "agr"]
    rows = {line.split()[1]: line.split() for line in lines[1:-1]}
    assert rows["layers.*.linear1.weight"] == ["0", "layers.*.linear1.weight", "matrix", "3", "384", "0.1", "True"]
    assert rows["temperature"] == ["1", "temperature", "scalar", "1", "1", "0.0", "False"]
    assert lines[-1] == "left out, since they require no gradient: 2 tensors"
    assert repr(agr_cuda.parameter_groups(nn.Linear(2, 2).requires_grad_(False))).splitlines()[1:] == [
        "left out, since they require no gradient: 2 tensors"
    ]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": [torch.zeros(2)]}, TypeError, "model is a list; it must be a torch.nn.Module"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay is -1.0; it must be at least 0"),
        ({"agr": "no"}, TypeError, "agr is 'no'; it must be True or False"),
        ({"agr_on": ("scalar",)}, ValueError, "agr_on has 'scalar'; it must be a collection of 'excluded', 'norm'"),
        ({"agr_on": "matrix"}, TypeError, "agr_on is 'matrix'; it must be a collection"),
        ({"weight_decay_on": None}, TypeError, "weight_decay_on is None; it must be a collection"),
        ({"exclude": [5]}, TypeError, "exclude has 5; it must be a list of names"),
        ({"weight_decay_on": ("matrices",)}, ValueError, "weight_decay_on has 'matrices'; it must be a collection"),
        ({"exclude": "bias"}, TypeError, "exclude is 'bias'; it must be a list"),
        ({"exclude": ["*.bais"]}, ValueError, r"exclude has '\*.bais', which no parameter's name fits; names are 'pos"),
        ({"model": nn.LazyLinear(3)}, ValueError, "weight has no shape yet"),
    ],
)
def test_what_is_wrong_is_named(options, error, message):
    with pytest.raises(error, match=message):
        agr_cuda.parameter_groups(**{"model": Model(), **options})


def test_flat_parameters_are_refused():
    model = nn.Linear(3, 3)
    model.weight._fsdp_flattened = True
    with pytest.raises(RuntimeError, match="weight is a piece of a flat parameter of FullyShardedDataParallel"):
        agr_cuda.parameter_groups(model)


def test_wrapped_models_have_the_same_kinds():
    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 2, 8))
            self.w = nn.ParameterDict({"[0]": torch.zeros(2, 2), "0": torch.zeros(2, 2)})

        def no_weight_decay(self):
            return {"token", "one_that_other_sizes_have"}

    wrapped = (Vision(), torch.compile(Vision()), nn.DataParallel(Vision()), nn.Sequential(Vision()))
    for model in wrapped:
        kinds = agr_cuda.parameter_groups(model).kinds
        assert {name.rpartition(".")[2]: kind for name, kind in kinds.items()} == {
            "token": "excluded",
            "[0]": "matrix",
            "0": "matrix",
        }
    for model in wrapped[:3]:
        kinds = agr_cuda.parameter_groups(model, exclude=["w.[0]"]).kinds
        assert sorted(name.rpartition(".")[2] for name, kind in kinds.items() if kind == "excluded") == ["[0]", "token"]
    no_names = Vision()
    no_names.no_weight_decay = lambda: None
    assert "excluded" not in agr_cuda.parameter_groups(no_names).kinds.values()
    no_names.no_weight_decay = lambda: "token"
    with pytest.raises(TypeError, match="no_weight_decay of the Vision is 'token'; it must be a set of names"):
        agr_cuda.parameter_groups(no_names)


def test_the_model_is_not_changed():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Embedding(10, 4)))
    before = copy.deepcopy(model.state_dict())
    groups = agr_cuda.parameter_groups(model)
    assert list(groups.kinds.values()) == ["embedding"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    replaced = nn.Embedding(10, 4)
    del replaced.weight
    replaced.register_parameter("packed", nn.Parameter(torch.zeros(5, 4)))
    assert agr_cuda.parameter_groups(replaced).kinds == {"packed": "embedding"}


def test_generators_are_read_once():
    found = agr_cuda.parameter_groups(Model(), weight_decay_on=(kind for kind in ("matrix",)))
    assert {group["weight_decay"] for group in found} == {0.01, 0.0}


def test_changed_groups_still_have_a_table():
    groups = agr_cuda.parameter_groups(nn.Linear(2, 2))
    groups[0]["params"] = [*groups[0]["params"], torch.zeros(3)]
    groups.append({"params": [torch.zeros(2)]})
    assert [line.split()[1] for line in repr(groups).splitlines()[1:]] == ["?", "bias", "?"]
