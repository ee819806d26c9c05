"""Condition number of a matrix without a singular value decomposition."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from spectral_lightning.linalg.checks import compute_dtype, require_finite, require_matrix
from spectral_lightning.linalg.exact import power_of_two_below, scaled_gram

ConditionRoute = Literal["auto", "gram", "inverse"]

_EPS = torch.finfo(torch.float64).eps
_LARGEST_GRAM_CONDITION = 1e6
_FAILURE_PROBABILITY = 1e-6
_STEPS_PER_TEST = 4


def condition_number(
    weight: Float[Tensor, "*batch m n"],
    *,
    spectral_norm: Float[Tensor, "*batch"] | None = None,
    method: ConditionRoute = "auto",
    rtol: float = 0.01,
    max_iters: int = 300,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*batch"]:
    r"""How much a matrix stretches some direction more than another: ``sigma_max / sigma_min``.

    Two routes, both in float64 whatever the weight's dtype, so that the result is that of the
    stored matrix; for ``k = min(m, n)``, ``l = max(m, n)``:

    * ``"gram"``: both ends of the spectrum of the smaller Gram matrix. Measured errors up to
      0.07 % at a condition number of 1e6 (see `singular_values`), above which the other route is
      taken.
    * ``"inverse"``: R of a QR, ``O(k^2 l)``, then Lanczos on ``(R^T R)^{-1}`` by triangular
      solves, ``O(k^2)`` per step, and on ``R^T R`` unless `spectral_norm` is given. Stops once the
      largest eigenvalue is certified to `rtol` (see below), after 2 to 80 steps for Gaussian,
      graded and clustered spectra up to k = 1024. By then the measured error was at most 4e-4
      for condition numbers up to 1e12.

    The certificate needs no gap between eigenvalues: at each end it fails with a probability
    below 1e-6 over the random start, whatever the matrix. Steps grow like ``1 / sqrt(rtol)``
    where values cluster.

    ``"auto"`` takes the cheaper route: ``"inverse"`` for ``k >= 384`` and ``l < 1.25 k``, about
    where they cross. Chosen here by scripts/choose_exact_route.py; milliseconds on two cores of an
    AMD EPYC for gram / inverse / inverse with the norm given, beside all values by a float32 SVD:
    256 x 256 5 / 8 / 3 (4), 512 x 512 25 / 18 / 9 (28), 1024 x 1024 112 / 70 / 37 (129), 640 x 512
    25 / 22 / 13 (29), 1376 x 512 43 / 40 / 37 (33), 4096 x 512 83 / 123 / 99 (82), 768 x 3072
    101 / 110 / 103 (106). Where all singular values are at hand already, their ratio costs nothing.

    Waits for the device at every step, and takes the matrices of a batch one by one. Not
    differentiable.

    Args:
        weight: Matrix ``W``, shape ``(*batch, m, n)``, finite, non-empty.
        spectral_norm: Largest singular values, shape ``(*batch)``, if known to `rtol`, in the
            weight's own units; spares the QR route half its steps. The other route has no use
            for it.
        method: ``"auto"``, ``"gram"`` or ``"inverse"``.
        rtol: Certified relative error of the QR route, in ``(0, 1)``; the true value is never
            below the result by more than rounding. Default: the 1 % that a monitor reports to.
        max_iters: Most Lanczos steps at each end of the spectrum, at least 1. The default is three
            times the steps at which a Chebyshev polynomial certifies 1 % for a million columns.
        generator: Source of the random start. Defaults to a private one, so that the same weight
            gives the same result.

    Returns:
        Condition numbers, shape ``(*batch)``, dimensionless, at least 1, float32 (float64 for a
        float64 weight), on the device of `weight`. Infinite for a matrix that float64 cannot tell
        from a singular one (``sigma_min <= l * 2.2e-16 * sigma_max``), a zero matrix included.

    Raises:
        ValueError: If `weight` is empty, not a floating-point matrix or not finite, or another
            argument is outside its range.
        torch.linalg.LinAlgError: If an end of the spectrum is not certified within `max_iters`.

    References:
        Van Dorsselaer, Hochstenbach and Van der Vorst (2000), "Computing probabilistic bounds for
        extreme eigenvalues of symmetric matrices with the Lanczos method", SIAM J. Matrix Anal.
        Appl. 22(3) (the certificate). https://doi.org/10.1137/S0895479800366859
        Golub and Van Loan (2013), "Matrix computations", 4th ed., sec. 5.4 and 10.1.

    Example:
        >>> condition_number(torch.diag(torch.tensor([8.0, 2.0])))
        tensor(4.)
    """
    _require_options(weight, spectral_norm, method, rtol, max_iters)
    m, n = weight.shape[-2:]
    tall = (weight if m >= n else weight.mT).detach().reshape(-1, max(m, n), min(m, n))
    scale = power_of_two_below(require_finite(tall))
    squares: list[float | None] = [None] * len(tall)
    if spectral_norm is not None:
        squares[:] = (spectral_norm.reshape(-1) / scale.flatten()).square().tolist()
    if method == "auto":
        method = cheapest_condition_route(max(m, n), min(m, n))
    search = _Search(rtol, max_iters, generator or torch.Generator().manual_seed(0))
    values = [_condition(*args, method, search) for args in zip(tall, scale, squares, strict=True)]
    result = torch.tensor(values, dtype=compute_dtype(weight), device=weight.device)
    return result.reshape(weight.shape[:-2])


def cheapest_condition_route(num_rows: int, num_cols: int) -> ConditionRoute:
    """Route that ``method="auto"`` takes for a tall matrix."""
    return "inverse" if num_cols >= 384 and num_rows < 1.25 * num_cols else "gram"


class _Search(NamedTuple):
    """How `_largest_eigenvalue` looks for an end of the spectrum."""

    rtol: float
    max_iters: int
    generator: torch.Generator


def _condition(
    tall: Float[Tensor, "m n"],
    scale: Float[Tensor, "1 1"],
    largest: float | None,
    method: ConditionRoute,
    search: _Search,
) -> float:
    """Condition number of one matrix; `largest` is the square of its scaled spectral norm."""
    if method == "gram":
        squares = torch.linalg.eigvalsh(scaled_gram(tall, scale))
        low, high = squares[0].item(), squares[-1].item()
        if 0 < high <= _LARGEST_GRAM_CONDITION**2 * low:
            return math.sqrt(high / low)
    R = torch.linalg.qr(tall.double() / scale, mode="r").R
    if not bool(R.diagonal().all()):
        return math.inf
    if largest is None:
        largest = _largest_eigenvalue(lambda v: R.mT @ (R @ v), len(R), R.device, search)
    inverse = _largest_eigenvalue(lambda v: _solve_gram(R, v), len(R), R.device, search)
    condition = math.sqrt(largest * inverse)
    return condition if condition <= 1 / (len(tall) * _EPS) else math.inf


def _solve_gram(R: Float[Tensor, "n n"], v: Float[Tensor, "n 1"]) -> Float[Tensor, "n 1"]:
    """``(R^T R)^{-1} v`` by two triangular solves."""
    half = torch.linalg.solve_triangular(R.mT, v, upper=False)
    solution: Tensor = torch.linalg.solve_triangular(R, half, upper=True)
    return solution


def _largest_eigenvalue(
    product: Callable[[Tensor], Tensor], size: int, device: torch.device, search: _Search
) -> float:
    """Largest eigenvalue of a symmetric positive semi-definite operator, from below.

    Lanczos with full reorthogonalisation, in float64. Vector ``j`` is ``p_j(A) v`` for a
    polynomial ``p_j`` that follows from the coefficients, and ``v`` is random. As the vectors are
    orthonormal, ``(x^T v)^2 * sum_j p_j(largest)^2 <= 1`` for the eigenvector ``x`` sought, while
    ``|x^T v|`` is at least ``failure * sqrt(pi / (2 size))`` but for the probability ``failure``.
    Beyond the largest Ritz value the sum only grows, so once it has outgrown that bound at
    ``(1 + rtol) * ritz`` the Ritz value is within `rtol` of the truth, however closely the
    eigenvalues cluster. A small residual would only say that it is close to *some* eigenvalue.
    """
    start = torch.randn(
        size, 1, dtype=torch.float64, generator=search.generator, device=search.generator.device
    )
    bound = 2 * size / math.pi / _FAILURE_PROBABILITY**2
    num_iters = min(search.max_iters, size)
    basis = torch.empty(num_iters, size, dtype=torch.float64, device=device)
    diagonal: list[float] = []
    betas: list[float] = []
    step = (start / torch.linalg.vector_norm(start)).to(device)
    for k in range(num_iters):
        basis[k] = step.squeeze(-1)
        known = basis[: k + 1]
        step = product(step)
        # Twice is enough (Parlett 1998, sec. 6.9): one pass loses orthogonality to cancellation.
        first = known @ step
        step = step - known.mT @ first
        second = known @ step
        step = step - known.mT @ second
        diagonal.append((first[k] + second[k]).item())
        betas.append(torch.linalg.vector_norm(step).item())
        if not math.isfinite(betas[-1]):
            return math.inf
        exhausted = k + 1 == size or betas[-1] <= size * _EPS * max(diagonal)
        if exhausted or (k + 1) % _STEPS_PER_TEST == 0:
            ritz = _largest_ritz_value(diagonal, betas[:-1])
            if exhausted or _growth((1 + search.rtol) * ritz, diagonal, betas) >= bound:
                return ritz
        step = step / betas[-1]
    raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
        f"The extreme singular values were not certified to rtol={search.rtol} within"
        f" max_iters={search.max_iters} steps; raise either, or use `singular_values`."
    )


def _largest_ritz_value(diagonal: list[float], off: list[float]) -> float:
    """Largest eigenvalue of the tridiagonal Lanczos matrix."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    lower = torch.diag(torch.tensor(off, dtype=torch.float64), -1)
    # Only the lower triangle is read.
    ascending: list[float] = torch.linalg.eigvalsh(matrix + lower).tolist()
    return ascending[-1]


