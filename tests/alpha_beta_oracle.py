"""The alpha-beta-divergence in 110 digits, from the published definition alone, and hard cases.

Off the singular lines the value is the definition as Wang et al. and Cichocki et al. print it, on
them it is their limit for that line; nothing is shared with the formulation that it judges. The
slopes in the logits are the published closed forms. Those in alpha and beta are the derivatives of
the definition; on a singular line, where these do not exist, the mean of the derivatives at two
points on opposite sides of it, 1e-20 away, which costs up to 80 digits and is right to about 30.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import mpmath
import numpy as np

_DIGITS = 110  # 50 are too few already within 1e-12 of two singular lines
_OFFSET = "1e-20"
_OFF_EVERY_LINE = ("1", "0.37")

SCORED = (1e-30, 1e30)  # true sizes outside this range are not float32's to represent
MAX_ERROR, PERCENTILE_99 = 2e-5, 5e-6  # the bars, relative, for the value and for each gradient
REGIMES = ("soft", "sharp", "equal up to a shift", "nearly equal", "gap 1e2", "gap 1e4")
_LINES = ("alpha = 0", "beta = 0", "alpha + beta = 0", "the origin")
CYCLE = len(REGIMES) * (2 * len(_LINES) + 1)


class Case(NamedTuple):
    """One pair of rows in float32, with the numbers of the divergence."""

    regime: str
    student_logits: np.ndarray
    teacher_logits: np.ndarray
    alpha: np.float32
    beta: np.float32


class Truth(NamedTuple):
    """A value with its gradients, rounded to float64; inf or 0 beyond float64's range."""

    value: float
    student: np.ndarray
    teacher: np.ndarray
    alpha: float
    beta: float


def alpha_beta(
    student_logits: Sequence[float], teacher_logits: Sequence[float], alpha: float, beta: float
) -> Truth:
    """The divergence of one pair of rows, whose floating-point numbers are taken as exact.

    A class with -inf on both sides is cut out. With -inf on one side the limit is taken; where that
    is infinite the value is inf and the gradients are nan.
    """
    with mpmath.workdps(_DIGITS):
        log_p, log_q = (_log_softmax(logits) for logits in (teacher_logits, student_logits))
        a, b = mpmath.mpf(float(alpha)), mpmath.mpf(float(beta))
        pairs = list(enumerate(zip(log_p, log_q, strict=True)))
        both = [k for k, pair in pairs if None not in pair]
        absent_p = [k for k, (x, y) in pairs if x is None and y is not None]
        absent_q = [k for k, (x, y) in pairs if x is not None and y is None]
        nan = np.full(len(log_p), math.nan)
        if (absent_p and min(a, a + b) <= 0) or (absent_q and min(b, a + b) <= 0):
            return Truth(math.inf, nan, nan, math.nan, math.nan)

        x, y = [log_p[k] for k in both], [log_q[k] for k in both]
        p_a, p_b = ([mpmath.exp(power * log) for log in x] for power in (a, b))
        q_a, q_b = ([mpmath.exp(power * log) for log in y] for power in (a, b))
        value = _value(x, y, p_a, p_b, q_a, q_b, a, b)
        alpha_slope, beta_slope = _slopes(x, y, p_a, p_b, q_a, q_b, a, b)
        student = dict(zip(both, _slopes_in_log_q(x, y, p_a, q_a, q_b, a), strict=True))
        teacher = dict(zip(both, _slopes_in_log_q(y, x, q_b, p_b, p_a, b), strict=True))

        rows = ((absent_p, log_q, student, a, b), (absent_q, log_p, teacher, b, a))
        for absent, log, slopes, own, other in rows:  # the summand is q^s / (a s) where p is 0
            divisor = own * (own + other)
            for k in absent:
                power = mpmath.exp((own + other) * log[k])
                value += power / divisor
                slopes[k] = power / own
                in_own = power * (log[k] / divisor - (2 * own + other) / divisor**2)
                in_other = power * (log[k] / divisor - own / divisor**2)
                alpha_slope += in_own if log is log_q else in_other
                beta_slope += in_other if log is log_q else in_own

        return Truth(
            float(value),
            _through_softmax(student, log_q),
            _through_softmax(teacher, log_p),
            float(alpha_slope),
            float(beta_slope),
        )


