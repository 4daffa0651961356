"""The density of a gradient norm, against its definition."""

import pytest
import torch

from ghm_triton import (
    gradient_density,
)

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

    def test_the_ends(self):
        density = gradient_density(torch.tensor([0.0, 0.5, 1.0]), bins=2)
        assert density.tolist() == [2.0, 4.0, 4.0]
        assert gradient_density(torch.zeros(0)).shape == (0,)

    def test_bad_input(self):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]; got 0 to 1.5"):
            gradient_density(torch.tensor([0.0, 1.5]))
        with pytest.raises(ValueError, match="must lie in"):
            gradient_density(torch.tensor([torch.nan]))
        with pytest.raises(TypeError, match="must be floating"):
            gradient_density(torch.tensor([1]))
