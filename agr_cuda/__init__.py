"""AdamW and Adan for PyTorch with Adaptive Gradient Regularization (AGR) fused into the step."""

from importlib.metadata import PackageNotFoundError, version

from .adamw import AdamW
from .adan import Adan
from .backends import available_backends
from .coefficients import Coefficients, coefficients
from .gradient_release import GradientRelease, release_gradients
from .grouping import ParameterGroups, parameter_groups
from .regularize import regularize_gradients_

try:
    __version__ = version("agr-cuda")
except PackageNotFoundError:  # the package is run from the source tree
    __version__ = "not installed"

__all__ = [
    "AdamW",
    "Adan",
    "Coefficients",
    "GradientRelease",
    "ParameterGroups",
    "__version__",
    "available_backends",
    "coefficients",
    "parameter_groups",
    "regularize_gradients_",
    "release_gradients",
]
