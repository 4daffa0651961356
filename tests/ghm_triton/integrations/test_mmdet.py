"""MMDetection's GHMC and GHMR, step by step against the released algorithm in float64."""

import inspect

import numpy as np
import pytest
import torch

from ghm_triton import GHMCLoss, GHMRLoss
from ghm_triton.integrations.mmdet import GHMC, GHMR

OUTER = 3.3
LOSS_WEIGHT = 1.7
CLASSES = 4
MOMENTA = [0, 0.5, 0.75, 0.9]
# None is MMDetection's default; the last entry of each row is what must come out.
REDUCTIONS = [(None, "mean"), ("none", "none"), ("sum", "sum"), ("mean", "mean")]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(23)


class Released:
    """The released algorithm with every reduction: loss, gradient, and each entry's factor."""

    def __init__(self, paper, bins, momentum):
        self.paper, self.state = paper, paper.ReleasedGHM(bins=bins, momentum=momentum)

    def ghmc(self, x, dense, weight, reduction):
        tot = max(float((weight > 0).sum()), 1.0)
        return self._reduce(self.paper.bce_parts(x, dense), weight, 1 + 1e-6, tot, reduction)

    def ghmr(self, d, weight, reduction, mu=0.02):
        tot = max(float(weight.sum()), 1.0)
        return self._reduce(self.paper.asl1_parts(d, mu), weight, 1e3, tot, reduction)

    def _reduce(self, parts, weight, last_edge, tot, reduction):
        loss, slope = parts
        weights = self.state.weigh(np.abs(slope), weight > 0, last_edge, tot)
        factor = LOSS_WEIGHT * weights / (tot if reduction == "mean" else 1.0)
        return reduce(factor * loss, reduction), OUTER * factor * slope, factor


def reduce(entries, reduction):
    return entries if reduction == "none" else entries.sum()


def step(criterion, pred, *given, **named):
    """Loss and gradient of one call."""
    x = pred.detach().requires_grad_()
    loss = criterion(x, *given, **named)
    (slope,) = torch.autograd.grad(loss.sum() * OUTER, x)
    return loss.detach(), slope


def classification_batch(paper, generator, n):
    """Logits, class indices and weights of pyramid level `n`: sizes and spreads of all kinds."""
    rows = 12 + 9 * (n % 5)
    # -1 and 5 are outside 0..C: background, as a head leaves them under a weight of 0 or more.
    index = torch.randint(-1, CLASSES + 2, (rows,), generator=generator)
    spread = [4.0, 0.3, 8.0, 1.0][n % 4]  # narrow levels leave most regions empty
    shape = (rows, CLASSES)
    logits = paper.draw_logits(shape, index, torch.float32, 10, generator, spread=spread)
    logits[0] = torch.tensor([40.0, -40.0, 1e4, -1e4])  # g = 0 and g = 1: the outer edges
    weight = torch.randint(0, 3, (rows,), generator=generator) * 0.7
    if n == 5:
        weight.zero_()
    return logits, index, weight


def regression_batch(paper, generator, n, weights):
    rows = 10 + 7 * (n % 5)
    target = torch.randn(rows, 4, generator=generator)
    pred = paper.draw_pred(
        target, torch.float32, 10, 0.02, generator, spread=[0.1, 0.005, 1.0][n % 3]
    )
    pred[0] = torch.tensor([1e3, -1e8, 1e12, 0.0])  # g is 1 in float32: up to the edge of 1e3
    target[0] = 0.0
    weight = torch.randint(0, 2, (rows, 4), generator=generator).float()
    if weights == "fractional":
        weight *= 0.01 if n in (1, 2) else 0.3  # at 0.01 their sum is below 1, and `tot` is 1
    if n == 5:
        weight.zero_()
    return pred, target, weight


