"""What tests of `python -m bench` share."""

import pytest

from bench.__main__ import main
from bench.training.run import Result, Run


def result(task="resnet", arm="adamw", seed=1000, losses=(2.0, 1.0), lr=0.01, decay=0.01, judged=True, **more):
    """Return a result of a training that nobody ran."""
    run = Run(task, arm, lr, decay, seed, judged)
    measured = {"training": 1.0, "score": 0.5, "eigenvalue": 3.0, "increases": [0.1, 0.2], "seconds": 1.0}
    return Result(run, [*losses], **{**measured, **more})


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return what a command says of arguments that it refuses."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]
