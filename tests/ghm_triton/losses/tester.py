"""Properties that every loss has, checked against the papers' formulas in float64.

A loss is tested by a subclass of `LossTester` or `HarmonizedTester` that says how to draw inputs
and which cases there are; `conftest.py` parametrizes the tests by the subclass's `cases`. To add a
loss, add its formula to `tests/ghm_triton/paper.py` and a subclass.
"""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ghm_triton import GradientDensity, StrengthSchedule

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
POISONS = [torch.nan, torch.inf, -torch.inf]
OUTER = 3.7  # multiplies every loss before backward: 1 would hide a gradient that ignores it
ULPS = 1e-6  # relative, of float32: a handful of roundings
# Of densities whose kernels are those of unit regions.
WINDOW_KERNEL_TESTS = {
    "test_loss_and_gradient_are_those_of_the_formula",
    "test_label_weight_of_any_dtype",
    "test_training_steps",
    "test_bad_batches_and_evaluation_leave_the_state_alone",
    "test_a_prediction_that_is_not_finite_makes_the_loss_nan",
    "test_ignored_entries_may_hold_any_value",
    "test_empty_input",
}
kernels_only = pytest.mark.parametrize(
    "backend", [pytest.param("triton", marks=pytest.mark.kernels)], indirect=True
)
torch_only = pytest.mark.parametrize("backend", ["torch"], indirect=True)
LAYOUTS = ["transposed", "strided", "offset", "expanded", "channels"]


def lay_out(tensor, layout):
    """The same values with other strides, among NaN where there are holes."""
    if layout == "transposed":
        return tensor.t().contiguous().t()
    if layout == "channels":  # a head's output [N, C, H, W], viewed as [N, H, W, C]
        return tensor.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    rows, columns = tensor.shape
    if layout == "strided":
        wider = torch.full((2 * rows, 3 * columns), torch.nan, device=tensor.device)
        view = wider[::2, ::3]
    else:
        wider = torch.full((rows + 1, columns + 1), torch.nan, device=tensor.device)
        view = wider[1:, 1:]
    return view.copy_(tensor)


