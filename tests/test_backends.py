"""The choice of backend, and what `python -m agr_cuda` says of it."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch

import agr_cuda
import agr_cuda.cuda
import agr_cuda.triton
from agr_cuda import backends, doctor
from agr_cuda.__main__ import main
from agr_cuda.tensors import GradientKind


def parameter(dtype=torch.float32, shape=(4, 6)):
    made = torch.nn.Parameter(torch.randn(shape).to(dtype))
    made.grad = torch.randn(shape).to(dtype)
    return made


def test_the_preferred_backend_comes_first():
    names = agr_cuda.available_backends()
    assert names[-1] == "reference"
    assert [name for name in ("cuda", "triton", "cpu", "reference") if name in names] == names
    assert "cpu" in names


@pytest.mark.parametrize("optimizer", [agr_cuda.AdamW, agr_cuda.Adan])
class TestChoice:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_the_cpu_kernels_take_floating_parameters_on_the_cpu(self, optimizer, dtype):
        made = optimizer([parameter(dtype)])
        assert made.backends == []
        made.step()
        assert made.backends == ["cpu"]

    @pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
    def test_the_reference_takes_complex_parameters(self, optimizer, dtype):
        made = optimizer([parameter(dtype), parameter()])
        made.step()
        assert made.backends == ["cpu", "reference"]

    def test_foreach_asks_for_the_reference(self, optimizer):
        made = optimizer([parameter()], foreach=True)
        made.step()
        assert made.backends == ["reference"]

    def test_fused_refuses_the_reference(self, optimizer):
        made = optimizer([parameter()], fused=True)
        made.step()
        assert made.backends == ["cpu"]
        with pytest.raises(RuntimeError, match=r"fused=True refuses the reference backend.*complex64"):
            optimizer([parameter(torch.complex64)], fused=True).step()

    def test_a_backend_asked_for_is_used_or_refused(self, optimizer):
        made = optimizer([parameter()], backend="reference")
        made.step()
        assert made.backends == ["reference"]
        with pytest.raises(RuntimeError, match=r"backend='cpu' does not take group 0, parameter 1.*complex64"):
            optimizer([parameter(), parameter(torch.complex64)], backend="cpu").step()

    def test_state_of_another_type_goes_to_the_reference(self, optimizer):
        given = parameter(torch.bfloat16)
        made = optimizer([given])
        made.step()
        made.state[given]["exp_avg"] = made.state[given]["exp_avg"].float()
        made.step()
        assert made.backends == ["reference"]
        assert made.state[given]["exp_avg"].dtype == torch.float32


def test_who_has_a_gpu_and_no_kernels_for_it_is_told_once(monkeypatch):
    monkeypatch.setattr("agr_cuda.optimizer.missing_kernels", lambda parameter, gradient: "cuda: no; triton: no")
    made = agr_cuda.AdamW([parameter(), parameter(torch.complex64)])  # a complex one goes to the reference
    with pytest.warns(UserWarning, match=r"group 0, parameter 1 is on cpu and no kernels .* slower: cuda: no; triton"):
        made.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.zero_grad()
        made.param_groups[0]["params"][1].grad = torch.ones(4, 6, dtype=torch.complex64)
        made.step()
        for asked in ({"backend": "reference"}, {"foreach": True}):
            agr_cuda.AdamW([parameter(torch.complex64)], **asked).step()


def test_missing_kernels_are_those_of_a_gpu(monkeypatch):
    class OnGpu(torch.Tensor):
        device = torch.device("cuda", 0)

    monkeypatch.setattr(backends, "is_plain", lambda tensor: True)
    on_gpu, kind = parameter().detach().as_subclass(OnGpu), GradientKind.of(parameter(), torch.ones(4, 6))
    monkeypatch.setattr(backends, "why_missing", lambda backend: f"no {backend}")
    assert backends.missing_kernels(on_gpu, kind) == "cuda: no cuda; triton: no triton"
    assert backends.missing_kernels(on_gpu, kind._replace(plain=False)) == ""
    assert backends.missing_kernels(on_gpu.int(), kind) == ""
    assert backends.missing_kernels(parameter(), kind) == "no cpu"
    monkeypatch.setattr(backends, "why_missing", lambda backend: "no" if backend == "cuda" else None)
    assert backends.missing_kernels(on_gpu, kind) == ""


def run_report(*options):
    """`python -m agr_cuda` without Triton's interpreter, in which it would take half a minute."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "agr_cuda", *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done


def available_elsewhere():
    """The names of the backends that are there without an emulation, which is of this process alone."""
    emulated = {"cuda": agr_cuda.cuda.rehearsing(), "triton": agr_cuda.triton.interpreting()}
    return {name for name in agr_cuda.available_backends() if not emulated.get(name)}


def test_the_report_names_every_backend_and_what_is_wrong_with_it():
    done = run_report()
    there, chosen = done.stdout.split("\nbackends\n")[1].split("\nsteps on")[0].split("which backend")
    for name in ("cuda", "triton", "cpu", "reference"):
        (line,) = [line for line in there.splitlines() if line.strip().startswith(f"{name} ")]
        assert ("yes" in line) == (name in available_elsewhere())
        assert "yes" in line or "no: " in line
    (cpu,) = [line for line in chosen.splitlines() if line.strip().startswith("cpu ")]
    assert cpu.split() == ["cpu", "cpu", "cpu", "cpu", "cpu", "reference"]


def test_the_report_as_json_has_a_trial_of_every_backend():
    report = json.loads(run_report("--json").stdout)
    assert report["versions"]["torch"].startswith(torch.__version__)
    assert report["backends"]["reference"] is None
    assert report["choice"]["cpu"]["bfloat16"] == "cpu"
    tried = {(trial["backend"], trial["optimizer"], trial["dtype"]) for trial in report["trials"]}
    for backend in available_elsewhere() - {"reference"}:
        assert {(backend, "AdamW", "float32"), (backend, "Adan", "bfloat16")} <= tried
    assert report["healthy"]


def test_a_backend_that_is_wrong_is_found_out(monkeypatch, capsys):
    step = agr_cuda.AdamW.step

    def wrong(self):
        step(self)
        if self.backend == "cpu":
            with torch.no_grad():
                self.param_groups[1]["params"][-1].view(-1)[-1] += 1e-4

    monkeypatch.setattr(agr_cuda.AdamW, "step", wrong)
    monkeypatch.setattr(agr_cuda.Adan, "step", lambda self: 1 / 0)
    report = doctor.examine()
    assert not report.healthy
    found = {(trial.optimizer, trial.dtype): trial for trial in report.trials if trial.backend == "cpu"}
    assert not found["AdamW", "float32"].passed
    assert found["Adan", "float32"].error == "ZeroDivisionError: division by zero"
    monkeypatch.setattr(sys, "argv", ["agr_cuda"])
    monkeypatch.setattr("agr_cuda.__main__.examine", lambda: report)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "WRONG: ZeroDivisionError" in capsys.readouterr().out
