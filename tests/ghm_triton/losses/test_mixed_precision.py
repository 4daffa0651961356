"""Half precision under autocast, and under a gradient scaler."""

import numpy as np
import pytest
import torch

from ghm_triton import GHMCLoss, GHMRLoss
from tests.ghm_triton.losses.tester import HarmonizedTester

# The interpreter's, which says what it does with what is not finite.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value|divide by zero) encountered in"
)


class Mixed:
    """A model whose predictions under autocast are its parameters in half precision."""

    def __init__(self, paper, device, generator, backend, dtype, kind):
        rows, classes = 60, 3
        shape = (rows, classes)
        if kind == "deltas":
            # Of one region, so that weights are 1; small ones have small gradients.
            self.target = torch.zeros(shape)
            values = 10 ** torch.linspace(-7, -3, rows * classes).view(shape).to(dtype)
            self.truth = paper.ghm_r(values, self.target)
            self.lost, self.divisor = np.zeros(shape), rows * classes
            self.criterion = GHMRLoss(strength=1.0, backend=backend)
        else:
            self.target = torch.rand(shape, generator=generator)
            if kind == "index":
                self.target = torch.randint(-1, classes + 1, shape[:1], generator=generator)
            values = paper.draw_logits(shape, self.target, dtype, 30, generator)
            if kind == "index":  # a background of 1e-7, and one that no number stands for
                self.target[:2] = classes
                values[:2] = torch.tensor([[-16.0], [-12.0]], dtype=dtype)
            else:
                values[0], self.target[0] = -16.0, 0.0
            self.truth = paper.ghm_c(values, self.target)
            self.lost = self.truth.weights * paper.cancellation(values, self.target)
            self.divisor = int(self.truth.valid.sum())
            self.criterion = GHMCLoss(strength=1.0, backend=backend)
        self.criterion.to(device)
        self.dtype, self.device = dtype, device
        self.target = self.target.to(device)
        self.weight = torch.nn.Parameter(values.float().to(device))
        self.features = torch.eye(rows, device=device)
        self.optimizer = torch.optim.SGD([self.weight], lr=1.0)

    def backward(self, scaler):
        """The loss, and the gradient of the parameters as it is then."""
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, dtype=self.dtype):
            self.predictions = self.features @ self.weight
            self.predictions.retain_grad()
            loss = self.criterion(self.predictions, self.target)
        assert self.predictions.dtype == self.dtype
        scaler.scale(loss).backward()
        return loss.detach(), self.weight.grad


class TestInHardCases:
    @pytest.mark.parametrize("kind", ["index", "soft", "deltas"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_under_a_gradient_scaler(
        self, paper, device, generator, backend, dtype, kind
    ):
        """A step of mixed precision as users write it; gradients of 1e-8 are not lost."""
        training = Mixed(paper, device, generator, backend, dtype, kind)
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16)
        loss, gradient = training.backward(scaler)
        assert loss.dtype == torch.float32
        paper.assert_close(
            loss, training.truth.entries.sum() / training.divisor, training.lost.sum()
        )
        scaler.unscale_(training.optimizer)
        assert gradient.dtype == torch.float32
        scaled = (gradient * 2.0**16).to(dtype)
        assert torch.equal(scaled.float(), gradient * 2.0**16)  # the dtype held it
        slopes, lost = (
            x / training.divisor * 2.0**16 for x in (training.truth.slopes, training.lost)
        )
        paper.assert_gradient_close(scaled, slopes, lost)
        assert np.abs(slopes[slopes != 0]).min() / 2.0**16 < 6e-8  # float16 has none as small
        before = training.weight.detach().clone()
        scaler.step(training.optimizer)
        scaler.update()
        assert torch.equal(training.weight, before - gradient)
        assert scaler.get_scale() == 2.0**16

    def test_a_step_that_the_scaler_skips(self, paper, device, generator, backend):
        training = Mixed(paper, device, generator, backend, torch.float16, "index")
        before = training.weight.detach().clone()
        # Forward is sound, and backward overflows: what was counted has been counted.
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**30)
        loss, _ = training.backward(scaler)
        assert loss.isfinite()
        assert training.predictions.grad.isinf().any()
        assert not training.predictions.grad.isnan().any()
        scaler.step(training.optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**29
        assert torch.equal(training.weight, before)
        assert int(training.criterion.density.updates) == 1
        # Forward overflows float16: nothing is counted, and nothing is learnt either.
        counted = HarmonizedTester.state_of(training.criterion)
        with torch.no_grad():
            training.weight[0, 0] = 1e5
        before = training.weight.detach().clone()
        loss, _ = training.backward(scaler)
        assert loss.isnan()
        scaler.step(training.optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**28
        assert torch.equal(training.weight, before)
        assert HarmonizedTester.state_of(training.criterion) == counted