def gradient_bounds(
    student_logits: Sequence[float], teacher_logits: Sequence[float], alpha: float, beta: float
) -> tuple[float, float]:
    """How far float32 may be off in the student's and the teacher's gradient of one finite pair.

    With s the slopes in the log-probabilities, an entry is

        g_j = (1 - q_j) s_j - q_j sum_{k != j} s_k,

    which may be a difference of terms that are far larger than any entry. Where float32 rounds the
    logarithm of a slope, and then the slope, this has a relative error of eps (1 + |log |s_k||), if
    nothing else is lost. To first order the entry is then off by at most

        eps ((1 - q_j) |s_j| (1 + |log |s_j||) + q_j sum_{k != j} |s_k| (1 + |log |s_k||)).

    Returns:
        The largest of these over j, relative to the largest entry, for each of the gradients.
    """
    with mpmath.workdps(_DIGITS):
        x, y = (_log_softmax(logits) for logits in (teacher_logits, student_logits))
        a, b = mpmath.mpf(float(alpha)), mpmath.mpf(float(beta))
        p_a, p_b = ([mpmath.exp(power * log) for log in x] for power in (a, b))
        q_a, q_b = ([mpmath.exp(power * log) for log in y] for power in (a, b))
        student = _slopes_in_log_q(x, y, p_a, q_a, q_b, a)
        teacher = _slopes_in_log_q(y, x, q_b, p_b, p_a, b)
        return _rounding(student, y), _rounding(teacher, x)


