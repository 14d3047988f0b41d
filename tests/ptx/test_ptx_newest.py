"""The PTX from which machine code for compute capability 9.0 and later is made."""

from compiled import NEWEST
from kernel_tests import KernelTests


class TestNewest(KernelTests):
    architecture = NEWEST
