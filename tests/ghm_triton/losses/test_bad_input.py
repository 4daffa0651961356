"""What the losses refuse, and that the error names it."""

import pytest
import torch

from ghm_triton import (
    GradientDensity,
    ghm_c_loss,
    ghm_r_loss,
)


class TestBadInput:
    @pytest.mark.parametrize(
        ("error", "match", "arguments"),
        [
            (TypeError, "logits must be a tensor, got list", ([1.0], torch.zeros(1))),
            (TypeError, "logits must be float32", (torch.zeros(2, dtype=int), torch.zeros(2))),
            (ValueError, "at least one dimension", (torch.zeros(()), torch.zeros(()))),
            (TypeError, "target must be a tensor, got int", (torch.zeros(2, 3), 1)),
            (ValueError, r"integer \[2\]", (torch.zeros(2, 3), torch.zeros(3))),
            (ValueError, r"got torch.float32 \[2\]", (torch.zeros(2, 3), torch.zeros(2))),
            (
                ValueError,
                r"label_weight \[2\] does not broadcast to \[2, 3\]",
                (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2)),
            ),
            (
                ValueError,
                r"label_weight must lie in \[0, inf\]; got -1 to -1",
                (torch.zeros(2, 3), torch.zeros(2, 3), -torch.ones(3)),
            ),
            (
                ValueError,
                "label_weight is on meta, the predictions on cpu",
                (torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3, device="meta")),
            ),
            (
                TypeError,
                "label_weight must be real",
                (torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3, dtype=torch.complex64)),
            ),
        ],
    )
    def test_tensors(self, error, match, arguments):
        with pytest.raises(error, match=match):
            ghm_c_loss(*arguments)

    @pytest.mark.parametrize(
        ("match", "options"),
        [
            ("bins must be an integer from 1 to 1024, got 0", {"bins": 0}),
            ("got 1025", {"bins": 1025}),
            ("got 2.5", {"bins": 2.5}),
            (r"strength must lie in \[0, 1\], got 1.5", {"strength": 1.5}),
            (r"strength must lie in \[0, 1\], got nan", {"strength": float("nan")}),
            ("normalizer must be one of valid_bins, bins; got 'x'", {"normalizer": "x"}),
            ("average must be one of valid, positives; got 'x'", {"average": "x"}),
            ("reduction must be one of mean, sum, none; got 'x'", {"reduction": "x"}),
            ("max_weight must be positive, got 0", {"max_weight": 0}),
            ("backend must be one of auto, triton, torch; got 'x'", {"backend": "x"}),
        ],
        ids=str,
    )
    def test_options(self, match, options):
        with pytest.raises(ValueError, match=match):
            ghm_c_loss(torch.zeros(2, 3), torch.zeros(2, 3), **options)

    def test_regression(self):
        with pytest.raises(ValueError, match="mu must be positive, got 0"):
            ghm_r_loss(torch.zeros(2), torch.zeros(2), mu=0)
        with pytest.raises(ValueError, match=r"pred is \[2\], target \[3\]"):
            ghm_r_loss(torch.zeros(2), torch.zeros(3))
        with pytest.raises(TypeError, match=r"target must be float32.*got torch.int64"):
            ghm_r_loss(torch.zeros(2), torch.zeros(2, dtype=int))
        with pytest.raises(ValueError, match="reduction must be one of"):
            ghm_r_loss(torch.zeros(2), torch.zeros(2), reduction="average")

    def test_a_state_elsewhere(self):
        state = GradientDensity(30, device=torch.device("meta"))
        with pytest.raises(ValueError, match="keeps its state on meta, the predictions are on cpu"):
            ghm_c_loss(torch.zeros(2, 3), torch.zeros(2, 3), state=state)
