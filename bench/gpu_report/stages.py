"""The stages of the GPU report: what each one runs, and what of its output the summary tells.

Everything runs in processes of its own, with the Python that runs the report. Nothing here changes a setting of the
GPU: it is measured as it is found, ncu included, which would otherwise hold its clocks at their base.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from bench.gpu_report import counters, digests
from bench.gpu_report.place import KERNEL, Place, python, tool
from bench.gpu_report.runner import Command, Digest, Run, Stage

TAG = "gpu-report"
SETS = ("gpt2", "resnet50", "vit-b-16", "llama-3.2-1b", "321x64", "321x4096")
CONTENDERS = (
    *("agr-adamw", "agr-adamw-triton", "agr-adamw-off", "torch-adamw-fused", "torch-adamw-foreach"),
    *("three-lines", "three-lines-compiled", "optimi-adamw-triton"),
    *("agr-adan", "agr-adan-triton", "agr-adan-off", "reference-adan", "optimi-adan-triton"),
)
# Beside float32, what a step of PRECISION_SET stores its numbers as.
FORMATS = ("bfloat16", "bfloat16-stochastic", "bfloat16-master", "float32-8bit", "bfloat16-8bit")
PRECISION_SET = "gpt2"
PEERS_OF_FORMATS = (
    *("torch-adamw-fused-bfloat16", "torch-adamw-fused-master", "optimi-adamw-kahan"),
    *("bitsandbytes-adamw-float32-8bit", "bitsandbytes-adamw-bfloat16-8bit"),
)
# They compile themselves for each of the set's shapes anew: in a run of their own, which costs nobody else's figures.
COMPILING_PEERS = tuple(f"torchao-adamw-{name}" for name in ("bfloat16-stochastic", "float32-8bit", "bfloat16-8bit"))
SWEPT = ("agr-adamw", "agr-adamw-triton", "torch-adamw-fused", "torch-adamw-foreach", "agr-adan", "agr-adan-triton")
PREDICTED_SETS = ("gpt2", "vit-b-16", "llama-3.2-1b")
KERNELS = "agr_"  # in the names of all kernels of the cuda backend
# Tests that a GPU makes a difference to: those of its backends, by the names in their parameters, and its own file.
TESTS = "({} or test_gpu) and not (native or packaging or gpu_report or test_bench)"
BACKENDS = ("cuda", "triton")  # those of a GPU
MOST_FAILURES = 25  # of tests, before the rest is left
QUERY = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu"

VERSIONS = """
import json, platform, sys
from importlib import metadata
packages = "torch triton numpy pytest pytest-xdist hypothesis transformers timm matplotlib rich".split()
found = {"python": platform.python_version(), "executable": sys.executable}
for package in packages:
    try:
        found[package] = metadata.version(package)
    except metadata.PackageNotFoundError:
        found[package] = None
print(json.dumps(found))
"""
# Where the core could not be compiled with the CUDA kernels, it is without: the triton backend needs no more of it.
WITHOUT_CUDA = """
import subprocess, sys
from agr_cuda import native
if native.why_missing():
    sys.exit(subprocess.run(sys.argv[1:]).returncode)
"""
# Why a backend is not there, or null; and what the core was built for.
WHICH_BACKENDS = """
import json, sys
from agr_cuda import backends, native
reasons = {name: backends.why_missing(name) for name in backends.BACKENDS}
built_for = "" if native.why_missing() else native.native().cuda_architectures
with open(sys.argv[1], "w") as file:
    json.dump({"reasons": reasons, "built_for": built_for}, file)
