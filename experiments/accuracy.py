"""The accuracy of `alpha_beta` and its gradients in float32, against 110-digit arithmetic.

    python -m experiments.accuracy                     # 2200 cases; minutes
    python -m experiments.accuracy --cases 300 --seed 1

The cases lie on the singular lines of the definition, within 1e-12 to 1e-1 of them and elsewhere,
with 2 to 1000 classes and logits from nearly equal to saturated. An error is the largest of an
array, relative to the largest entry of the truth. A case whose truth float32 cannot hold is checked
for finiteness alone. The status is 1 if a bar is missed.

A gradient in the logits is a difference of slopes, g_j = (1 - q_j) s_j - q_j sum_{k != j} s_k, and
may be far smaller than these; the bar is no measure of what is rounded of them. Such a gradient
passes if its error is within what the rounding of its own slopes explains, an a-priori bound from
the same 110 digits (`gradient_bounds` of the oracle, with its derivation). Each is printed; all
others have to meet the bar.
"""

import concurrent.futures
import multiprocessing
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from abkd_jax import alpha_beta
from abkd_jax.config import command

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
import alpha_beta_oracle as oracle

_CASES = flags.DEFINE_integer("cases", 2200, "How many cases.", lower_bound=60)
_SEED = flags.DEFINE_integer("seed", 0, "Which cases.", lower_bound=0)

_NUM_CLASSES = (2, 3, 10, 100, 1000)
_QUANTITIES = oracle.Truth._fields
_NUM_MASKED_CASES = 300
_MAX_MASKED_DIFFERENCE = 1e-6  # between classes at -inf in both logits and classes cut out


@jax.jit
@jax.vmap
def _alpha_beta(student_logits, teacher_logits, alpha, beta):
    """The value and the four gradients, in the order of the oracle."""

    def value(*args):
        return alpha_beta(args[0], args[1], alpha=args[2], beta=args[3])

    args = (student_logits, teacher_logits, alpha, beta)
    return value(*args), *jax.grad(value, argnums=(0, 1, 2, 3))(*args)


def main() -> None:
    """Prints the table, then what holds for -inf, then whether the bars are met."""
    context = multiprocessing.get_context("spawn")  # JAX has threads, which a fork would break
    with concurrent.futures.ProcessPoolExecutor(mp_context=context) as pool:
        met = [_check_table(pool), _check_cut_out(), _check_one_sided(pool)]
    print("PASS" if all(met) else "FAIL")
    sys.exit(not all(met))


