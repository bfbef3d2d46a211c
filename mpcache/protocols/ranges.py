"""Every ring and bound that `fast` is declared for: one table, read by protocols, engines and checks.

A protocol is right for values within its range, and silently wrong beyond it. docs/ranges.md says how near
models come; the debug engine (mpcache.engines.checked) judges values by these same constants.

| what | range | why |
|---|---|---|
| weights, keys, values, activations | size below 2^VALUE_BITS | operands' and small rings |
| attended tokens of a query | at most LONGEST_ATTENDED | the sum of softmax's weights |
| values in a weighted sum of n tokens | size below `largest_value(n)` | WEIGHTED_SUM_RING, `weight_bits(n)` |
| attention scores | 7/8 of the size below LARGEST_SCORE | the histogram's buckets |
| sums of g heads' scores (`gqa=sum`) | 7/8 of each one's size below LARGEST_RANK / g | SCORE_RING |
| scores in a row of softmax | fewer than LONGEST_ROW | counted in 16 bits |
| a score below its row's bound | less than FARTHEST_SCORE steps | windows of the exponential |
| mean squares in a norm | 2^MEAN_SQUARE_LOW to 2^MEAN_SQUARE_HIGH | exponents that are told apart |
| stream times matrix | size below 2^(NORM_PRODUCT_RING - NORM_PRODUCT_BITS - 2) | its ring |
| gate times up | size below 2^14 | GATE_RING |
| SiLU, GELU inputs | size below 44, 22 | `activation.Series.reach` |
| max(x, 0) | raw size below 2^(RELU_WIDTH - 1) | the comparison's width |
| logits | size below 63/64 LARGEST_LOGIT, for `--reveal token` | the comparison's width, the guard |
"""

from __future__ import annotations

import math

# Fixed point.
VALUE_BITS = 14  # |value| < 2^14, for all that is rescaled or prepared
RELU_WIDTH = 32  # |x| < 2^15 at 16 fraction bits, for `relu`
LARGEST_LOGIT = 512  # |logit| stays below

# Rings of products with each operand: queries and keys are rotated before they are truncated.
# A row of the embedding is below 2^VALUE_BITS itself.
OPERAND_RINGS = {"embed": 32, "qkv": 64, "o": 48, "up": 48, "down": 48, "lm_head": 48}
SELECTION_RING = 56  # scores to gather and softmax weights to scatter fit

# Attention.
SCORE_BITS = 13  # fraction bits of quantized scores, which are 7/8 of the scores: 1.4e-4 a step
SCORE_RING = 24  # bits of the ring they live in: differences below 1024
LARGEST_RANK = 504  # size of what scores are ranked by: their ring holds 512, and the guard 63/64 of it
BUCKET_STEP = 2  # quantized scores per bucket of the histogram
BUCKETS = 256
LARGEST_SCORE = BUCKET_STEP * (BUCKETS // 2 - 1)  # |quantized score|: a bucket may come out one too low
LONGEST_ROW = 1 << 15  # scores of one row, to be counted in 16 bits
BOUND_SLACK = 2 * BUCKET_STEP * 8 / 7  # the bound lies at most so far above the maximum
WINDOW_BITS = 17  # the window of the exponential: 2^17 steps
WINDOWS_BITS = 6  # 64 windows: more than any distance of two scores and the slack
COMPARED_BITS = 3  # of the window's bits: an eighth of a window beyond it, to e^-20.6, may not be zero yet
FARTHEST_SCORE = (1 << (WINDOW_BITS + WINDOWS_BITS)) - (1 << WINDOW_BITS)  # below the bound: 1008
SCORE_UNIT = 8 / 7 / (1 << SCORE_BITS)  # a step, in scores
EXP_WINDOW = SCORE_UNIT * (1 << WINDOW_BITS)  # 18.3: e^-18.3 = 1.1e-8 and smaller become zero
MASKED_SCORE = 190  # hidden tokens' scores go down by so much: no weight is left as long as |score| < 73
WEIGHT_BITS = 22  # fraction bits of softmax weights; the largest of a row may be e^-4.6
LONG_BITS = 20  # fraction bits of a product's factor that had more than `WEIGHT_BITS`
WEIGHTED_SUM_RING = 56  # weights times values: with n tokens |value| < 32 (`weight_bits`)
LONGEST_ATTENDED = 1 << 13  # tokens per query

# Norms and activations.
MEAN_SQUARE_LOW, MEAN_SQUARE_HIGH = -20, 17  # exponents: mean squares from 9.5e-7 to 1.3e5
NORM_PRODUCT_BITS = 18  # fraction bits of stream times matrix, before it is scaled
NORM_PRODUCT_RING = 40  # so |stream times matrix| < 2^20
NORM_ROUNDS = 4  # of a norm and the product after it: what was checked is known before the last one
STEP_BITS = 16  # fraction bits of an activation's step, when it multiplies
GATE_RING = 32  # |gate * up| < 2^14 at 16 fraction bits

BLUR_BITS = 9  # what a party learns is blurred with a standard deviation of 2^-9 (`Ops.reveal`)


def largest_value(n: int) -> float:
    """Return what the values of a weighted sum must stay below in size, with up to n tokens."""
    return 2.0**5 if n > 1 << 11 else 2.0**16 / n


def weight_bits(n: int) -> int:
    """Return the fraction bits of n softmax weights: 22 for 2^11 tokens, 20 for 2^13.

    With 16 of the values, and 2^5 as their size, sums of n products are below 2^(WEIGHTED_SUM_RING - 2).
    """
    return min(WEIGHT_BITS, WEIGHTED_SUM_RING - 2 - 16 - 5 - (n - 1).bit_length())


def weighted_mean_error(n: int) -> float:
    """Return what a softmax-weighted mean of n values may be off by, in units of the largest of them.

    The sum of the weights may be as low as e^-BOUND_SLACK, and each weight is rounded to `weight_bits` at
    random: a standard deviation of at most 2.3e-5 sqrt(n) at 22 bits, twice that at 21, four times at 20.
    This is somewhat less than three of them, for the slack of one row is seldom the largest: 2.9e-3 for 2^11
    tokens, 7.9e-3 for 2^12, 2.2e-2 for 2^13. Of rows of the worst shape, one in 10^4 is off by more.
    """
    return 2e-4 + 6e-5 * math.sqrt(n) * 2.0 ** (WEIGHT_BITS - weight_bits(n))