"""


def no_digest(runs: Sequence[Run]) -> Digest:
    """Read nothing: the exit codes say everything."""
    return Digest()


def machine(place: Place) -> Stage:
    """Tell where the figures come from: GPU, driver, compiler, versions."""

    def commands() -> list[Command]:
        queries = {"nvidia-smi": (f"--query-gpu={QUERY}", "--format=csv,noheader"), "nvcc": ("--version",)}
        found = [Command((path, *words)) for name, words in queries.items() if (path := shutil.which(name))]
        return [*found, python("-c", VERSIONS)]

    def digest(runs: Sequence[Run]) -> Digest:
        output = {Path(run.command.words[0]).name: run.output.strip() for run in runs[:-1]}
        versions = json.loads(runs[-1].output.strip().splitlines()[-1])
        release = re.search(r"release ([\d.]+)", output.get("nvcc", ""))
        versions["nvcc"] = release[1] if release else None
        shown = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "triton", "nvcc"))
        query = output.get("nvidia-smi", "")
        values = dict(zip(QUERY.split(","), query.splitlines()[0].split(", "), strict=False)) if query else {}
        driver = values.get("driver_version", "not told")
        return Digest([f"driver {driver}, {shown}"], {"versions": versions, "nvidia_smi": values})

    return Stage("machine", 10, commands, digest)


def build(place: Place) -> Stage:
    """Install the package from source, for this GPU alone; without CUDA kernels if they cannot be compiled."""

    def commands() -> list[Command]:
        options = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check")
        architecture = "{}{}".format(*place.capability)
        install = python("-m", "pip", "install", "-v", *options, "--editable", str(place.root))
        return [
            # With the lines of the source, for ncu.
            Command(
                install.words,
                {**install.environment, "AGR_CUDA_ARCHS": architecture, "NVCC_APPEND_FLAGS": "-lineinfo"},
            ),
            python("-c", WITHOUT_CUDA, *install.words, AGR_CUDA_ARCHS="none"),
            python("-m", "agr_cuda"),
            python("-c", WHICH_BACKENDS, str(place.backends)),
        ]

    def digest(runs: Sequence[Run]) -> Digest:
        spills = [line.strip() for line in runs[0].output.splitlines() if re.search(r"[1-9]\d* bytes spill", line)]
        missing = {name: reason for name in BACKENDS if (reason := place.why_missing(name))}
        lines = [f"installed in {runs[0].seconds:.0f} s", *spills[:3]]
        lines += [f"no {name} backend: {reason}" for name, reason in missing.items()]
        # Without nvcc there is no cuda backend, and the report is about triton.
        built = json.loads(place.backends.read_text())["built_for"]
        wrong = len(missing) == len(BACKENDS) or ("cuda" in missing and built)
        problem = "; ".join(f"the {name} backend is not there" for name in missing) if wrong else ""
        return Digest(lines, {"install_s": runs[0].seconds, "spills": spills, "missing": missing}, problem)

    return Stage("build", 50, commands, digest)


def tests(place: Place) -> Stage:
    """Run the tests of the GPU's backends."""
    report = place.work / "tests.xml"

    def commands() -> list[Command]:
        names = [name for name in BACKENDS if place.why_missing(name) is None]
        options = [
            "-v",
            "-k",
            TESTS.format(" or ".join(names or BACKENDS)),
            "--maxfail",
            str(MOST_FAILURES),
            "--junitxml",
            str(report),
        ]
        # More processes would wait for one GPU, and each takes half a gigabyte of its memory.
        parallel = ["-n", "8"] if find_spec("xdist") else []
        # A kernel that never ends takes its process with it, and xdist carries on with another one.
        hang = ["--timeout", "40", "--timeout-method", "thread"] if parallel and find_spec("pytest_timeout") else []
        return [python("-m", "pytest", *options, *parallel, *hang, "-p", "no:cacheprovider")]

    def digest(runs: Sequence[Run]) -> Digest:
        return digests.junit(report) if report.exists() else digests.stopped_tests(runs[-1].output)

    return Stage("tests", 98, commands, digest)


