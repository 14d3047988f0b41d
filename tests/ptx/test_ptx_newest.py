"""The PTX of the newest architecture that kernels are compiled for."""

from compiled import NEWEST
from kernel_tests import KernelTests


class TestNewest(KernelTests):
    architecture = NEWEST
