"""The losses straight from the papers, in float64 numpy, one loop a unit region.

Written from the formulas alone; shares no code with the package.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

EPS32 = float(torch.finfo(torch.float32).eps)
# Float32 arithmetic, in units of EPS32 relative to the truth. On a GPU exp(-|x|) is 2^(-|x| log2 e)
# and loses |x| / 2 of them, 8 at the logits drawn here; beta ** s = exp(s log beta) as many again;
# two divisions 2 each; the rest are products.
FLOAT32_ULPS = 32
# How far a gradient norm may be from the truth: a few steps of float32 at 1, for dense targets at
# the logits drawn here as well.
NORM_ERROR = 1e-6


@dataclass
class Average:
    """`S` and how often it moved."""

    smoothed: np.ndarray
    updates: int = 0


@dataclass
class Truth:
    """A loss and its gradient, of every entry before the division."""

    entries: np.ndarray
    slopes: np.ndarray
    valid: np.ndarray
    positives: float
    counts: list[int]
    weights: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def scale(self, reduction: str, average: str) -> float:
        """What multiplies the sum of the entries."""
        if reduction != "mean":
            return 1.0
        divisor = self.valid.sum() if average == "valid" else self.positives
        return 1.0 / max(float(divisor), 1.0)


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.where(
        x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-abs(x)))
    )


def one_hot(index: np.ndarray, classes: int) -> np.ndarray:
    target = np.zeros((*index.shape, classes))
    for j in range(classes):
        target[..., j] = index == j
    return target


def bce_parts(x: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cross entropy and its slope `p - p*`, without cancellation."""
    loss = target * np.logaddexp(0, -x) + (1 - target) * np.logaddexp(0, x)
    return loss, (1 - target) * sigmoid(x) - target * sigmoid(-x)


def asl1_parts(d: np.ndarray, mu: float) -> tuple[np.ndarray, np.ndarray]:
    """`sqrt(d^2 + mu^2) - mu`, without cancellation, and its slope."""
    length = np.hypot(d, mu)
    return d * d / (length + mu), d / length


def region(g: np.ndarray | float, bins: int) -> np.ndarray:
    """Region `j` is `[j / M, (j + 1) / M)`; `g = 1` belongs to the last."""
    opened = np.asarray(g)[..., None] >= np.arange(bins) / bins
    return opened.sum(axis=-1) - 1


def exact_density(norms: np.ndarray, valid: np.ndarray, bins: int) -> np.ndarray:
    """`GD(g) = #{k : g - eps/2 <= g_k < g + eps/2} / l(g)` of every valid entry, pair by pair."""
    half = 0.5 / bins
    density = np.zeros(norms.shape)
    for at, g in np.ndenumerate(norms):
        if valid[at]:
            inside = (norms >= g - half) & (norms < g + half) & valid
            density[at] = inside.sum() / (min(g + half, 1.0) - max(g - half, 0.0))
    return density


def fine_regions(bins: int) -> int:
    """Each bin in as many as possible, an odd number, 1024 in all at most."""
    return max(bins * split for split in range(1, 1025, 2) if bins * split <= 1024)


def streaming_density(counts: np.ndarray, bins: int) -> np.ndarray:
    """The density about the centre of each fine region, from the regions within half a window."""
    fine = len(counts)
    half = 0.5 / bins
    density = np.zeros(fine)
    for j in range(fine):
        inside = counts[2 * bins * np.abs(np.arange(fine) - j) < fine].sum()
        centre = (j + 0.5) / fine
        density[j] = inside / (min(centre + half, 1.0) - max(centre - half, 0.0))
    return density


def harmonize(
    slopes: np.ndarray,
    valid: np.ndarray,
    bins: int,
    *,
    strength: float = 1.0,
    density: str = "unit_region",
    normalizer: str = "valid_bins",
    max_weight: float | None = None,
    momentum: float = 0.0,
    ema: str = "debiased",
    state: Average | None = None,
) -> tuple[np.ndarray, list[int]]:
    """`beta ** strength` of every entry; moves `state` on when there is one."""
    norms = np.abs(slopes)
    cells = {"unit_region": bins, "exact": 1, "streaming": fine_regions(bins)}[density]
    state = state or Average(np.zeros(cells))
    regions = region(norms, cells)
    counts = [int(((regions == j) & valid).sum()) for j in range(cells)]
    total, n = sum(counts), sum(count > 0 for count in counts)
    if total == 0:
        return np.zeros(slopes.shape), counts
    state.updates += 1
    for j, count in enumerate(counts):
        if ema == "debiased" or count > 0:
            state.smoothed[j] = momentum * state.smoothed[j] + (1 - momentum) * count
    averages = state.smoothed / (1 - momentum**state.updates if ema == "debiased" else 1)
    if density == "exact":
        per_entry = exact_density(norms, valid, bins)
    elif density == "streaming":
        per_entry = streaming_density(averages, bins)[regions]
    else:
        per_entry = averages[regions] * (n if normalizer == "valid_bins" else bins)
    beta = total / np.where(valid, per_entry, 1)
    weights = np.minimum(beta**strength, np.inf if max_weight is None else max_weight)
    return np.where(valid, weights, 0.0), counts