def sanitizer(place: Place) -> Stage:
    """Look for bad accesses, and for races in shared memory."""
    tools = ("memcheck", "racecheck")
    summary = re.compile(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", re.MULTILINE)

    def commands() -> list[Command]:
        place.needs_cuda()
        program = tool("compute-sanitizer")
        # PyTorch's own kernels and calls are not what is looked at; its cache of memory would hide accesses that leave
        # a tensor, and padding keeps two tensors from lying side by side.
        options = ["--kernel-name", f"kns={KERNELS}", "--report-api-errors", "no", "--error-exitcode", "9"]
        exercise = python("-m", "bench.gpu_report.exercise", "check", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        return [
            Command((program, "--tool", name, *options, *padding, *exercise.words), exercise.environment, 40.0)
            for name, padding in (("memcheck", ["--padding", "32"]), ("racecheck", []))
        ]

    def digest(runs: Sequence[Run]) -> Digest:
        found = {name: summary.findall(run.output) for name, run in zip(tools, runs, strict=True)}
        lines = [f"{name}: {'; '.join(texts) or 'no summary'}" for name, texts in found.items()]
        wrong = [line for run in runs for line in run.output.splitlines() if line.startswith("WRONG")]
        problem = "" if all(found.values()) else "a tool did not come to its summary"
        return Digest([*lines, *wrong[:5]], {"summaries": found, "wrong": wrong}, problem)

    return Stage("sanitizer", 50, commands, digest)


def step(place: Place) -> Stage:
    """Time steps beside other optimizers."""

    def commands() -> list[Command]:
        def benchmark(dtype: str, seconds: int, sets: Sequence[str]) -> Command:
            options = ("--device", "cuda", "--dtype", dtype, "--seconds", str(seconds), "--rounds", "400")
            return python(
                *("-m", "bench", "step", *options, "--contenders", *CONTENDERS, "--sets", *sets),
                *("--out", str(place.work), "--tag", TAG),
            )

        return [benchmark("float32", 4, SETS), benchmark("bfloat16", 4, SETS[:1])]

    def digest(runs: Sequence[Run]) -> Digest:
        documents = digests.read_all(place.work, f"step-cuda-*float*-{TAG}.json")
        lines = [line for document in documents.values() for line in digests.step_table(document)]
        targets = [target for document in documents.values() for target in document["targets"]]
        sets = {name: digests.medians(document) for name, document in documents.items()}
        return Digest(lines, {"targets": targets, "sets": sets})

    return Stage("step", 105, commands, digest)


def precision(place: Place) -> Stage:
    """Time steps that store their numbers in other formats."""

    def commands() -> list[Command]:
        def benchmark(tag: str, contenders: Sequence[str], limit: float | None = None) -> Command:
            return python(
                *("-m", "bench", "step", "--device", "cuda", "--seconds", "4", "--rounds", "400"),
                *("--contenders", *contenders, "--sets", PRECISION_SET, "--out", str(place.work), "--tag", tag),
                limit=limit,
            )

        which = "" if place.why_missing("cuda") is None else "-triton"
        ours = [f"agr-adamw{stored}{which}" for stored in ("", *(f"-{name}" for name in FORMATS))]
        compiling = [benchmark(f"{TAG}-compiling", COMPILING_PEERS)] if find_spec("torchao") else []
        return [benchmark(TAG, [*ours, *PEERS_OF_FORMATS], 20.0 if compiling else None), *compiling]

    def digest(runs: Sequence[Run]) -> Digest:
        documents = digests.read_all(place.work, f"step-cuda-precision-{TAG}*.json")
        sets = {name: digests.medians(document) for name, document in documents.items()}
        return Digest(digests.precision_table(list(documents.values())), {"sets": sets})

    return Stage("precision", 20, commands, digest)


def memory(place: Place) -> Stage:
    """Count the bytes of state, and what a step allocates."""

    def commands() -> list[Command]:
        ours = [f"agr-{rule}-{stored}" for rule in ("adamw", "adan") for stored in FORMATS]
        contenders = [*(name for name in CONTENDERS if "compiled" not in name), *ours, *PEERS_OF_FORMATS]
        options = ("--device", "cuda", "--sets", PRECISION_SET, "--out", str(place.work), "--tag", TAG)
        return [python("-m", "bench", "memory", *options, "--contenders", *contenders)]

    def digest(runs: Sequence[Run]) -> Digest:
        document = json.loads((place.work / f"memory-cuda-{TAG}.json").read_text())
        return Digest(digests.memory_table(document), {"targets": document["targets"], "rows": document["rows"]})

    return Stage("memory", 20, commands, digest)


def sweep(place: Place) -> Stage:
    """Time steps of many sizes and numbers of tensors."""

    def commands() -> list[Command]:
        points = ("--counts", "1", "256", "--elements", *(str(4**power) for power in (6, 8, 10, 12, 13)))
        options = ("--device", "cuda", "--seconds", "6", "--rounds", "40", "--out", str(place.work), "--tag", TAG)
        return [python("-m", "bench", "sweep", *points, *options, "--contenders", *SWEPT)]

    def digest(runs: Sequence[Run]) -> Digest:
        document = json.loads((place.work / f"sweep-cuda-{TAG}.json").read_text())
        return Digest(digests.sweep_table(document), {"sets": digests.medians(document)})

    return Stage("sweep", 30, commands, digest)


def overhead(place: Place) -> Stage:
    """Time the host's part of a step."""

    def commands() -> list[Command]:
        options = ("--device", "cuda", "--steps", "400", "--out", str(place.work), "--tag", TAG)
        return [python("-m", "bench", "overhead", *options)]

    def digest(runs: Sequence[Run]) -> Digest:
        document = json.loads((place.work / f"overhead-cuda-{TAG}.json").read_text())
        return Digest(digests.overhead_lines(document), {"targets": document["targets"]})

    return Stage("overhead", 20, commands, digest)


def gradients(place: Place) -> Stage:
    """Time steps as gradients come and go."""

    def commands() -> list[Command]:
        options = ("--device", "cuda", "--steps", "100", "--seconds", "0.6", "--out", str(place.work), "--tag", TAG)
        return [python("-m", "bench", "gradients", *options)]

    def digest(runs: Sequence[Run]) -> Digest:
        document = json.loads((place.work / f"gradients-cuda-{TAG}.json").read_text())
        return Digest(digests.gradients_lines(document), {"targets": document["targets"]})

    return Stage("gradients", 7, commands, digest)


def traffic(place: Place) -> Stage:
    """Predict what the profile measures."""

    def commands() -> list[Command]:
        def predict(dtype: str, sets: Sequence[str]) -> Command:
            options = ("--dtype", dtype, "--out", str(place.work), "--tag", TAG)
            return python("-m", "bench", "traffic", "--sets", *sets, *options)

        return [predict("float32", PREDICTED_SETS), predict("bfloat16", PREDICTED_SETS[:1])]

    return Stage("traffic", 25, commands, no_digest)


def profile(place: Place) -> Stage:
    """Count DRAM's bytes."""
    cases, table = place.work / "profile-cases.json", place.work / "profile.csv"
    report = place.work / f"{KERNEL}-gpt2.ncu-rep"

    def commands() -> list[Command]:
        place.needs_cuda()
        ncu = tool("ncu")
        always = (ncu, "--clock-control", "none", "--profile-from-start", "off", "--kernel-name", f"regex:{KERNEL}")
        metrics = ("--metrics", ",".join(counters.METRICS))
        as_csv = ("--csv", "--page", "raw", "--print-units", "base", "--print-metric-name", "name")
        exercise = python("-m", "bench.gpu_report.exercise", "profile", str(cases))
        one = python("-m", "bench.gpu_report.exercise", "profile", str(place.work / "one-case.json"), "--only", "0")
        environment = exercise.environment
        return [
            Command((*always, *metrics, *as_csv, "--log-file", str(table), *exercise.words), environment, 40.0),
            Command((*always, "--set", "full", "--force-overwrite", "--export", str(report), *one.words), environment),
            Command((ncu, "--import", str(report), "--page", "details")),
        ]

    def digest(runs: Sequence[Run]) -> Digest:
        found = counters.kernels(table.read_text().splitlines())
        predictions = counters.predictions(place.work)
        records = counters.compare(json.loads(cases.read_text()), found, predictions)
        return Digest(counters.compared(records), {"steps": records})

    return Stage("profile", 55, commands, digest)


def tactics(place: Place) -> Stage:
    """Time the CUDA kernel without each of its tactics."""
    path = place.work / "tactics.json"

    def commands() -> list[Command]:
        place.needs_cuda()
        return [python("-m", "bench.gpu_report.tactics", "--device", "cuda", "--seconds", "4", "--out", str(path))]

    def digest(runs: Sequence[Run]) -> Digest:
        document = json.loads(path.read_text())
        alone, together = document["alone"]["rows"], document["together"]["rows"]
        return Digest(digests.tactics_tables(alone, together), {"alone": alone, "together": together})

    return Stage("tactics", 55, commands, digest)


def tune(place: Place) -> Stage:
    """Sweep the CUDA launch's tunables."""
    path = place.work / "tune.json"

    def commands() -> list[Command]:
        place.needs_cuda()
        return [python("-m", "bench.gpu_report.tune", "--device", "cuda", "--seconds", "5", "--out", str(path))]

    def digest(runs: Sequence[Run]) -> Digest:
        document = json.loads(path.read_text())
        sweep, together = document["sweep"]["rows"], document["together"]["rows"]
        return Digest(digests.tune_tables(sweep, together), {"sweep": sweep, "together": together})

    return Stage("tune", 40, commands, digest)


def train(place: Place) -> Stage:
    """Train models of the paper's size with AGR, without, and with controls."""

    def commands() -> list[Command]:
        options = ("--device", "cuda", "--jobs", "4", "--minutes", "5.4", "--out", str(place.work), "--tag", TAG)
        return [python("-m", "bench", "train", "--setting", "large", *options)]

    def digest(runs: Sequence[Run]) -> Digest:
        document = json.loads((place.work / f"train-{TAG}.json").read_text())
        return Digest(digests.training_table(document), {"runs": document["runs"]})

    return Stage("train", 358, commands, digest)


STAGES: dict[str, Callable[[Place], Stage]] = {
    made.__name__: made
    for made in (
        machine,
        build,
        tests,
        sanitizer,
        step,
        precision,
        memory,
        sweep,
        overhead,
        gradients,
        traffic,
        profile,
        tactics,
        tune,
        train,
    )
}
#: Stages that are run where they are asked for: together they take nearly as long again as the others.
APART = {"memory", "sweep", "train"}
BY_DEFAULT = [name for name in STAGES if name not in APART]
