"""The PTX from which machine code for compute capability 8.x is made."""

from compiled import OLDEST
from kernel_tests import KernelTests


class TestOldest(KernelTests):
    architecture = OLDEST