def ghm_c(
    logits: torch.Tensor,
    target: torch.Tensor,
    label_weight: torch.Tensor | None = None,
    *,
    bins: int = 30,
    weighted: bool = False,
    **options,
) -> Truth:
    """GHM-C of every entry, from tensors of any dtype."""
    x, dense, valid, multiplier = _dense_inputs(logits, target, label_weight)
    loss, slopes = bce_parts(x, dense)
    return _assemble(loss, slopes, valid, dense.sum(), multiplier, bins, weighted, options)


def ghm_r(
    pred: torch.Tensor,
    target: torch.Tensor,
    label_weight: torch.Tensor | None = None,
    *,
    mu: float = 0.02,
    bins: int = 10,
    weighted: bool = False,
    **options,
) -> Truth:
    """GHM-R of every entry."""
    multiplier = _multiplier(label_weight, pred.shape)
    valid = multiplier > 0
    d = np.where(valid, as_numpy(pred) - as_numpy(target), 0)
    loss, slopes = asl1_parts(d, mu)
    return _assemble(loss, slopes, valid, valid.sum(), multiplier, bins, weighted, options)


def focal(
    logits: torch.Tensor,
    target: torch.Tensor,
    label_weight: torch.Tensor | None = None,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    weighted: bool = False,
) -> Truth:
    """Sigmoid focal loss of every entry: `-alpha_t (1 - p_t)^gamma log(p_t)`."""
    x, dense, valid, multiplier = _dense_inputs(logits, target, label_weight)
    positive, down = _focal_side(-x, gamma)
    negative, up = _focal_side(x, gamma)
    factors = np.where(valid, multiplier if weighted else 1.0, 0.0)
    loss = alpha * dense * positive + (1 - alpha) * (1 - dense) * negative
    slopes = (1 - alpha) * (1 - dense) * up - alpha * dense * down
    return Truth(factors * loss, factors * slopes, valid, dense.sum(), [], factors)


