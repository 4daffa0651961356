"""The density of a gradient norm, against its definition."""

import numpy as np
import pytest
import torch

from ghm_triton import gradient_density

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class TestGradientDensity:
    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
    def test_it_counts_the_entries_of_the_region(self, paper, device, generator, dtype):
        norm = torch.rand(40, 3, generator=generator).to(dtype)
        density = gradient_density(norm.to(device), bins=30)
        # 16-bit norms times 30 are exact in float32; float32's own are drawn off the edges.
        assert paper.away_from_edges(norm.double(), 30).all() or dtype.itemsize == 2
        regions = [paper.region(g, 30) for g in paper.as_numpy(norm).flat]
        expected = [regions.count(region) * 30 for region in regions]
        assert density.cpu().flatten().tolist() == expected
        assert density.dtype == torch.float32
        assert torch.equal(density, gradient_density(norm.to(device), 30, density="unit_region"))

    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
    @pytest.mark.parametrize("density", ["exact", "streaming"])
    def test_by_sliding_window(self, paper, device, generator, dtype, density):
        norm = torch.rand(40, 3, generator=generator).to(dtype)
        for _ in range(20):
            placed = paper.surely_placed(paper.as_numpy(norm), 30, density)
            anew = torch.rand(40, 3, generator=generator).to(dtype)
            norm = torch.where(torch.from_numpy(placed), norm, anew)
        truth = paper.as_numpy(norm)
        if density == "exact":
            expected = paper.exact_density(truth, np.ones(truth.shape, bool), 30)
        else:
            regions = paper.region(truth, 990)
            counts = np.bincount(regions.ravel(), minlength=990)
            expected = paper.streaming_density(counts, 30)[regions]
        ours = gradient_density(norm.to(device), 30, density)
        assert ours.dtype == torch.float32
        paper.assert_close(ours, expected, ulps=4)  # a length, a division, a rounding

    def test_the_ends(self):
        density = gradient_density(torch.tensor([0.0, 0.5, 1.0]), bins=2)
        assert density.tolist() == [2.0, 4.0, 4.0]
        assert gradient_density(torch.zeros(0)).shape == (0,)

    @pytest.mark.parametrize("density", ["exact", "streaming"])
    def test_the_ends_by_sliding_window(self, density):
        ours = gradient_density(torch.tensor([0.0, 0.5, 1.0]), 2, density)
        # Windows of 1/2 and, at the ends, of 1/4; in fine regions of 511 a bin, of half one more.
        cut = 4.0 if density == "exact" else 4.0 * 511 / 512
        assert ours.tolist() == pytest.approx([cut, 2.0, cut])
        assert gradient_density(torch.zeros(0), density=density).shape == (0,)

    def test_bad_input(self):
        with pytest.raises(ValueError, match=r"density must be one of .*; got 'x'"):
            gradient_density(torch.zeros(1), density="x")
        with pytest.raises(ValueError, match=r"at most 341 bins .* got bins=342"):
            gradient_density(torch.zeros(1), 342, "streaming")
        with pytest.raises(ValueError, match="bins must be an integer from 1 to 1024, got 0"):
            gradient_density(torch.zeros(1), 0, "exact")
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]; got 0 to 1.5"):
            gradient_density(torch.tensor([0.0, 1.5]))
        with pytest.raises(ValueError, match="must lie in"):
            gradient_density(torch.tensor([torch.nan]))
        with pytest.raises(TypeError, match="must be floating"):
            gradient_density(torch.tensor([1]))
