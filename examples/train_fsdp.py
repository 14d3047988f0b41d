"""Train the small GPT of train_language_model.py on several processes, each with a part of every tensor (FSDP2).

    torchrun --standalone --nproc-per-node 2 examples/train_fsdp.py --output runs/fsdp

Every process takes its share of each batch. A run that is stopped goes on from the newest complete checkpoint in its
folder, on any number of processes that divides the batch. demo_fsdp.py starts, kills and compares such runs.

Needs: pip install "agr-cuda[examples]"
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from command_line import number, whole
from common import parameter_groups, warmup_cosine
from corpus import STANDARD_LIBRARY, read_corpus
from gpt import GPT
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

import agr_cuda


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--steps", metavar="N", type=whole(1), default=300, help="training steps")
    parser.add_argument("--save-every", metavar="N", type=whole(1), default=50, help="steps between checkpoints")
    parser.add_argument(
        "--batch-size", metavar="N", type=whole(1), default=8, help="sequences in a batch, of all processes together"
    )
    parser.add_argument("--context", metavar="N", type=whole(2), default=64, help="bytes in a sequence")
    parser.add_argument("--layers", metavar="N", type=whole(1), default=3, help="blocks of the model")
    parser.add_argument("--width", metavar="N", type=whole(1), default=128, help="width of the model")
    parser.add_argument("--heads", metavar="N", type=whole(1), default=4, help="attention heads of a block")
    parser.add_argument("--optimizer", choices=("AdamW", "Adan"), default="AdamW", help="the optimizer, with AGR")
    parser.add_argument("--lr", metavar="X", type=number(above=True), default=3e-3, help="peak learning rate")
    parser.add_argument("--max-grad-norm", metavar="X", type=number(), default=1.0, help="0 does not clip")
    parser.add_argument("--seed", metavar="N", type=whole(0), default=0, help="seed of weights and batches")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--whole", action="store_true", help="do not shard: every process has the whole model")
    parser.add_argument(
        "--kill-in-step", metavar="N", type=whole(1), help="kill the last process in the middle of this step, to try it"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/fsdp"), metavar="DIR", help="folder of checkpoints and losses.jsonl"
    )
    return parser.parse_args(arguments)


def newest_checkpoint(folder: Path) -> tuple[int, Path] | None:
    """Return the newest complete checkpoint and its step. A checkpoint's file .metadata is written last."""
    complete = [path.parent for path in folder.glob("step-*/.metadata")]
    return max(((int(path.name.removeprefix("step-")), path) for path in complete), default=None)


def save(folder: Path, step: int, model: nn.Module, optimizer: Optimizer, schedule: LRScheduler) -> None:
    """Write a checkpoint, of which each process writes its parts."""
    weights, state = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": state, "schedule": schedule.state_dict()}
    state_dict_saver.save(saved, checkpoint_id=folder / f"step-{step}")


def load(path: Path, model: nn.Module, optimizer: Optimizer, schedule: LRScheduler) -> None:
    """Read a checkpoint, whatever the number of processes that wrote it."""
    weights, state = get_state_dict(model, optimizer)
    saved: dict[str, Any] = {"model": weights, "optimizer": state, "schedule": schedule.state_dict()}
    state_dict_loader.load(saved, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    schedule.load_state_dict(saved["schedule"])


def train(options: argparse.Namespace, device: torch.device) -> None:
    """Train from the newest checkpoint, or from the beginning, to the end."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    if options.batch_size % processes:
        raise SystemExit(f"--batch-size {options.batch_size} is not a multiple of {processes} processes")
    torch.manual_seed(options.seed)
    sizes = {name: getattr(options, name) for name in ("context", "width", "heads", "layers")}
    model = GPT(vocabulary=256, **sizes).to(device)
    if not options.whole:
        mesh = init_device_mesh(device.type, (processes,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    # The same line as for a model in one piece.
    make: Any = getattr(agr_cuda, options.optimizer)
    groups = parameter_groups(model, weight_decay=0.1, agr=True)
    optimizer = make(groups, lr=options.lr, max_grad_norm=options.max_grad_norm)

    schedule = LambdaLR(optimizer, warmup_cosine(options.steps, warmup=0.1))

    first = 0
    found = newest_checkpoint(options.output)
    if found is not None:
        first, path = found
        load(path, model, optimizer, schedule)

    def kill(*_: object) -> None:
        if step + 1 == options.kill_in_step and rank == processes - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    optimizer.register_step_pre_hook(kill)
    batches = read_corpus(STANDARD_LIBRARY, "*.py", 2_000_000).batches(
        options.batch_size, options.context, options.seed
    )
    for _ in range(first):
        next(batches)
    for step in range(first, options.steps):
        batch = next(batches).chunk(processes)[rank].to(device)
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        mean = loss.detach() / processes
        dist.all_reduce(mean)
        if rank == 0:
            with (options.output / "losses.jsonl").open("a") as losses:
                print(json.dumps({"step": step, "loss": mean.item(), "processes": processes}), file=losses)
        if (step + 1) % options.save_every == 0:
            save(options.output, step + 1, model, optimizer, schedule)


def main(arguments: Sequence[str] | None = None) -> None:
    """Join the other processes, train, and leave."""
    options = parse_options(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    train(options, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