class LossTester:
    """Properties of a loss without state.

    Attributes:
        function: The loss as a function.
        module: The loss as a module.
        formula: Its name in `paper.py`.
        defaults: Options of every call that is compared with the formula.
        average: The default of `average`; None where the loss has no such option.
        rows: Whether an entry of the loss is a row of the predictions.
        stateless: Options with which the module is the function.
        kernel_tests: Tests that run the kernels too, which are slow in the interpreter; None: all.
        cases: Values for the parameters of tests, by name.
    """

    function = module = formula = None
    defaults: dict = {}
    average = "valid"
    rows = False
    kernel_tests = None
    stateless: dict = {}
    cases = {
        "kind": ["index", "soft", "bool"],
        "average": ["valid", "positives"],
        "options": [{}],
        "shape": [(131, 1), (131, 3), (67, 16), (20, 80), (13, 91), (2, 30, 5), (7, 2, 3, 4)],
        "weight_shape": [(30, 5), (5,), (30, 1), (2, 1, 1), (2, 30, 5)],
        "empty": [(0, 5), (3, 0), (0,), (2, 0, 5)],
        "layout": LAYOUTS,
        "bad_tensors": [],
        "bad_options": [],
        "bad_modules": [],
    }

    @pytest.fixture(autouse=True)
    def _context(self, paper, device, backend):
        self.paper, self.device, self.backend = paper, device, backend
        self.generator = torch.Generator().manual_seed(0)

    # What a subclass says of its inputs.

    def draw(self, kind, shape, dtype=torch.float32, spread=4.0, **options):
        """Predictions that rounding leaves in their unit regions, and targets."""
        raise NotImplementedError

    def tolerance(self, values, target, truth, options):
        """Absolute errors of the entries before scaling, a relative error, and ulps."""
        return 0.0, 0.0, self.paper.FLOAT32_ULPS

    def wrong_targets(self, target):
        """Targets that are out of range, with the message."""
        raise NotImplementedError

    # Helpers.

    def entry_shape(self, shape):
        return shape[:-1] if self.rows else shape

    def apply(self, values, target, weight=None, **options):
        """The function."""
        return type(self).function(values, target, weight, backend=self.backend, **options)

    def make(self, **options):
        """The module."""
        return type(self).module(backend=self.backend, **options).to(self.device)

    def call(self, values, target, weight=None, loss=None, **options):
        """Loss and gradient, by the function or by a module given as `loss`."""
        x = values.detach().requires_grad_()
        given = [None if t is None else t.to(self.device) for t in (target, weight)]
        loss = (self.apply if loss is None else loss)(x, *given, **options)
        (slope,) = torch.autograd.grad((loss * OUTER).sum(), x)
        return loss.detach(), slope

    def check(self, values, target, weight=None, **options):
        """The loss and its gradient are those of the formula."""
        values = values.to(self.device)
        options = {**self.defaults, **options}
        loss, slope = self.call(values, target, weight, **options)
        reduction, average = options.pop("reduction", "mean"), options.pop("average", self.average)
        loss_weight = options.pop("loss_weight", 1.0)
        truth = getattr(self.paper, self.formula)(values, target, weight, **options)
        scale = truth.scale(reduction, average) * loss_weight
        self.compare(loss, slope, truth, scale, reduction, values, target, options)

    def compare(self, loss, slope, truth, scale, reduction, values, target, options):
        lost, relative, ulps = self.tolerance(values, target, truth, options)
        entries, slopes = truth.entries * scale, truth.slopes * scale * OUTER
        error = np.broadcast_to(lost * scale + relative * np.abs(entries), entries.shape)
        assert loss.dtype == (torch.float64 if values.dtype == torch.float64 else torch.float32)
        if reduction == "none":
            self.paper.assert_close(loss, entries, error, ulps)
        else:
            self.paper.assert_close(loss, entries.sum(), error.sum(), ulps)
        assert slope.dtype == values.dtype
        # A few denormals, which are rounded at every step.
        error = lost * scale * OUTER + relative * np.abs(slopes) + 1e-44
        self.paper.assert_gradient_close(slope, slopes, error, ulps)

    def weights_like(self, values):
        """Label weights of 0, 0.5 and 1 for each entry."""
        shape = self.entry_shape(tuple(values.shape))
        return torch.randint(0, 3, shape, generator=self.generator) / 2

    # Values and gradients.

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_loss_and_gradient_are_those_of_the_formula(self, kind, dtype):
        self.check(*self.draw(kind, (2, 60, 5), dtype))

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_reductions(self, kind, reduction, average):
        chosen = {} if self.average is None or average is None else {"average": average}
        self.check(*self.draw(kind, (50, 4)), reduction=reduction, loss_weight=2.5, **chosen)

    def test_options(self, options):
        self.check(*self.draw(self.cases["kind"][0], (80, 5), **options), **options)

    def test_shapes(self, kind, shape):
        self.check(*self.draw(kind, shape))

    @pytest.mark.parametrize("weighted", [False, True])
    def test_label_weight_selects_and_multiplies(self, kind, weight_shape, weighted):
        values, target = self.draw(kind, (2, 30, 5))
        weight = torch.randint(0, 3, weight_shape, generator=self.generator) * 0.7
        if weight.numel() < 6:
            weight = weight + 0.7 * (weight.sum() == 0)
        self.check(values, target, weight, weighted=weighted, reduction="mean")
        self.check(values, target, weight, weighted=weighted, reduction="none")

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64, torch.float16])
    def test_label_weight_of_any_dtype(self, dtype):
        values, target = self.draw(self.cases["kind"][0], (40, 3))
        shape = self.entry_shape((40, 3))
        weight = torch.randint(0, 2, shape, generator=self.generator).to(dtype)
        self.check(values, target, weight, weighted=True)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
    def test_class_indices_of_any_dtype(self, dtype):
        values, target = self.draw("index", (40, 3), ignored=dtype != torch.uint8)
        self.check(values, target.to(dtype))

    def test_strides(self, kind, layout):
        values, target = self.draw(kind, (2, 4, 5, 6) if layout == "channels" else (40, 6))
        # Made on the device: a copy to another does not keep every layout.
        values = values.to(self.device)
        if layout == "expanded":
            values, target = (t[:1].expand(40, *t.shape[1:]) for t in (values, target))
            viewed = values
        else:
            viewed = lay_out(values, layout)
        assert torch.equal(viewed, values)
        self.check(viewed, target, reduction="none" if kind == "index" else "mean")

    def test_the_gradient_has_the_layout_of_the_predictions(self, kind):
        values, target = self.draw(kind, (40, 6))
        values = lay_out(values.to(self.device), "transposed").requires_grad_()
        loss = self.apply(values, target.to(self.device))
        loss.backward()
        assert values.grad.stride() == values.stride()

    @torch_only
    def test_float64_runs_in_torch(self, kind):
        values, target = self.draw(kind, (40, 3), torch.float64)
        self.check(values, target)

    # Entries that do not count.

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_empty_input(self, kind, empty, reduction):
        if kind == "index" and len(empty) == 1:
            empty = (0, 1)
        values = torch.zeros(empty, device=self.device)
        target = torch.zeros(empty[:-1]).long() if kind == "index" else torch.zeros(empty)
        loss, slope = self.call(values, target, reduction=reduction)
        assert not loss.any()
        assert loss.shape == (self.entry_shape(empty) if reduction == "none" else ())
        assert slope.shape == empty

    def test_everything_ignored(self, kind):
        values, target = self.draw(kind, (20, 3))
        values = values.to(self.device)
        none = torch.zeros(self.entry_shape((20, 3)))
        cases = [(target, none), (target, -none)]  # -0.0 is not positive either
        if kind == "index":
            cases.append((torch.full_like(target, -1), None))
        for given, weight in cases:
            loss, slope = self.call(values, given, weight)
            assert float(loss) == 0.0
            assert not slope.any()

    @pytest.mark.parametrize("poison", POISONS)
    def test_ignored_entries_may_hold_any_value(self, kind, poison):
        values, target = self.draw(kind, (40, 3))
        weight = torch.ones(self.entry_shape((40, 3)))
        ignored = (slice(5, 9),) if self.rows else (slice(5, 9), 1)
        weight[ignored] = 0
        values[5:9, 1] = poison
        if kind == "index":
            target[20], values[20], weight[20] = -7, poison, torch.inf
        else:
            target[ignored] = poison
        self.check(values, target, weight, weighted=True)
        self.check(values, target, weight, weighted=True, reduction="none")

    # Values that are not finite or out of range.

    @pytest.mark.parametrize("poison", POISONS)
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_a_prediction_that_is_not_finite_makes_the_loss_nan(self, kind, reduction, poison):
        values, target = self.draw(kind, (40, 3))
        if kind == "index":
            target[7] = 0
        for column in (0, 2):  # the class of the row, and another
            bad = values.clone()
            bad[7, column] = poison
            loss, slope = self.call(bad.to(self.device), target, reduction=reduction)
            assert loss.isnan().any()
            assert slope[7, column].isnan()

    def test_targets_out_of_range(self, kind):
        values, target = self.draw(kind, (40, 3))
        values = values.to(self.device)
        for place, wrong, message in self.wrong_targets(target):
            bad = target.to(wrong.dtype).clone()
            bad[place] = wrong
            with pytest.raises(ValueError, match=message):
                self.call(values, bad, validate=True)
            loss, slope = self.call(values, bad, validate=False)
            assert loss.isnan()
            assert slope[place].isnan().all()
            # Targets of ignored entries are not validated.
            weight = torch.ones(self.entry_shape((40, 3)))
            weight[place[:1]] = 0
            if kind != "index":
                self.call(values, bad, weight, validate=True)
            assert self.call(values, bad, weight, validate=False)[0].isfinite()

    # The graph.

    def test_the_same_bits_every_time_and_inputs_untouched(self, kind):
        values, target = (t.to(self.device) for t in self.draw(kind, (700, 5)))
        weight = self.weights_like(values).to(self.device)
        before = [t.clone() for t in (values, target, weight)]
        first, *others = [self.call(values, target, weight, weighted=True) for _ in range(3)]
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(before, (values, target, weight), strict=True))

    def test_only_the_predictions_have_a_gradient(self, kind):
        values, target = self.draw(kind, (10, 3))
        weight = torch.rand(self.entry_shape((10, 3)), generator=self.generator)
        tensors = [t.to(self.device) for t in (values, target, weight)]
        leaves = [t.requires_grad_() for t in tensors if t.is_floating_point()]
        loss = self.apply(*tensors, weighted=True)
        loss.backward()
        assert leaves[0].grad.abs().sum() > 0
        assert all(leaf.grad is None for leaf in leaves[1:])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_retained_graph_gives_the_same_gradient_again(self, kind, dtype):
        values, target = (t.to(self.device) for t in self.draw(kind, (30, 5), dtype))
        values.requires_grad_()
        loss = self.apply(values, target) * 3
        keep = [True, True, False]
        slopes = [torch.autograd.grad(loss, values, retain_graph=k)[0].clone() for k in keep]
        assert slopes[0].any()
        assert all(torch.equal(slopes[0], slope) for slope in slopes[1:])

    def test_two_losses_on_the_same_predictions_add_up(self, kind):
        values, target = (t.to(self.device) for t in self.draw(kind, (30, 5)))
        values.requires_grad_()
        two = [self.apply(values, target, loss_weight=w) for w in (1, 2)]
        (whole,) = torch.autograd.grad(two[0] + 2 * two[1], values)
        one = self.call(values, target)[1] / OUTER
        torch.testing.assert_close(whole, 5 * one, rtol=4e-6, atol=1e-9)

    @kernels_only
    def test_kernels_refuse_a_second_derivative(self, kind):
        values, target = (t.to(self.device) for t in self.draw(kind, (3, 2)))
        values.requires_grad_()
        outer = torch.ones((), device=self.device, requires_grad=True)
        loss = self.apply(values, target) * outer
        (slope,) = torch.autograd.grad(loss, values, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            slope.sum().backward()

    @kernels_only
    def test_predictions_changed_before_backward_are_noticed(self, kind):
        values, target = (t.to(self.device) for t in self.draw(kind, (3, 2)))
        leaf = values.requires_grad_()
        changed = leaf * 1
        loss = self.apply(changed, target, reduction="none")
        changed.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.sum().backward()

    @kernels_only
    def test_predictions_may_change_once_the_gradient_is_formed(self, kind):
        values, target = self.draw(kind, (3, 2))
        expected = self.call(values.to(self.device), target)[1] / OUTER
        leaf = values.to(self.device).requires_grad_()
        changed = leaf * 1
        loss = self.apply(changed, target.to(self.device))
        changed.add_(1)
        loss.backward()
        torch.testing.assert_close(leaf.grad, expected)

    def test_an_upstream_gradient_with_strides(self, kind):
        values, target = self.draw(kind, (41, 6))
        values = values.to(self.device)
        _, slope = self.call(values, target, reduction="none")
        outer = torch.randn(82)[::2] if self.rows else torch.randn(6, 41).t()
        x = values.requires_grad_()
        loss = self.apply(x, target.to(self.device), reduction="none")
        loss.backward(outer.to(self.device))
        expected = slope / OUTER * (outer[:, None] if self.rows else outer).to(self.device)
        torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-6)

    @kernels_only
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_kernels_in_poisoned_memory_that_walk(self, kind, reduction, poisoned, two_programs):
        """Scratch memory is filled with NaN, and two programs walk over all tiles."""
        for shape in [(9000, 1), (300, 37), (3, 2)]:
            if self.rows and shape[1] < 2:
                shape = (2600, 2)
            values, target = self.draw(kind, shape)
            options = {**self.defaults, "reduction": reduction}
            if "positives" in self.cases["average"]:
                options["average"] = "positives"
            ours = self.call(values.to(self.device), target, **options)
            self.device, device = torch.device("cpu"), self.device
            self.backend = "torch"
            truth = self.call(values, target, **options)
            self.device, self.backend = device, "triton"
            for one, other in zip(ours, truth, strict=True):
                torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_autocast_changes_nothing(self, kind, dtype):
        values, target = self.draw(kind, (30, 3), dtype)
        values = values.to(self.device)
        plain = self.call(values, target)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            cast = self.call(values, target)
        assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))
        assert cast[1].dtype == dtype

    # Options.

    def test_tensors_that_are_refused(self, bad_tensors):
        error, match, arguments = bad_tensors
        with pytest.raises(error, match=match):
            type(self).function(*arguments)

    def test_options_that_are_refused(self, bad_options):
        match, options = bad_options
        values, target = self.draw(self.cases["kind"][0], (2, 3))
        with pytest.raises(ValueError, match=match):
            type(self).function(values, target, **options)

    def test_modules_refuse_options_at_once(self, bad_modules):
        match, options = bad_modules
        with pytest.raises(ValueError, match=match):
            type(self).module(**options)

    def test_the_module_passes_its_options_on(self, kind, options):
        values, target = (t.to(self.device) for t in self.draw(kind, (20, 3)))
        weight = self.weights_like(values).to(self.device)
        options = {"weighted": True, "reduction": "sum", **options}
        module = self.make(loss_weight=2.0, **self.stateless, **options)
        ours = self.call(values, target, weight, loss=module)
        truth = self.call(values, target, weight, loss_weight=2.0, **options)
        assert all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))


