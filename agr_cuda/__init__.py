"""AdamW and Adan for PyTorch with Adaptive Gradient Regularization (AGR) fused into the step."""

from importlib.metadata import PackageNotFoundError, version

from .adamw import AdamW
from .adan import Adan
from .backends import available_backends
from .regularize import regularize_gradients_

try:
    __version__ = version("agr-cuda")
except PackageNotFoundError:  # the package is run from the source tree
    __version__ = "not installed"

__all__ = ["AdamW", "Adan", "__version__", "available_backends", "regularize_gradients_"]
