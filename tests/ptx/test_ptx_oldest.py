"""The PTX of the oldest architecture that kernels are compiled for."""

from kernel_tests import OLDEST, KernelTests


class TestOldest(KernelTests):
    architecture = OLDEST
    followed = set()
