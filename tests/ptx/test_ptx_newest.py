"""The PTX of the newest architecture that kernels are compiled for."""

from kernel_tests import NEWEST, KernelTests


class TestNewest(KernelTests):
    architecture = NEWEST
    followed = set()
