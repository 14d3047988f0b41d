"""The layout of the kernels' tables of 64-bit words: the columns, and the length of a row."""

import triton.language as tl

# The tensor table, which is constant for the plan: addresses, counts and flags.
PARAMETER = tl.constexpr(0)
STATE = tl.constexpr(1)  # the first of four addresses of averages
STEP = tl.constexpr(5)  # the address of its step count, a float32; 0 if its group holds the count
ELEMENTS = tl.constexpr(6)
FIRST_CHUNK = tl.constexpr(7)  # the index of its first chunk, counted over all tensors
CHUNKS = tl.constexpr(8)
GROUP_INDEX = tl.constexpr(9)
REGULARIZE = tl.constexpr(10)
AMSGRAD = tl.constexpr(11)
SCALES = tl.constexpr(12)  # the first of four addresses of the scales of averages; 0 if they are not codes
MASTER = tl.constexpr(16)  # the address of the float32 copy of the parameter, which is updated in its place; or 0
INDEX = tl.constexpr(17)  # the parameter's index in the optimizer
ROW = tl.constexpr(18)

# The table of limits has one row: the number of tensors that get coefficients, the elements of a chunk, the number of
# groups.

# The groups' table of one step: float64 numbers, and then whole ones: addresses, a flag and a seed.
LR = tl.constexpr(0)
BETA1 = tl.constexpr(1)
BETA2 = tl.constexpr(2)
BETA3 = tl.constexpr(3)
EPS = tl.constexpr(4)
WEIGHT_DECAY = tl.constexpr(5)
NO_PROX = tl.constexpr(6)
SIGN = tl.constexpr(7)  # -1 for maximize, else 1
T = tl.constexpr(8)  # Adan's step number, from 1; unused if COUNT is set
LR_FLOAT32 = tl.constexpr(9)  # the address of a float32 used in place of LR; or 0
LR_FLOAT64 = tl.constexpr(10)  # the address of a float64 used in place of LR; or 0
COUNT = tl.constexpr(11)  # the address of Adan's step count on the device, a float32 from 0; or 0
COUNTS = tl.constexpr(12)  # whether this launch increments that count
SEED = tl.constexpr(13)  # of stochastic rounding, a whole number
GROUP = tl.constexpr(16)

# The table of coefficients, which the first launch computes for the second: for each tensor, in float64, the factors of
# its update rule in the order of the rule's arguments, and after those:
GRADIENT_SCALE = tl.constexpr(14)  # the factor of the gradient: SIGN divided by GradScaler's scale
STEP_NUMBER = tl.constexpr(15)  # the number of this step, from 1
COEFFICIENTS = tl.constexpr(16)
