"""Train a small GPT on Python source with AdamW, AGR-AdamW, Adan and AGR-Adan side by side.

The text is on every machine: the source of Python's own standard library, bytes as tokens. All optimizers
start from the same weights and see the same batches, and each makes one step per batch in turn, so that
whatever else the machine does slows them all alike. Every tenth file is held out: the loss reported is on
files never trained on.

Needs: pip install "agr-cuda[examples]"
"""

from __future__ import annotations

import argparse
import math
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from command_line import add_machine_options, add_optimizer_options, device_option, number, prepare, whole
from common import Run, clock, in_turn, start_runs
from gpt import GPT, generate
from report import print_table, progress_bar, save_report, smoothed, start_picture
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from torch import Tensor, nn
from torch.nn import functional as F

STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])
# Folders there without ordinary source: other packages, tables of characters, repetitive tests.
LEFT_OUT = {"site-packages", "dist-packages", "encodings", "pydoc_data", "test", "tests", "idle_test"}

# What a CPU of two cores, and what a GPU, can train in a few minutes with all four optimizers.
ON_CPU = {"steps": 600, "batch_size": 16, "context": 64, "layers": 3, "width": 128, "heads": 4}
ON_GPU = {"steps": 600, "batch_size": 64, "context": 256, "layers": 6, "width": 384, "heads": 6}


# Options.


def parse_options(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Return the parser, for further complaints, and the options; the size's defaults depend on --device."""
    early = device_option()
    on_gpu = early.parse_known_args(arguments)[0].device.type == "cuda"
    defaults = ON_GPU if on_gpu else ON_CPU
    bfloat16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=(__doc__ or "").split("\n\n")[0],
        epilog="The defaults of batch, context and model are larger on a GPU: shown are those for --device.",
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
    parser.set_defaults(**defaults)
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
    text.add_argument("--held-out-batches", metavar="N", type=whole(1), default=16, help="batches of one evaluation")
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
        threads=torch.get_num_threads(),
    )
    add_optimizer_options(parser, adamw_lr=5e-3, adan_lr=2e-2, weight_decay=0.1, warmup=0.1)
    options = parser.parse_args(arguments)
    if options.width % options.heads:
        parser.error(f"argument --width: {options.width} is not a multiple of --heads {options.heads}")
    prepare(parser, options)
    return parser, options


# Text.


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on, and bytes of other files to evaluate on, both as uint8 vectors."""

    train: Tensor
    held_out: Tensor

    def batches(self, size: int, context: int, seed: int) -> Iterator[Tensor]:
        """Yield batches (size, context + 1) of training text drawn at random, without end."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(self.train) - context, (size,), generator=generator)
            yield windows(self.train, starts, context)

    def evaluation(self, batches: int, size: int, context: int) -> list[Tensor]:
        """Return batches spread evenly over the held-out text: the same in every evaluation and every run."""
        starts = torch.linspace(0, len(self.held_out) - context - 1, batches * size).long()
        return [windows(self.held_out, part, context) for part in starts.view(batches, size)]


def windows(text: Tensor, starts: Tensor, context: int) -> Tensor:
    """Return the `context` + 1 bytes from each start on: inputs and, one further, targets."""
    return text[starts[:, None] + torch.arange(context + 1)].long()


def read_corpus(folder: Path, pattern: str, limit: int) -> Corpus:
    """Read files in sorted order up to `limit` bytes; every tenth, or the last of fewer, is held out.

    Raises:
        ValueError: for fewer than two files, since unseen text needs one of its own.
    """
    left_out = LEFT_OUT if folder == STANDARD_LIBRARY else set()
    texts, size = [], 0
    for path in sorted(folder.rglob(pattern)):
        if size < limit and path.is_file() and not left_out.intersection(path.relative_to(folder).parts):
            texts.append(path.read_bytes()[: limit - size])
            size += len(texts[-1])
    if len(texts) < 2:
        raise ValueError(
            f"{str(folder)!r} has {len(texts)} files named {pattern!r}; it needs two, one of them to hold out"
        )
    every = min(10, len(texts))
    train = b"".join(text for i, text in enumerate(texts) if i % every != every - 1)
    held_out = b"".join(texts[every - 1 :: every])
    return Corpus(*(torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in (train, held_out)))


# Training.


def train(options: argparse.Namespace, corpus: Corpus, runs: Sequence[Run], console: Console) -> None:
    """Advance every run by one step for each batch, and evaluate all of them now and then."""
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
                run.advance(lambda model, batch=batch: loss(model, batch), now)  # type: ignore[misc]
                progress.update(bars[run], advance=1, note=f"loss {run.train_loss[-1]:.2f}")


# The report.


def report(
    options: argparse.Namespace, runs: Sequence[Run], console: Console, seconds: float, interrupted: bool
) -> None:
    """Print the table, save the picture and results.json."""
    best = min(runs, key=final_loss)

    def loss(group: list[Run]) -> str:
        return f"[bold]{final_loss(group[0]):.4f}[/]" if group[0] is best else f"{final_loss(group[0]):.4f}"

    done = max(len(run.train_loss) for run in runs)
    print_table(
        console,
        f"{done} steps of {options.steps}" if interrupted else f"{done} steps in {seconds:.0f} s",
        "Loss: nats per byte of files never trained on. It is one run from one seed: small differences "
        "are chance, as another --seed shows.",
        {"Held-out\nloss": loss, "Bits\nper byte": lambda group: f"{final_loss(group[0]) / math.log(2):.3f}"},
        runs,
    )
    size = sum(p.numel() for p in runs[0].model.parameters()) / 1e6
    figure, (training, held_out) = start_picture(
        f"A GPT of {size:.1f} million parameters learns Python source",
        ("Training, smoothed", "step", "loss (nats per byte)"),
        ("Held-out files", "step", "loss (nats per byte)"),
    )
    for run in runs:
        training.plot(*smoothed(run.train_loss, window=max(1, options.steps // 20)), **run.variant.line)
        held_out.plot(run.evaluated_at, run.measures.get("held_out_loss", []), marker=".", **run.variant.line)
    held_out.legend()
    save_report(console, figure, options, runs, seconds=seconds, interrupted=interrupted)


def final_loss(run: Run) -> float:
    """Return the last held-out loss, infinite for a run without one or a diverged one."""
    loss = run.last("held_out_loss")
    return loss if math.isfinite(loss) else math.inf


def print_sample(options: argparse.Namespace, run: Run, console: Console) -> None:
    """Let the run's model go on after `def`."""
    assert isinstance(run.model, GPT)
    generator = torch.Generator().manual_seed(options.seed)
    prompt = torch.tensor(list(b"\n    def "), device=options.device)
    tokens = generate(run.model, prompt, options.sample_length, temperature=0.7, generator=generator)
    written = bytes(tokens.tolist()).decode(errors="replace").strip("\n")
    console.print(Panel(Text(written), title=f"Written by the {run.variant.label} model", title_align="left"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example; returns the exit status, 130 where Ctrl-C ended the training."""
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