def draw_cases(num_classes: int, count: int, seed: int) -> list[Case]:
    """Cases with every regime of logits and numbers on, near and off each singular line.

    CYCLE of them have each combination once, in random order.
    """
    rng = np.random.default_rng((seed, num_classes))
    cases = []
    while len(cases) < count:
        for combination in rng.permutation(CYCLE):
            regime = REGIMES[combination % len(REGIMES)]
            numbers = _draw_numbers(rng, combination // len(REGIMES))
            student_logits, teacher_logits = _draw_logits(rng, regime, num_classes)
            cases.append(Case(regime, student_logits, teacher_logits, *numbers))
    return cases[:count]


def relative_errors(found: Sequence[np.ndarray | float], truth: Truth) -> list[float]:
    """The error of the value and of each gradient; nan where the truth is no number of float32.

    Gradients are scored where the value is one too: they are made of terms as large as its.
    """
    if not truth.value <= SCORED[1]:
        return [math.nan] * len(truth)
    return [relative_error(*pair) for pair in zip(found, truth, strict=True)]


def relative_error(found: np.ndarray | float, true: np.ndarray | float) -> float:
    """The largest error, relative to the truth's largest entry; nan if that is not to be scored."""
    size = np.max(np.abs(true))
    if not SCORED[0] <= size <= SCORED[1]:
        return math.nan
    error = np.max(np.abs(np.asarray(found, np.float64) - true)) / size
    return math.inf if np.isnan(error) else float(error)


def _draw_numbers(rng, kind):
    """alpha and beta: anywhere for kind 0, else on a line (odd) or within 1e-12 to 1e-1 of it."""
    alpha, beta = rng.uniform(-2.0, 3.0, 2).astype(np.float32)
    if kind == 0:
        return alpha, beta
    line = _LINES[(kind - 1) // 2]
    offsets = rng.choice([-1.0, 1.0], 2) * 10.0 ** rng.uniform(-12.0, -1.0, 2)
    offsets = (offsets * (kind % 2 == 0)).astype(np.float32)
    if line == "alpha = 0":
        return offsets[0], beta
    if line == "beta = 0":
        return alpha, offsets[0]
    if line == "the origin":
        return offsets[0], offsets[1]
    alpha = np.float32(rng.uniform(-2.0, 1.9))
    return alpha, offsets[0] - alpha


def _draw_logits(rng, regime, num_classes):
    student, teacher = rng.normal(size=(2, num_classes))
    if regime == "sharp":
        student, teacher = 10.0 * student, 10.0 * teacher
    elif regime == "equal up to a shift":  # equal but for the rounding of the sum
        student = student.astype(np.float32)
        teacher = student + np.float32(rng.uniform(-10.0, 10.0))
    elif regime == "nearly equal":
        teacher = student + 10.0 ** rng.uniform(-6.0, -3.0) * teacher
    elif regime.startswith("gap"):
        gap = float(regime.split()[1])
        raised = rng.random((2, num_classes)) < 0.5
        student, teacher = student + gap * raised[0], teacher + gap * raised[rng.integers(2)]
    return student.astype(np.float32), teacher.astype(np.float32)


def _log_softmax(logits):
    """Log-probabilities; None where the probability is 0."""
    logits = [None if logit == -math.inf else mpmath.mpf(float(logit)) for logit in logits]
    top = max(logit for logit in logits if logit is not None)
    shifted = [None if logit is None else logit - top for logit in logits]
    normaliser = mpmath.log(mpmath.fsum(mpmath.exp(z) for z in shifted if z is not None))
    return [None if z is None else z - normaliser for z in shifted]


def _value(x, y, p_a, p_b, q_a, q_b, a, b):
    s = a + b
    if a == b == 0:
        return mpmath.fsum((xk - yk) ** 2 for xk, yk in zip(x, y, strict=True)) / 2
    if b == 0:
        rows = zip(x, y, p_a, q_a, strict=True)
        return mpmath.fsum(pa * a * (xk - yk) - pa + qa for xk, yk, pa, qa in rows) / a**2
    if a == 0:
        rows = zip(x, y, p_b, q_b, strict=True)
        return mpmath.fsum(qb * b * (yk - xk) - qb + pb for xk, yk, pb, qb in rows) / b**2
    if s == 0:
        rows = zip(x, y, p_a, q_b, strict=True)  # q^b = q^-a
        return mpmath.fsum(a * (yk - xk) + pa * qb - 1 for xk, yk, pa, qb in rows) / a**2
    mixed, power_p, power_q = (mpmath.fdot(*pair) for pair in ((p_a, q_b), (p_a, p_b), (q_a, q_b)))
    return -(mixed - a / s * power_p - b / s * power_q) / (a * b)


def _slopes(x, y, p_a, p_b, q_a, q_b, a, b):
    """The derivatives of the value in alpha and in beta."""
    if a * b * (a + b):
        return _slopes_off_lines(x, y, p_a, p_b, q_a, q_b, a, b)
    da, db = (mpmath.mpf(_OFFSET) * mpmath.mpf(part) for part in _OFF_EVERY_LINE)
    sides = []
    for sign in (1, -1):
        powers = [
            [power * mpmath.exp(sign * offset * log) for power, log in zip(row, logs, strict=True)]
            for row, offset, logs in ((p_a, da, x), (p_b, db, x), (q_a, da, y), (q_b, db, y))
        ]
        sides.append(_slopes_off_lines(x, y, *powers, a + sign * da, b + sign * db))
    return tuple((above + below) / 2 for above, below in zip(*sides, strict=True))


def _slopes_off_lines(x, y, p_a, p_b, q_a, q_b, a, b):
    """Those of power_p / (b s) + power_q / (a s) - mixed / (a b), s = a + b: the definition."""
    s = a + b
    mixed, p_s, q_s = (
        [left * right for left, right in zip(*pair, strict=True)]
        for pair in ((p_a, q_b), (p_a, p_b), (q_a, q_b))
    )
    power_p, power_q, sum_mixed = (mpmath.fsum(row) for row in (p_s, q_s, mixed))
    common = mpmath.fdot(p_s, x) / (b * s) + mpmath.fdot(q_s, y) / (a * s)
    in_alpha = common - mpmath.fdot(mixed, x) / (a * b)
    in_alpha += -power_p / (b * s**2) - power_q * (s + a) / (a * s) ** 2 + sum_mixed / (a**2 * b)
    in_beta = common - mpmath.fdot(mixed, y) / (a * b)
    in_beta += -power_p * (s + b) / (b * s) ** 2 - power_q / (a * s**2) + sum_mixed / (a * b**2)
    return in_alpha, in_beta


def _slopes_in_log_q(x, y, p_a, q_a, q_b, a):
    """-q^b (p^a - q^a) / a; with the roles and the numbers exchanged, that in log p."""
    if a == 0:
        return [qb * (yk - xk) for xk, yk, qb in zip(x, y, q_b, strict=True)]
    return [qb * (qa - pa) / a for pa, qa, qb in zip(p_a, q_a, q_b, strict=True)]


def _through_softmax(slopes, log_probs):
    """The gradient in the logits of what has these slopes in the log-probabilities."""
    total = mpmath.fsum(slopes.values())
    gradient = np.zeros(len(log_probs))
    for k, slope in slopes.items():
        gradient[k] = slope - mpmath.exp(log_probs[k]) * total
    return gradient


def _rounding(slopes, log_probs):
    """`gradient_bounds` of one gradient."""
    size = np.max(np.abs(_through_softmax(dict(enumerate(slopes)), log_probs)))
    errors = [abs(slope) * (1 + abs(mpmath.log(abs(slope)))) if slope else 0 for slope in slopes]
    total, probs = mpmath.fsum(errors), map(mpmath.exp, log_probs)
    largest = max(e + q * (total - 2 * e) for e, q in zip(errors, probs, strict=True))
    return float(np.finfo(np.float32).eps * largest / size) if size else math.inf