def _growth(x: float, diagonal: list[float], betas: list[float]) -> float:
    """Sum of the squared Lanczos polynomials at `x`, by their three-term recurrence."""
    previous, current, total, beta = 0.0, 1.0, 1.0, 0.0
    for alpha, next_beta in zip(diagonal, betas, strict=True):
        previous, current = current, ((x - alpha) * current - beta * previous) / next_beta
        total += current * current
        beta = next_beta
    return total


def _require_options(
    weight: Tensor, spectral_norm: Tensor | None, method: str, rtol: float, max_iters: int
) -> None:
    require_matrix(weight)
    if spectral_norm is not None and spectral_norm.shape != weight.shape[:-2]:
        raise ValueError(
            f"`spectral_norm` must have shape {tuple(weight.shape[:-2])}, one value per matrix,"
            f" got {tuple(spectral_norm.shape)}."
        )
    if method not in get_args(ConditionRoute):
        raise ValueError(
            f"`method` must be one of {', '.join(map(repr, get_args(ConditionRoute)))},"
            f" got {method!r}."
        )
    if not 0 < rtol < 1:
        raise ValueError(f"`rtol` must be in (0, 1), got {rtol}.")
    if max_iters < 1:
        raise ValueError(f"`max_iters` must be >= 1, got {max_iters}.")