@pytest.mark.parametrize("kind", ["index", "dense", "integers"])
@pytest.mark.parametrize("momentum", MOMENTA)
def test_ghmc_step_by_step(paper, device, generator, backend, momentum, kind):
    released = Released(paper, 10, momentum)
    criterion = GHMC(10, momentum, True, LOSS_WEIGHT, backend=backend).to(device)
    for n in range(8):
        logits, index, weight = classification_batch(paper, generator, n)
        override, reduction = REDUCTIONS[n % 4]
        dense = paper.one_hot(paper.as_numpy(index), CLASSES)
        rows = np.broadcast_to(paper.as_numpy(weight)[:, None], dense.shape)
        expected, expected_slope, factor = released.ghmc(
            paper.as_numpy(logits), dense, rows, reduction
        )
        target = index
        if kind != "index":
            dtype = torch.float32 if kind == "dense" else torch.int64
            target = torch.from_numpy(dense).to(dtype)
            weight = weight[:, None].expand(logits.shape)
        given = [t.to(device) for t in (logits, target, weight)]
        loss, slope = step(criterion, *given, override, avg_factor=5.0)
        # Only with dense targets p - p* cancels.
        cancels = index if kind == "index" else torch.from_numpy(dense)
        lost = factor * paper.cancellation(logits, cancels)
        paper.assert_close(loss, expected, absolute=reduce(lost, reduction))
        paper.assert_close(slope, expected_slope, absolute=lost * OUTER)
        paper.assert_close(criterion.density.smoothed, *smoothed(released, momentum, criterion))


@pytest.mark.parametrize("weights", ["gates", "fractional"])
@pytest.mark.parametrize("momentum", MOMENTA)
def test_ghmr_step_by_step(paper, device, generator, backend, momentum, weights):
    released = Released(paper, 10, momentum)
    criterion = GHMR(0.02, 10, momentum, LOSS_WEIGHT, backend=backend).to(device)
    for n in range(8):
        pred, target, weight = regression_batch(paper, generator, n, weights)
        override, reduction = REDUCTIONS[n % 4]
        d = paper.as_numpy(pred) - paper.as_numpy(target)
        expected, expected_slope, _ = released.ghmr(d, paper.as_numpy(weight), reduction)
        given = [t.to(device) for t in (pred, target, weight)]
        loss, slope = step(criterion, *given, avg_factor=7.0, reduction_override=override)
        paper.assert_close(loss, expected)
        paper.assert_close(slope, expected_slope)
        paper.assert_close(criterion.density.smoothed, *smoothed(released, momentum, criterion))


def smoothed(released, momentum, criterion):
    """The average to expect; without momentum there is none to compare."""
    return [np.array(released.state.acc) if momentum else criterion.density.smoothed]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (GHMC.__init__, "bins=10 momentum=0 use_sigmoid=True loss_weight=1.0 reduction='mean'"),
        (GHMC.forward, "pred target label_weight=None reduction_override=None"),
        (GHMR.__init__, "mu=0.02 bins=10 momentum=0 loss_weight=1.0 reduction='mean'"),
        (GHMR.forward, "pred target label_weight=None avg_factor=None reduction_override=None"),
    ],
)
def test_positional_parameters_are_mmdetections(function, expected):
    """Heads and configurations pass these by position or name."""
    _, *parameters = inspect.signature(function).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    given = [p.name + ("" if p.default is p.empty else f"={p.default!r}") for p in positional]
    assert " ".join(given) == expected


