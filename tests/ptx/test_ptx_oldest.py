"""The PTX of the oldest architecture that kernels are compiled for."""

from compiled import OLDEST
from kernel_tests import KernelTests


class TestOldest(KernelTests):
    architecture = OLDEST