def _focal_side(u: np.ndarray, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """`q^gamma * -log(1 - q)` with `q = sigmoid(u)`, and its derivative by the product rule."""
    q, bce = sigmoid(u), np.logaddexp(0, u)
    return q**gamma * bce, gamma * q**gamma * sigmoid(-u) * bce + q**gamma * q


def ghm_softmax(
    logits: torch.Tensor,
    index: torch.Tensor,
    label_weight: torch.Tensor | None = None,
    *,
    bins: int = 30,
    weighted: bool = False,
    **options,
) -> Truth:
    """Softmax GHM: an entry is a row, its gradient norm `1 - p_y`; `slopes` are of every logit."""
    multiplier = _multiplier(label_weight, tuple(index.shape))
    valid = (multiplier > 0) & (as_numpy(index) >= 0)
    x = np.where(valid[..., None], as_numpy(logits), 0)
    loss, slopes, norms = softmax_parts(x, np.where(valid, as_numpy(index), 0))
    weights, counts = harmonize(norms, valid, bins, **options)
    factors = weights * np.where(valid, multiplier if weighted else 1.0, 0.0)
    return Truth(factors * loss, factors[..., None] * slopes, valid, valid.sum(), counts, factors)


def softmax_parts(x: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`-log p_y`, its slopes `p - onehot`, and `1 - p_y`, each without cancellation."""
    own = one_hot(index, x.shape[-1]) > 0
    p = np.exp(x - np.logaddexp.reduce(x, axis=-1, keepdims=True))
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    norms = np.where(own, 0, e).sum(axis=-1) / e.sum(axis=-1)
    rest = np.logaddexp.reduce(np.where(own, -np.inf, x), axis=-1)
    loss = np.logaddexp(0, rest - np.where(own, x, 0).sum(axis=-1))
    return loss, np.where(own, -norms[..., None], p), norms


def _dense_inputs(logits, target, label_weight):
    """Logits, targets one-hot, validity, and weights; 0 where ignored, which nothing looks at."""
    x = as_numpy(logits)
    multiplier = _multiplier(label_weight, x.shape)
    valid = multiplier > 0
    if is_dense(target):
        dense = as_numpy(target)
    else:
        index = as_numpy(target)
        valid &= (index >= 0)[..., None]
        dense = one_hot(index, x.shape[-1])
    return np.where(valid, x, 0), np.where(valid, dense, 0), valid, multiplier


def _multiplier(label_weight: torch.Tensor | None, shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(1.0 if label_weight is None else as_numpy(label_weight), shape)


def _assemble(loss, slopes, valid, positives, multiplier, bins, weighted, options) -> Truth:
    weights, counts = harmonize(slopes, valid, bins, **options)
    factors = weights * np.where(valid, multiplier if weighted else 1.0, 0.0)
    return Truth(factors * loss, factors * slopes, valid, positives, counts, factors)


@dataclass
class ReleasedGHM:
    """GHMC and GHMR as the authors released them, loop by loop: METHODS of the released code.

    Weights are `tot / count / n`, `n` the occupied bins; the average starts at 0, is not corrected,
    and moves only in bins that are occupied; `label_weight` only gates.
    """

    bins: int
    momentum: float
    acc: list[float] = field(default_factory=list)

    def weigh(self, g: np.ndarray, valid: np.ndarray, last_edge: float, tot: float) -> np.ndarray:
        edges = [j / self.bins for j in range(self.bins)] + [last_edge]
        if not self.acc:
            self.acc = [0.0] * self.bins
        weights = np.zeros(g.shape)
        occupied = 0
        for j in range(self.bins):
            inside = (g >= edges[j]) & (g < edges[j + 1]) & valid
            count = int(inside.sum())
            if count == 0:
                continue
            if self.momentum > 0:
                self.acc[j] = self.momentum * self.acc[j] + (1 - self.momentum) * count
                weights[inside] = tot / self.acc[j]
            else:
                weights[inside] = tot / count
            occupied += 1
        return weights / occupied if occupied else weights

    def ghm_c(self, x: np.ndarray, target: np.ndarray, label_weight: np.ndarray):
        """Loss and gradient of the logits."""
        valid = label_weight > 0
        tot = max(float(valid.sum()), 1.0)
        loss, slope = bce_parts(x, target)
        weights = self.weigh(np.abs(sigmoid(x) - target), valid, 1 + 1e-6, tot)
        return float((weights * loss).sum() / tot), weights * slope / tot

    def ghm_r(self, d: np.ndarray, label_weight: np.ndarray, mu: float):
        """Loss and gradient of the predictions. `tot` is the sum of the weights, not a count."""
        valid = label_weight > 0
        tot = max(float(label_weight.sum()), 1.0)
        loss, slope = asl1_parts(d, mu)
        weights = self.weigh(np.abs(slope), valid, 1e3, tot)
        return float((weights * loss).sum() / tot), weights * slope / tot


def away_from_edges(g: np.ndarray, bins: int) -> np.ndarray:
    """Which gradient norms float32 surely puts into the region that float64 does.

    An error of a few ulps near an edge moves an entry to the next region, which changes weights by
    whole counts: no tolerance of rounding covers that, so the tests draw such entries anew.
    """
    cells = np.asarray(g) * bins
    edge = np.rint(cells)
    margin = max(1e-4, NORM_ERROR * bins)
    return (np.abs(cells - edge) > margin) | (edge == 0) | (edge == bins)  # the ends part nothing


def away_from_windows(g: np.ndarray, bins: int) -> np.ndarray:
    """Which gradient norms lie surely inside or outside of every other's sliding window."""
    flat = g.ravel()
    apart = np.abs(np.abs(flat[:, None] - flat[None, :]) - 0.5 / bins)
    return (apart > NORM_ERROR).all(axis=1).reshape(g.shape)


def surely_placed(g: np.ndarray, bins: int, density: str) -> np.ndarray:
    """Which gradient norms count where they should in spite of float32."""
    if density == "exact":
        return away_from_windows(g, bins)
    return away_from_edges(g, fine_regions(bins) if density == "streaming" else bins)


def draw_logits(
    shape, target, dtype, bins, generator, spread=4.0, density="unit_region"
) -> torch.Tensor:
    """Normal logits of `dtype`, each away from the edges of the regions or windows."""
    dense = one_hot(as_numpy(target), shape[-1]) if not is_dense(target) else as_numpy(target)
    logits = (torch.randn(shape, generator=generator) * spread).to(dtype)
    for _ in range(100):
        norms = np.abs(sigmoid(as_numpy(logits)) - dense)
        unsafe = ~surely_placed(norms, bins, density)
        if not unsafe.any():
            return logits
        anew = (torch.randn(shape, generator=generator) * spread).to(dtype)
        logits = torch.where(torch.from_numpy(unsafe), anew, logits)
    raise RuntimeError("no logits away from the edges were found")


def draw_rows(
    shape, target, dtype, bins, generator, spread=4.0, density="unit_region"
) -> torch.Tensor:
    """As `draw_logits` for softmax: rows whose `1 - p_y` is away from the edges."""
    index = np.maximum(as_numpy(target), 0)
    logits = (torch.randn(shape, generator=generator) * spread).to(dtype)
    for _ in range(100):
        norms = softmax_parts(as_numpy(logits), index)[2]
        unsafe = torch.from_numpy(np.asarray(~surely_placed(norms, bins, density)))
        if not unsafe.any():
            return logits
        anew = (torch.randn(shape, generator=generator) * spread).to(dtype)
        logits = torch.where(unsafe[..., None], anew, logits)
    raise RuntimeError("no logits away from the edges were found")


def draw_pred(
    target, dtype, bins, mu, generator, spread=0.1, density="unit_region"
) -> torch.Tensor:
    """Predictions of `dtype` around a target, each away from the edges of the regions."""

    def draw() -> torch.Tensor:
        return (target + torch.randn(target.shape, generator=generator) * spread).to(dtype)

    pred = draw()
    for _ in range(100):
        slopes = asl1_parts(as_numpy(pred) - as_numpy(target), mu)[1]
        unsafe = ~surely_placed(np.abs(slopes), bins, density)
        if not unsafe.any():
            return pred
        pred = torch.where(torch.from_numpy(unsafe), draw(), pred)
    raise RuntimeError("no predictions away from the edges were found")


def is_dense(target: torch.Tensor) -> bool:
    return target.is_floating_point() or target.dtype == torch.bool


def assert_close(
    ours: torch.Tensor, truth, absolute=0.0, ulps: float = FLOAT32_ULPS, roundings: int = 1
) -> None:
    """`|ours - truth| <= k |torch at that dtype - truth| + tiny` with `k = 0`, entry by entry.

    Args:
        ours: In the dtype that rounds it.
        truth: Float64.
        absolute: Error that does not shrink with the truth, as where two numbers cancel.
        ulps: Of float32, for the arithmetic before the rounding.
        roundings: How often a 16-bit dtype rounded.

    `tiny` is that arithmetic, one step of a 16-bit dtype a rounding (to nearest costs half a step;
    the interpreter cuts bfloat16 off, for a whole one), and the dtype's smallest number.
    """
    truth = np.asarray(truth, dtype=np.float64)
    info = torch.finfo(ours.dtype)
    step = roundings * info.eps if info.eps > EPS32 else 0.0
    smallest = float(info.smallest_normal) * info.eps
    allowed = (ulps * EPS32 + step) * np.abs(truth) + smallest + np.asarray(absolute)
    error = np.abs(as_numpy(ours) - truth)
    assert error.shape == truth.shape
    worst = int(np.argmax(error - allowed)) if error.size else 0
    assert (error <= allowed).all(), (
        f"entry {worst}: {as_numpy(ours).flat[worst]} is not {truth.flat[worst]}"
        f" to within {np.broadcast_to(allowed, error.shape).flat[worst]}"
    )


def assert_gradient_close(
    ours: torch.Tensor, truth, absolute=0.0, ulps: float = FLOAT32_ULPS
) -> None:
    """As `assert_close`, for a gradient that something other than 1 came into.

    In bfloat16 it is rounded as it is formed with the loss, and again as it is multiplied. Not in
    float16, where the multiplication has to come first.
    """
    assert_close(ours, truth, absolute, ulps, roundings=2 if ours.dtype == torch.bfloat16 else 1)


def cancellation(logits: torch.Tensor, target: torch.Tensor) -> np.ndarray:
    """What dense targets cost: `p - p*` and `x - x p*` cancel, to an ulp of what went in."""
    size = 2 + np.abs(as_numpy(logits))
    return EPS32 * np.where(np.isfinite(size), size, 0) if is_dense(target) else np.zeros(1)
