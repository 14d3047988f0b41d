"""A plugin of pytest: tests of backend="cuda" run the kernels' PTX instead of their source.

AGR_PTX names the architecture, AGR_PTX_SEED the first interleaving.
"""

from __future__ import annotations

import os

import compiled
import emulated
import pytest

ARCHITECTURE = os.environ["AGR_PTX"]
SEED = int(os.environ.get("AGR_PTX_SEED", "1"))

module = compiled.load(compiled.kernels(ARCHITECTURE))
module.configure(
    seed=SEED, multiprocessors=1 + SEED % 5, blocks_each=1 + SEED % 2, limit=10**9, approximation_error=SEED % 3
)
emulated.launcher = lambda: module.launcher


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    steps, uploads, instructions = module.counts()
    terminalreporter.write_line(f"PTX {ARCHITECTURE}: {steps} steps, {uploads} uploads, {instructions:,} instructions")