class HarmonizedTester(LossTester):
    """Properties of a loss with a gradient density.

    Attributes:
        momentum: The module's default.
        densities: Those that the loss has.
        default_bins: Of the function.
    """

    momentum = 0.75
    default_bins = 30
    density = "unit_region"
    stateless = {"momentum": 0.0}
    cases = {
        **LossTester.cases,
        "options": [
            {"strength": 0.0},
            {"strength": 0.25},
            {"strength": 0.5, "normalizer": "bins"},
            {"normalizer": "bins"},
            {"max_weight": 1.5},
            {"max_weight": 0.9, "strength": 0.5},
            {"bins": 1},
            {"bins": 7},
            {"bins": 32},
            {"bins": 100},
        ],
        "strength": [1.0, 0.25, StrengthSchedule(1.0, 0.0, 3)],
        "ema": ["debiased", "mmdet"],
        "bad_options": [
            ("bins must be an integer from 1 to 1024, got 0", {"bins": 0}),
            ("got 1025", {"bins": 1025}),
            ("got 2.5", {"bins": 2.5}),
            ("got True", {"bins": True}),
            (r"strength must lie in \[0, 1\], got 1.5", {"strength": 1.5}),
            (r"strength must lie in \[0, 1\], got nan", {"strength": float("nan")}),
            ("normalizer must be one of valid_bins, bins; got 'x'", {"normalizer": "x"}),
            ("reduction must be one of mean, sum, none; got 'x'", {"reduction": "x"}),
            ("max_weight must be positive, got 0", {"max_weight": 0}),
            ("backend must be one of auto, triton, torch; got 'x'", {"backend": "x"}),
            ("density must be one of unit_region, exact, stre", {"density": "window"}),
            (r"at most 341 bins .* got bins=342", {"density": "streaming", "bins": 342}),
            (
                "keeps its state on meta, the predictions are on cpu: move the loss with .to",
                {"state": GradientDensity(30, device=torch.device("meta"))},
            ),
        ],
        "bad_modules": [
            ("reduction must be one of", {"reduction": "x"}),
            ("backend must be one of", {"backend": "x"}),
            ("ema must be one of", {"ema": "x"}),
            (r"momentum must lie in \[0, 1\), got 1", {"momentum": 1}),
            (r"momentum must lie in \[0, 1\), got nan", {"momentum": float("nan")}),
            ("density must be one of", {"density": "x"}),
        ],
    }

    @property
    def defaults(self):
        """The paper's strength; the default is milder."""
        return {"strength": 1.0, "density": self.density}

    def apply(self, values, target, weight=None, **options):
        return super().apply(values, target, weight, **{"density": self.density, **options})

    def make(self, **options):
        return super().make(**{"density": self.density, **options})

    @staticmethod
    def state_of(criterion):
        return {k: v.tolist() for k, v in criterion.density.state_dict().items()}

    def test_training_steps(self, ema, strength):
        """The moving average over batches of other sizes and spreads, as a module."""
        criterion = self.make(bins=10, strength=strength, ema=ema, loss_weight=2.0)
        state = self.paper.Average(np.zeros(criterion.density.regions))
        kind = self.cases["kind"][0]
        # Regions fall empty and fill again.
        for n, spread in enumerate([4.0, 0.5, 8.0, 2.0]):
            values, target = self.draw(kind, (20 + 17 * n, 3), bins=10, spread=spread)
            values = values.to(self.device)
            now = max(1.0 - n / 3, 0.0) if isinstance(strength, StrengthSchedule) else strength
            options = {"bins": 10, "strength": now, "ema": ema, "density": self.density}
            truth = getattr(self.paper, self.formula)(
                values, target, state=state, momentum=self.momentum, **options
            )
            loss, slope = self.call(values, target, loss=criterion)
            scale = 2.0 * truth.scale("mean", "valid")
            self.compare(loss, slope, truth, scale, "mean", values, target, options)
            if self.density != "exact":
                self.paper.assert_close(criterion.density.smoothed, state.smoothed)

    @pytest.mark.parametrize("poison", POISONS)
    def test_bad_batches_and_evaluation_leave_the_state_alone(self, kind, poison):
        criterion = self.make(validate=False)
        values, target = self.draw(kind, (30, 3))
        values = values.to(self.device)
        self.call(values, target, loss=criterion)
        before = self.state_of(criterion)
        assert before["updates"] == 1
        bad = values.clone()
        bad[3, 1] = poison
        if kind == "index":
            target[3] = 0
        assert self.call(bad, target, loss=criterion)[0].isnan()
        for place, wrong, _ in self.wrong_targets(target):
            wrong_target = target.to(wrong.dtype).clone()
            wrong_target[place] = wrong
            assert self.call(values, wrong_target, loss=criterion)[0].isnan()
        none = torch.zeros(self.entry_shape((30, 3)))
        assert self.call(values, target, none, loss=criterion)[0] == 0.0
        assert self.call(values[:0], target[:0], loss=criterion)[0] == 0.0
        criterion.eval()
        evaluated = self.call(values / 2, target, loss=criterion)
        assert self.state_of(criterion) == before
        criterion.train()
        trained = self.call(values / 2, target, loss=criterion)
        assert all(torch.equal(a, b) for a, b in zip(evaluated, trained, strict=True))
        assert self.state_of(criterion)["updates"] == 2

    @pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
    def test_a_copy_continues_with_the_same_losses(self, kind, way):
        options = {"strength": StrengthSchedule(1.0, 0.0, 8)}
        criterion = self.make(**options)
        batches = [self.draw(kind, (30, 3)) for _ in range(3)]
        for values, target in batches[:2]:
            self.call(values.to(self.device), target, loss=criterion)
        assert set(criterion.state_dict()) == {"density.smoothed", "density.updates"}
        if way == "state_dict":
            file = io.BytesIO()
            torch.save(criterion.state_dict(), file)
            file.seek(0)
            resumed = self.make(**options)
            resumed.load_state_dict(torch.load(file))
        elif way == "pickle":
            resumed = pickle.loads(pickle.dumps(criterion))  # noqa: S301
        else:
            resumed = copy.deepcopy(criterion)
        values, target = batches[2]
        ours, theirs = (
            self.call(values.to(self.device), target, loss=c) for c in (resumed, criterion)
        )
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert self.state_of(resumed) == self.state_of(criterion)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_a_module_in_half_precision_counts_in_float32(self, dtype):
        criterion = self.make(strength=1.0).to(dtype)
        values, target = self.draw(self.cases["kind"][0], (2051, 1 + self.rows), dtype)
        loss, _ = self.call(values.to(self.device), target, loss=criterion)
        assert loss.dtype == torch.float32
        assert criterion.density.smoothed.dtype == torch.float32

    def test_a_group_of_one_changes_nothing(self, kind):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            alone, shared = self.make(), self.make(process_group=dist.group.WORLD)
            values, target = self.draw(kind, (50, 4))
            for _ in range(2):
                one, other = (
                    self.call(values.to(self.device), target, loss=c) for c in (alone, shared)
                )
                assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
            assert self.state_of(alone) == self.state_of(shared)
        finally:
            dist.destroy_process_group()

    def test_the_order_of_rows_does_not_matter(self, kind):
        values, target = self.draw(kind, (500, 3))
        values = values.to(self.device)
        order = torch.randperm(500, generator=self.generator)
        loss, slope = self.call(values, target, strength=1.0)
        loss_too, slope_too = self.call(values[order], target[order], strength=1.0)
        # The weights are the same to the bit; a vector unit and the scalar code for the last few
        # entries round differently, and the loss is added in another order.
        torch.testing.assert_close(slope[order], slope_too, rtol=ULPS, atol=0)
        torch.testing.assert_close(loss, loss_too, rtol=ULPS, atol=0)

    def test_the_default_strength_is_the_one_that_trains_best(self, kind):
        values, target = (t.to(self.device) for t in self.draw(kind, (40, 3)))
        assert self.apply(values, target) == self.apply(values, target, strength=0.25)

    def test_a_schedule_is_read_before_its_update(self, kind):
        values, target = self.draw(kind, (40, 3))
        values = values.to(self.device)
        schedule = StrengthSchedule(1.0, 0.0, steps=2)
        bins, device = self.default_bins, self.device
        state = GradientDensity(bins, strength=schedule, density=self.density, device=device)
        for strength in (1.0, 0.5, 0.0):
            loss = self.call(values, target, state=state)
            alone = self.call(values, target, strength=strength)
            assert all(torch.equal(a, b) for a, b in zip(loss, alone, strict=True))
        start = self.apply(values, target.to(device), strength=schedule)
        assert torch.equal(start, self.apply(values, target.to(device), strength=1.0))

    @torch_only
    def test_it_compiles_without_a_break(self, kind):
        criteria = [self.make(validate=False) for _ in range(2)]
        compiled = torch.compile(criteria[0], fullgraph=True, backend="eager", dynamic=False)
        values, target = self.draw(kind, (40, 3))
        for _ in range(2):
            ours, plain = (self.call(values, target, loss=c) for c in (compiled, criteria[1]))
            for one, other in zip(ours, plain, strict=True):
                # Uncompiled, entries may be added in another order.
                torch.testing.assert_close(one, other, rtol=ULPS, atol=1e-12)
        assert self.state_of(criteria[0]) == self.state_of(criteria[1])
