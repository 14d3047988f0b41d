"""The choice of backend, and what `python -m agr_cuda` says of it."""

import subprocess
import sys

import pytest
import torch

import agr_cuda
import agr_cuda.cuda


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


def test_the_report_names_every_backend_and_what_is_wrong_with_it():
    done = subprocess.run([sys.executable, "-m", "agr_cuda"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    there, chosen = done.stdout.split("\nbackends\n")[1].split("which backend")
    for name in ("cuda", "triton", "cpu", "reference"):
        (line,) = [line for line in there.splitlines() if line.strip().startswith(f"{name} ")]
        emulated = name == "cuda" and agr_cuda.cuda.rehearsing()  # in this process alone
        assert ("yes" in line) == (name in agr_cuda.available_backends() and not emulated)
        assert "yes" in line or "no: " in line
    (cpu,) = [line for line in chosen.splitlines() if line.strip().startswith("cpu ")]
    assert cpu.split() == ["cpu", "cpu", "cpu", "cpu", "cpu", "reference"]