def _check_table(pool: concurrent.futures.Executor) -> bool:
    per_size = -(-_CASES.value // len(_NUM_CLASSES))
    grids = [oracle.draw_cases(size, per_size, _SEED.value) for size in _NUM_CLASSES]
    cases = [case for group in zip(*grids, strict=True) for case in group]  # a steady rate
    found = [result for group in zip(*map(_evaluate, grids), strict=True) for result in group]
    truths = list(tqdm(_truths(pool, cases), total=len(cases), unit="case"))
    errors, finite = _score(found, truths)
    regimes = np.array([case.regime for case in cases])

    print(f"{len(cases)} cases, float32 on {jax.devices()[0].platform}, relative errors")
    columns = "".join(f"{name:>22}" for name in _QUANTITIES)
    print(f"{'':20}{'':>6}{columns}")
    print(f"{'':20}{'cases':>6}" + f"{'scored':>8}{'p99':>7}{'max':>7}" * 5 + f"{'not finite':>12}")
    for regime in (*oracle.REGIMES, "overall"):
        rows = (regimes == regime) | (regime == "overall")
        scores = "".join(_summary(errors[rows, i]) for i in range(len(_QUANTITIES)))
        print(f"{regime:20}{rows.sum():6}{scores}{(~finite[rows]).sum():12}")
    return bool(finite.all()) and _meets_bars(errors, _allowed(cases, errors))


def _check_cut_out() -> bool:
    """-inf in both logits against the same rows without these classes."""
    largest, finite = 0.0, True
    for num_classes in (3, 10):  # with more, sums in another order differ by more than the bar
        rng = np.random.default_rng((_SEED.value, 1, num_classes))
        cases = oracle.draw_cases(num_classes, _NUM_MASKED_CASES // 2, _SEED.value + 1)
        places = [np.sort(rng.permutation(2 * num_classes)[:num_classes]) for _ in cases]
        masked = []
        for case, place in zip(cases, places, strict=True):
            student, teacher = np.full((2, 2 * num_classes), -np.inf, np.float32)
            student[place], teacher[place] = case.student_logits, case.teacher_logits
            masked.append(case._replace(student_logits=student, teacher_logits=teacher))
        for short, long, place in zip(_evaluate(cases), _evaluate(masked), places, strict=True):
            expected = [short[0], *np.zeros((2, 2 * num_classes)), *short[3:]]
            expected[1][place], expected[2][place] = short[1:3]
            errors = [oracle.relative_error(*pair) for pair in zip(long, expected, strict=True)]
            largest = max(largest, np.nanmax([0.0, *errors]))
            finite &= all(np.isfinite(part).all() for part in long)
    print(
        f"-inf on both sides, {_NUM_MASKED_CASES} cases: differs from cut out by {largest:.1e}; "
        f"{'all finite' if finite else 'NOT FINITE'}"
    )
    return finite and largest <= _MAX_MASKED_DIFFERENCE


def _check_one_sided(pool: concurrent.futures.Executor) -> bool:
    """-inf in one of the logits against the limit, or, where that is infinite, its sign."""
    rng = np.random.default_rng((_SEED.value, 2))
    cases = []
    for i, case in enumerate(oracle.draw_cases(10, _NUM_MASKED_CASES, _SEED.value + 2)):
        logits = [case.student_logits.copy(), case.teacher_logits.copy()]
        masked = rng.permutation(10)[:4]
        if i % 3 != 0:
            logits[0][masked[:2]] = -np.inf
        if i % 3 != 1:
            logits[1][masked[2:]] = -np.inf
        cases.append(case._replace(student_logits=logits[0], teacher_logits=logits[1]))
    found, truths = _evaluate(cases), list(_truths(pool, cases))
    errors, finite = _score(found, truths)
    infinite = [i for i, truth in enumerate(truths) if truth.value == np.inf]
    negative = sum(found[i][0] <= 0.0 for i in infinite)
    print(
        f"-inf on one side, {len(cases)} cases, {len(cases) - len(infinite)} with a finite limit: "
        f"max {np.nanmax(errors):.1e}, p99 {np.nanpercentile(errors, 99):.1e}; with an infinite "
        f"one, {negative} not positive; {(~finite).sum()} not finite"
    )
    return bool(finite.all()) and not negative and _meets_bars(errors)


def _evaluate(cases: Sequence[oracle.Case]) -> list[tuple[np.ndarray, ...]]:
    """The value and the gradients of each case, all cases in one call."""
    arguments = (np.stack(column) for column in list(zip(*cases, strict=True))[1:])
    return list(zip(*map(np.asarray, _alpha_beta(*arguments)), strict=True))


def _truths(
    pool: concurrent.futures.Executor, cases: Iterable[oracle.Case]
) -> Iterator[oracle.Truth]:
    arguments = list(zip(*cases, strict=True))[1:]
    return pool.map(oracle.alpha_beta, *arguments, chunksize=5)


def _score(
    found: Sequence[tuple[np.ndarray, ...]], truths: Sequence[oracle.Truth]
) -> tuple[np.ndarray, np.ndarray]:
    """The errors, [cases, quantities], nan where not scored; and which cases are finite."""
    errors = [oracle.relative_errors(*pair) for pair in zip(found, truths, strict=True)]
    finite = [all(np.isfinite(part).all() for part in result) for result in found]
    return np.array(errors), np.array(finite)


def _allowed(cases: Sequence[oracle.Case], errors: np.ndarray) -> np.ndarray:
    """The largest error allowed: the bar, or the bound of a gradient in the logits beyond it."""
    allowed = np.full(errors.shape, oracle.MAX_ERROR)
    first = _QUANTITIES.index("student")  # and then "teacher", as in the bounds
    for i, side in np.argwhere(errors[:, first : first + 2] > oracle.MAX_ERROR):
        case, column = cases[i], first + side
        bound = oracle.gradient_bounds(*case[1:])[side]
        allowed[i, column] = max(oracle.MAX_ERROR, bound)
        print(
            f"beyond the bar: {_QUANTITIES[column]}, {len(case.student_logits)} "
            f"classes, {case.regime}, alpha {case.alpha:.3g}, beta {case.beta:.3g}: "
            f"error {errors[i, column]:.1e}, bound {bound:.1e}"
        )
    return allowed


def _meets_bars(errors: np.ndarray, allowed: np.ndarray | float = oracle.MAX_ERROR) -> bool:
    """Whether all quantities do; False where an error is infinite, or none is scored (NaN)."""
    largest = np.nanmax(errors / allowed, axis=0)
    percentile = np.nanpercentile(errors, 99, axis=0)
    return bool(np.all(largest <= 1) and np.all(percentile <= oracle.PERCENTILE_99))


def _summary(errors: np.ndarray) -> str:
    scored = errors[~np.isnan(errors)]
    if not scored.size:
        return f"{0:8}{'-':>7}{'-':>7}"
    return f"{scored.size:8}{np.percentile(scored, 99):7.0e}{np.max(scored):7.0e}"


if __name__ == "__main__":
    command.run(main)
