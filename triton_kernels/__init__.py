"""The Triton executor of a plan, installed as agr_cuda.triton_kernels.

It is not part of this version: GPUs are served by the reference backend until it is.
"""