class TestCall:
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_without_label_weights_every_entry_counts(self, reduction):
        """As FCOS calls it, with an `avg_factor`; as YOLOX and SSD do; and `GHMR` alike."""
        classify, regress = GHMC(reduction=reduction), GHMR(reduction=reduction)
        logits, index = torch.randn(6, 3), torch.tensor([0, 1, 2, 3, -1, 3])
        dense, everything = torch.zeros(6, 3), torch.ones(6, 3)
        kept = classify(logits, index, everything[:, 0])
        assert torch.equal(classify(logits, index, avg_factor=3, anything=3), kept)
        assert torch.equal(classify(logits, dense), classify(logits, dense, everything))
        assert torch.equal(regress(logits, dense), regress(logits, dense, everything))

    @pytest.mark.parametrize("reduction", ["mean", "none", "sum"])
    @pytest.mark.parametrize("override", [None, "mean", "none", "sum"])
    def test_the_override_wins(self, reduction, override):
        logits, index, weight = torch.randn(6, 3), torch.tensor([0, 1, 2, 3, 3, 3]), torch.ones(6)
        boxes, gate = torch.randn(6, 4), torch.full((6, 4), 0.5)
        for criterion, given in (
            (GHMC(reduction=reduction), (logits, index, weight)),
            (GHMR(reduction=reduction), (boxes, torch.zeros(6, 4), gate)),
        ):
            entries = criterion(*given, reduction_override="none")
            expected = {
                "none": entries,
                "sum": entries.sum(),
                "mean": entries.sum() / given[2].sum(),
            }
            if criterion.__class__ is GHMC:
                expected["mean"] = entries.mean()
            actual = criterion(*given, reduction_override=override)
            # The same numbers, summed in another order.
            torch.testing.assert_close(actual, expected[override or reduction], rtol=1e-6, atol=0)

    def test_weights_of_a_column(self):
        # As MMDetection does, whatever the shape: one weight an index.
        logits, index = torch.randn(6, 3), torch.tensor([0, 1, 2, 3, 3, 3])
        weight = torch.tensor([1.0, 0, 1, 0, 1, 1])
        column = GHMC()(logits, index, weight[:, None])
        assert torch.equal(column, GHMC()(logits, index, weight))

    def test_the_average_moves_in_training_with_sound_batches_only(self):
        criterion = GHMC(momentum=0.5)
        logits, index, weight = torch.randn(6, 3), torch.tensor([0, 1, 2, 3, 3, 3]), torch.ones(6)
        criterion.eval()(logits, index, weight)
        assert not criterion.density.smoothed.any()
        criterion.train()
        assert criterion(logits * float("nan"), index, weight).isnan()
        assert not criterion.density.smoothed.any()
        criterion(logits, index, weight)
        assert criterion.density.smoothed.sum() == 9  # half of 18 entries

    @pytest.mark.parametrize(
        "options",
        [
            {"strength": 0.25, "ema": "debiased", "max_weight": 1.1},
            {"strength": 0.5, "normalizer": "bins"},
        ],
    )
    def test_options_reach_the_loss(self, options):
        torch.manual_seed(0)
        ours = GHMCLoss(
            10, 0.75, loss_weight=2.0, average="positives", **{"ema": "mmdet", **options}
        )
        theirs = GHMC(10, 0.75, loss_weight=2.0, average="positives", **options)
        box, boxes = (
            GHMRLoss(0.1, 10, 0.75, **{"ema": "mmdet", **options}),
            GHMR(0.1, 10, 0.75, **options),
        )
        for _ in range(3):
            logits, index = torch.randn(50, 3), torch.randint(0, 4, (50,))
            assert torch.equal(theirs(logits, index, torch.ones(50)), ours(logits, index))
            deltas, zeros = torch.randn(50, 4), torch.zeros(50, 4)
            assert torch.equal(boxes(deltas, zeros, torch.ones(50, 4)), box(deltas, zeros))

    @pytest.mark.parametrize("loss", [GHMC, GHMR])
    def test_validation_and_backend_reach_the_loss(self, loss):
        ones = torch.ones(2, 4)
        assert loss(validate=False)(ones, ones, -ones) == 0  # nothing is valid
        with pytest.raises(ValueError, match=r"label_weight must lie in .* got -1 to -1"):
            loss()(ones, ones, -ones)
        with pytest.raises(ValueError, match=r"cannot run on a torch.float64 tensor"):
            loss(backend="triton")(ones.double(), ones, ones)


