"""What the kernels are told, in tables of 64-bit words: which column is what, and how long a row is."""

import triton.language as tl

# A tensor, as it stays while the plan lasts: addresses, counts and flags.
PARAMETER = tl.constexpr(0)
STATE = tl.constexpr(1)  # the first of four
STEP = tl.constexpr(5)  # its own step count, a float32; 0 where its group has it
ELEMENTS = tl.constexpr(6)
FIRST_CHUNK = tl.constexpr(7)  # counted over all tensors
CHUNKS = tl.constexpr(8)
GROUP_INDEX = tl.constexpr(9)
REGULARIZE = tl.constexpr(10)
AMSGRAD = tl.constexpr(11)
ROW = tl.constexpr(16)

# Limits of the launches: tensors, elements of a chunk, groups.

# A group, as it is in one step: float64, and then addresses and a flag.
LR = tl.constexpr(0)
BETA1 = tl.constexpr(1)
BETA2 = tl.constexpr(2)
BETA3 = tl.constexpr(3)
EPS = tl.constexpr(4)
WEIGHT_DECAY = tl.constexpr(5)
NO_PROX = tl.constexpr(6)
SIGN = tl.constexpr(7)  # -1 for maximize, else 1
T = tl.constexpr(8)  # Adan's step count, from 1, unless the device has it
LR_FLOAT32 = tl.constexpr(9)  # a number on the device in place of LR; or 0
LR_FLOAT64 = tl.constexpr(10)
COUNT = tl.constexpr(11)  # Adan's step count on the device, from 0, a float32; or 0
COUNTS = tl.constexpr(12)  # this step raises that
GROUP = tl.constexpr(16)

# What the first launch leaves for the second, of every tensor, in float64: what its rule multiplies by, in the order of
# the rule's arguments, and behind that
NUMBERS_SCALE = tl.constexpr(14)  # what the gradient is multiplied by: the sign of maximize over the scaler's scale
NUMBERS_T = tl.constexpr(15)  # its step count, with this step
NUMBERS = tl.constexpr(16)
