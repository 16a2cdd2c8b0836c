"""The Triton kernel: the only file of the package that imports triton.

Letters: c rows of a chunk, V vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def forward_kl_kernel(
    teacher,
    last,
    losses,
    bias,
    teacher_bias,
    row_stride,
    scale,
    VOCABULARY: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """KL(p || q) of a row of logits, and its gradient in the place of `last`. Grid: (c,).

    `last` holds student minus teacher logits if SHARED, else the student's. Two passes read: one
    finds both softmaxes' sums and the mean difference, online; one the sum of expm1(D') - D',
    which does not cancel. A third writes the gradient. With D' beyond LARGEST, or not finite, the
    formulas are those of the plain KL.
    """
    row = tl.program_id(0).to(tl.int64)
    teacher += row * row_stride
    last += row * row_stride
    at = tl.arange(0, BLOCK)
    minus = float("-inf")

    # online: the largest logit so far, the sum of exponentials below it, and of p times D
    top = tl.full([BLOCK], minus, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    student_top = tl.full([BLOCK], minus, tl.float32)
    student_total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, VOCABULARY, BLOCK):
        word = start + at
        inside = word < VOCABULARY
        z, d, s = _read(
            teacher, last, bias, teacher_bias, word, inside, scale, SHARED, HAS_BIAS,
            HAS_TEACHER_BIAS,
        )  # fmt: skip
        new = tl.maximum(top, z)
        # -inf minus -inf is not a number
        safe = tl.where(new == minus, 0.0, new)
        shrink = tl.exp(top - safe)
        grown = tl.exp(z - safe)
        total = total * shrink + grown
        moment = moment * shrink + grown * d
        top = new
        new = tl.maximum(student_top, s)
        safe = tl.where(new == minus, 0.0, new)
        student_total = student_total * tl.exp(student_top - safe) + tl.exp(s - safe)
        student_top = new
    highest = tl.max(top, axis=0)
    weight = tl.exp(top - highest)
    sums = tl.sum(total * weight, axis=0)
    log_total = highest + tl.log(sums)
    mean = tl.sum(moment * weight, axis=0) / sums
    student_highest = tl.max(student_top, axis=0)
    student_sums = tl.sum(student_total * tl.exp(student_top - student_highest), axis=0)
    student_log_total = student_highest + tl.log(student_sums)

    # the excess where all is well, and the plain sum for where it is not
    excess = tl.zeros([BLOCK], tl.float32)
    plain = tl.zeros([BLOCK], tl.float32)
    largest = tl.full([BLOCK], minus, tl.float32)
    for start in range(0, VOCABULARY, BLOCK):
        word = start + at
        inside = word < VOCABULARY
        z, d, s = _read(
            teacher, last, bias, teacher_bias, word, inside, scale, SHARED, HAS_BIAS,
            HAS_TEACHER_BIAS,
        )  # fmt: skip
        p = tl.exp(z - log_total)
        centred = d - mean
        largest = tl.where(inside, tl.maximum(largest, centred), largest)
        excess += tl.where(inside, p * _expm1_less(centred), 0.0)
        ratio = (z - log_total) - (s - student_log_total)
        plain += tl.where(inside & (p > 0), p * ratio, 0.0)
    # a difference that is not finite has made the mean so too
    unsafe = (tl.max(largest, axis=0) > LARGEST) | (mean != mean)
    kl = _log1p(tl.sum(excess, axis=0))
    plain_kl = tl.maximum(tl.sum(plain, axis=0), 0.0)
    tl.store(losses + row, tl.where(unsafe, plain_kl, kl))

    if WITH_GRADIENT:
        for start in range(0, VOCABULARY, BLOCK):
            word = start + at
            inside = word < VOCABULARY
            z, d, s = _read(
                teacher, last, bias, teacher_bias, word, inside, scale, SHARED, HAS_BIAS,
                HAS_TEACHER_BIAS,
            )  # fmt: skip
            p = tl.exp(z - log_total)
            change = d - mean - kl
            gradient = p * (_expm1_less(change) + change)
            gradient = tl.where(unsafe, tl.exp(s - student_log_total) - p, gradient)
            tl.store(last + word, gradient.to(last.dtype.element_ty), mask=inside)


@triton.jit
def _read(
    teacher,
    last,
    bias,
    teacher_bias,
    word,
    inside,
    scale,
    SHARED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
):
    """The teacher's logits, the difference, and the student's logits, over the temperature.

    Outside of the vocabulary logits are -inf and the difference is 0.
    """
    z = tl.load(teacher + word, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(last + word, mask=inside, other=0.0).to(tl.float32)
    if HAS_TEACHER_BIAS:
        z += tl.load(teacher_bias + word, mask=inside, other=0.0).to(tl.float32)
    z = tl.where(inside, z * scale, float("-inf"))
    if SHARED:
        d *= scale
        s = z + d
    else:
        s = d
        if HAS_BIAS:
            s += tl.load(bias + word, mask=inside, other=0.0).to(tl.float32)
        s = tl.where(inside, s * scale, float("-inf"))
        # outside, and a word that neither can say
        d = tl.where((z == float("-inf")) & (s == float("-inf")), 0.0, s - z)
    return z, d, s


@triton.jit
def _expm1_less(x):
    """expm1(x) - x, to about an ulp: the series where x is small, the difference elsewhere."""
    series = x * x * (
        0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040)))))
    )  # fmt: skip
    return tl.where(tl.abs(x) < 0.35, series, tl.exp(x) - 1 - x)


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0, corrected for what 1 + x has rounded away."""
    grown = 1 + x
    lost = x - (grown - 1)
    return tl.where(x < 1e-4, x - 0.5 * x * x, tl.log(grown) + lost / grown)