@pytest.mark.parametrize("loss", [GHMC, GHMR])
@pytest.mark.parametrize(
    ("name", "value"),
    [("reduction", "avg"), ("backend", "cuda"), ("momentum", 1.0), ("bins", 0), ("ema", "x")],
)
def test_options_of_both_losses_are_checked(loss, name, value):
    with pytest.raises(ValueError, match=f"{name} must .* got {value!r}"):
        loss(**{name: value})


@pytest.mark.parametrize("loss", [GHMC, GHMR])
def test_an_unknown_override_is_refused(loss):
    ones = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"reduction must .* got 'max'"):
        loss()(ones, ones, ones, reduction_override="max")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: GHMC(use_sigmoid=False), NotImplementedError, "use_sigmoid must be True"),
        (lambda: GHMC(average="batch"), ValueError, r"average must .* got 'batch'"),
        (lambda: GHMR(mu=0), ValueError, "mu must be positive, got 0"),
        (
            lambda: GHMC()(torch.ones(2, 3), torch.tensor([0, 1]), torch.ones(2, 3)),
            ValueError,
            r"label_weight \[2, 3\] .* one value .* \[2\]",
        ),
    ],
)
def test_other_arguments_are_checked(call, error, message):
    with pytest.raises(error, match=message):
        call()


class TestCheckpoints:
    """A run that was started with MMDetection's own loss goes on with ours."""

    ACC = (3.0, 0.0, 1.5, 40.0, 2.0, 0.25, 7.0, 9.0, 1.0, 12.0)

    @staticmethod
    def released_state(acc, prefix=""):
        edges = torch.arange(len(acc) + 1) / len(acc)
        return {f"{prefix}edges": edges, f"{prefix}acc_sum": torch.tensor(acc)}

    @pytest.mark.parametrize("loss", [GHMC, GHMR])
    def test_goes_on_from_the_released_average(self, paper, generator, loss):
        released = Released(paper, 10, 0.75)
        released.state.acc = list(self.ACC)
        criterion = loss(bins=10, momentum=0.75, loss_weight=LOSS_WEIGHT)
        state = self.released_state(self.ACC, "head.loss.")
        head = torch.nn.ModuleDict({"head": torch.nn.ModuleDict({"loss": criterion})})
        head.load_state_dict(state, strict=True)
        assert list(state) == ["head.loss.edges", "head.loss.acc_sum"]  # the caller's, untouched
        if loss is GHMC:
            logits, index, weight = given = classification_batch(paper, generator, 2)
            dense = paper.one_hot(paper.as_numpy(index), CLASSES)
            rows = np.broadcast_to(paper.as_numpy(weight)[:, None], dense.shape)
            expected = released.ghmc(paper.as_numpy(logits), dense, rows, "mean")
        else:
            pred, target, weight = given = regression_batch(paper, generator, 2, "gates")
            d = paper.as_numpy(pred) - paper.as_numpy(target)
            expected = released.ghmr(d, paper.as_numpy(weight), "mean")
        loss_value, slope = step(criterion, *given)
        paper.assert_close(loss_value, expected[0])
        paper.assert_close(slope, expected[1])

    def test_a_debiased_average_takes_it_as_settled(self):
        criterion = GHMC(bins=2, momentum=0.75, ema="debiased", reduction="none")
        criterion.load_state_dict(self.released_state([6.0, 2.0]))
        entries = criterion(torch.tensor([[-9.0], [9.0]]), torch.tensor([1, 1]), None)
        bce = torch.nn.functional.softplus(torch.tensor([[-9.0], [9.0]]))
        # S moves to 0.75 S + 0.25 R, and 1 - a^t does not enlarge it any more.
        expected = bce * torch.tensor([[2 / 4.75 / 2], [2 / 1.75 / 2]])
        torch.testing.assert_close(entries, expected, rtol=1e-6, atol=0)  # float32, four roundings

    def test_without_momentum_there_is_only_the_edges(self):
        criterion = GHMC(bins=5)
        state = self.released_state([0.0] * 5)
        del state["acc_sum"]
        criterion.load_state_dict(state, strict=True)
        assert not criterion.density.smoothed.any()
