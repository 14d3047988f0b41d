"""Train a small GPT on Python source with AdamW, AGR-AdamW, Adan and AGR-Adan side by side.

The text is available on every machine: the source of Python's standard library, with bytes as tokens. All
optimizers start from the same weights and see the same batches. Each makes one step per batch in turn, so that
other load on the machine slows them all alike. Every tenth file is held out, and the reported loss is on those
files.

Needs: pip install "agr-cuda[examples]"
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from command_line import add_machine_options, add_optimizer_options, device_option, number, prepare, whole
from common import Run, clock, in_turn, start_runs
from corpus import STANDARD_LIBRARY, Corpus, read_corpus
from gpt import GPT, generate
from matplotlib.figure import Figure
from report import print_table, progress_bar, save_report, smoothed, start_picture
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from torch import Tensor, nn
from torch.nn import functional as F

# Sizes that one CPU core, or a GPU, can train in a few minutes with all four optimizers.
ON_CPU = {"steps": 1000, "batch_size": 8, "context": 64, "layers": 3, "width": 128, "heads": 4}
ON_GPU = {"steps": 600, "batch_size": 64, "context": 256, "layers": 6, "width": 384, "heads": 6}
# Learning rates for these models. On a CPU: of a few that were tried, those with the lowest held-out loss without AGR.
# On a GPU: lower ones, for the wider model. Adan's are larger, as its authors advise.
RATES_ON_CPU = {"adamw_lr": 3e-3, "adan_lr": 1e-2}
RATES_ON_GPU = {"adamw_lr": 1.5e-3, "adan_lr": 5e-3}


def parse_options(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Return the parser, for later error messages, and the options. Defaults of sizes depend on --device."""
    early = device_option()
    on = early.parse_known_args(arguments)[0].device
    on_gpu = on.type == "cuda"
    sizes, rates = (ON_GPU, RATES_ON_GPU) if on_gpu else (ON_CPU, RATES_ON_CPU)
    bfloat16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=f"The defaults of steps, batch, model, dtype and learning rates depend on --device: these are for {on}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        parents=[early],
        allow_abbrev=False,
    )
    parser.add_argument("--steps", metavar="N", type=whole(1), help="training steps of each optimizer")
    parser.add_argument("--batch-size", metavar="N", type=whole(1), help="sequences in a batch")
    parser.add_argument(
        "--context", metavar="N", type=whole(2), help="bytes in a sequence: how far back the model sees"
    )
    parser.add_argument("--layers", metavar="N", type=whole(1), help="blocks of the model")
    parser.add_argument("--width", metavar="N", type=whole(1), help="width of the model, a multiple of --heads")
    parser.add_argument("--heads", metavar="N", type=whole(1), help="attention heads of a block")
    parser.set_defaults(**sizes)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16" if bfloat16 else "float32",
        help="type of matrix products: bfloat16 uses autocast; weights stay float32",
    )
    text = parser.add_argument_group("text")
    text.add_argument("--text", type=Path, default=STANDARD_LIBRARY, metavar="DIR", help="folder to train on")
    text.add_argument(
        "--pattern", default="*.py", metavar="GLOB", help="names of the files to read there, in subfolders too"
    )
    text.add_argument(
        "--text-size", metavar="X", type=number(above=True), default=8.0, help="MB of text to read at most"
    )
    text.add_argument(
        "--evaluations", metavar="N", type=whole(1), default=12, help="how often to take the held-out loss"
    )
    text.add_argument("--held-out-batches", metavar="N", type=whole(1), default=32, help="batches of one evaluation")
    text.add_argument(
        "--sample-length",
        metavar="N",
        type=whole(0),
        default=400,
        help="bytes of text that the best model writes at the end; 0: none",
    )
    add_machine_options(
        parser,
        output="runs/language_model",
        seed_help="seed of the initial weights and of the batches",
    )
    add_optimizer_options(parser, **rates, weight_decay=0.1, warmup=0.1)
    options = parser.parse_args(arguments)
    if options.width % options.heads:
        parser.error(f"argument --width: {options.width} is not a multiple of --heads {options.heads}")
    prepare(parser, options)
    return parser, options


def train(options: argparse.Namespace, corpus: Corpus, runs: Sequence[Run], console: Console) -> None:
    """Train every run by one step for each batch, and evaluate all runs at regular intervals."""
    on = options.device
    now = clock(on)
    batches = corpus.batches(options.batch_size, options.context, options.seed)
    held_out = corpus.evaluation(options.held_out_batches, options.batch_size, options.context)
    held_out = [batch.to(on) for batch in held_out]
    evaluate_after = {round(options.steps * i / options.evaluations) for i in range(options.evaluations + 1)}

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast(on.type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())

    @torch.no_grad()
    def held_out_loss(model: nn.Module) -> float:
        return sum(loss(model, batch).item() for batch in held_out) / len(held_out)

    with progress_bar(console) as progress:
        bars = {run: progress.add_task(run.variant.label, total=options.steps, note="") for run in runs}
        for step in range(options.steps + 1):
            if step in evaluate_after:
                for run in runs:
                    run.record(held_out_loss=held_out_loss(run.model))
            if step == options.steps:
                break
            batch = next(batches).to(on)
            for run in in_turn(runs, step):
                # The default binds this iteration's batch. mypy infers no type for a lambda with a default.
                run.advance(lambda model, batch=batch: loss(model, batch), now)  # type: ignore[misc]
                progress.update(bars[run], advance=1, note=f"loss {run.train_loss[-1]:.2f}")


