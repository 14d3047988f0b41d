"""The launch by which the Triton backend regularizes gradients in place."""

from __future__ import annotations

from torch import Tensor

from .launch import Hyperparameters
from .scaling import Scaling
from .triton import REST, SUMS, TritonLaunch

#: The blocks of elements that a program regularizes at a time: with one tensor to load and store instead of an
#: optimizer's four, more of it has to be in flight.
BLOCKS = 2


class TritonGradientLaunch(TritonLaunch):
    """The regularization, in two kernel launches, of all gradients on one device with one dtype.

    The first launch is that of AdamW, without the programs that compute coefficients for update rules: there are none.
    """

    computes_coefficients = False

    def _update(self, clip: Tensor | None, scaling: Scaling, warmup: bool = False) -> None:
        grad_scale, found_inf = scaling.to(self.device)
        constants = {key: self._constants[key] for key in ("GRADIENT", "TYPE")}
        self._kernels.regularize_step.run(
            self._limits, self._rows, self._update_tasks, self._addresses, self._magnitudes,
            self._no_clip if clip is None else clip,
            self._no_scale if grad_scale is None else grad_scale, self._no_inf if found_inf is None else found_inf,
            **constants, BLOCK=BLOCKS * self._block, REST=REST, SUMS=SUMS,
            **self._options, grid=(self._update_programs,), warmup=warmup,
        )  # fmt: skip

    def _group_words(self, hyperparameters: Hyperparameters) -> bytes:
        """Return nothing: the kernels need no numbers of groups."""
        return b""