def report(
    options: argparse.Namespace, runs: Sequence[Run], console: Console, seconds: float, interrupted: bool
) -> None:
    """Print the table, and save the picture and results.json."""
    best = min(runs, key=final_loss)

    def cell(group: list[Run], unit: float, form: str) -> str:
        (run,) = group
        if not run.evaluated_at:
            return "-"
        shown = format(run.last("held_out_loss") / unit, form)
        return f"[bold]{shown}[/]" if run is best else shown

    done = max(len(run.train_loss) for run in runs)
    title = f"{done} steps in {seconds:.0f} s"
    if interrupted:
        last = max(run.evaluated_at[-1] if run.evaluated_at else 0 for run in runs)
        title = f"{done} of {options.steps} steps in {seconds:.0f} s, last evaluated after {last}"
    print_table(
        console,
        title,
        "Loss: nats per byte of files never trained on. It is one run from one seed: small differences "
        "are chance, as another --seed shows.",
        {
            "Held-out\nloss": lambda group: cell(group, 1.0, ".4f"),
            "Bits\nper byte": lambda group: cell(group, math.log(2), ".3f"),
        },
        runs,
    )
    figure = draw_curves(options, runs)
    save_report(console, figure, options, runs, seconds=seconds, interrupted=interrupted)


def draw_curves(options: argparse.Namespace, runs: Sequence[Run]) -> Figure:
    """Draw training loss, held-out loss, and the change of the held-out loss of each rule by AGR."""
    size = sum(p.numel() for p in runs[0].model.parameters()) / 1e6
    figure, (training, held_out, difference) = start_picture(
        f"A GPT of {size:.1f} million parameters learns {options.pattern} files, byte by byte",
        ("Training, smoothed", "step", "loss (nats per byte)"),
        ("Held-out files", "step", "loss (nats per byte)"),
        ("Held-out files: what AGR changes (below 0 it helps)", "step", "loss with AGR minus loss without"),
    )
    difference.axhline(0, color="black", linewidth=0.8)
    for run in runs:
        training.plot(*smoothed(run.train_loss, window=max(1, options.steps // 20)), **run.variant.line)
        losses = run.measures.get("held_out_loss", [])
        held_out.plot(run.evaluated_at, losses, **run.variant.line)
        plain = next((other for other in runs if other.variant == run.variant.without_agr), None)
        if run.variant.agr and plain is not None:
            pairs = zip(
                losses, plain.measures.get("held_out_loss", []), strict=False
            )  # Ctrl-C may leave different lengths
            changes = [with_agr - without for with_agr, without in pairs]
            line = {**run.variant.line, "label": f"{run.variant.label} minus {plain.variant.label}"}
            difference.plot(run.evaluated_at[: len(changes)], changes, **line)
            difference.legend()
    if runs[0].train_loss:
        held_out.set_ylim(top=training.get_ylim()[1])  # the initial loss would flatten the curves
    held_out.legend()
    return figure


def final_loss(run: Run) -> float:
    """Return the last held-out loss, or infinity for a diverged run or one without an evaluation."""
    loss = run.last("held_out_loss")
    return loss if math.isfinite(loss) else math.inf


def print_sample(options: argparse.Namespace, run: Run, console: Console) -> None:
    """Print text that the run's model generates after the prompt `import `."""
    assert isinstance(run.model, GPT)
    generator = torch.Generator().manual_seed(options.seed)
    prompt = torch.tensor(list(b"import "), device=options.device)
    tokens = generate(run.model, prompt, options.sample_length, temperature=0.8, generator=generator)
    written = bytes(tokens.tolist()).decode(errors="replace").strip("\n")
    console.print(Panel(Text(written), title=f"Written by the {run.variant.label} model", title_align="left"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example and return the exit status, which is 130 if Ctrl-C ended the training."""
    parser, options = parse_options(arguments)
    console = Console()
    try:
        corpus = read_corpus(options.text, options.pattern, int(options.text_size * 1e6))
    except (OSError, ValueError) as error:
        parser.error(f"argument --text: {error}")
    shortest = min(len(corpus.train), len(corpus.held_out))
    if shortest <= options.context:
        parser.error(f"argument --context: {options.context} bytes do not fit in a text of {shortest} bytes")
    torch.manual_seed(options.seed)
    sizes = {name: getattr(options, name) for name in ("context", "width", "heads", "layers")}
    model = GPT(vocabulary=256, **sizes).to(options.device)
    runs = start_runs(model, options, options.steps, options.seed)
    console.print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters on {options.device}, "
        f"{options.batch_size * options.context:,} bytes a step. Text from {options.text}: "
        f"{len(corpus.train) / 1e6:.2f} MB to train on, {len(corpus.held_out) / 1e6:.2f} MB held out.",
        markup=False,
        highlight=False,
    )
    begin, interrupted = time.perf_counter(), False
    try:
        train(options, corpus, runs, console)
    except KeyboardInterrupt:
        interrupted = True
        console.print("Stopped; this is what was done so far.")
    report(options, runs, console, time.perf_counter() - begin, interrupted)
    if options.sample_length and not interrupted:
        print_sample(options, min(runs, key=final_loss), console)
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
