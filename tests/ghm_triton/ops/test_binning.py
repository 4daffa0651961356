"""Regions on their edges, and offsets beyond 32 bits, in the counting and weighing kernels."""

import pytest
import torch

from ghm_triton.losses.inputs import classification_inputs, regression_inputs

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("kernels_run")]


@pytest.mark.parametrize("kind", ["index", "soft", "deltas"])
def test_an_entry_is_weighed_by_the_region_it_was_counted_in(device, kind):
    """Also on the edges, where rounding decides: both kernels must round alike."""
    from ghm_triton.ops import backend as ops

    bins = 10
    g = torch.arange(1, bins, dtype=torch.float64) / bins
    edges = (0.02 * g / (1 - g * g).sqrt() if kind == "deltas" else torch.logit(g)).float()
    near = torch.stack([edges, edges.nextafter(edges + 1), edges.nextafter(edges - 1)])
    values = near.flatten()[:, None].expand(-1, 40).contiguous().to(device)
    one = torch.ones((), device=device)
    if kind == "deltas":
        inputs = regression_inputs(values, torch.zeros_like(values), None, None)
        count, weighted = ops.count_asl1, ops.weighted_asl1
    else:
        target = torch.zeros_like(values) if kind == "soft" else one.long().expand(27)
        inputs = classification_inputs(values, target, None, None)
        count, weighted = ops.count_bce, ops.weighted_bce

    def weigh(table):
        return weighted(inputs, table.to(device), one, weighted=False, reduce=False)

    weighed = weigh(torch.arange(1.0, bins + 1)) / weigh(torch.ones(bins))
    found = torch.bincount(weighed.round().long().flatten() - 1, minlength=bins)
    assert found.tolist() == count(inputs, bins).regions.tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="5 GiB of logits need a GPU")
def test_more_than_two_to_the_31_entries():
    from ghm_triton import ghm_c_loss, ops

    rows, classes = 2**26 + 3, 40  # 2.7e9 bfloat16 logits
    logits = torch.zeros(rows, classes, dtype=torch.bfloat16, device="cuda")
    logits[-1] = 100.0
    index = torch.full((rows,), classes, device="cuda")
    regions = ops.count_bce(classification_inputs(logits, index, None, None), 4).regions
    assert regions.tolist() == [0, 0, (rows - 1) * classes, classes]
    logits.requires_grad_()
    ghm_c_loss(logits, index, reduction="sum", strength=0.0).backward()
    assert logits.grad[-1].tolist() == [1.0] * classes
    assert logits.grad[-2].tolist() == [0.5] * classes


def test_offsets_beyond_two_to_the_31(device, tmp_path):
    """Rows whose stride fits into 32 bits and whose offset does not, in a file with a hole."""
    if device.type == "cuda":
        pytest.skip("the file is in the host's memory; another test does this on a GPU")
    from ghm_triton.ops import backend as ops

    apart = 2**30 + 8
    store = torch.from_file(str(tmp_path / "hole"), True, 2 * apart + 1, dtype=torch.float16)
    rows = store.as_strided((3, 1), (apart, 1))
    rows[2] = 3.0
    table = torch.tensor([0.0, 0.0, 0.0, 1.0])
    for logits, index in ((rows, torch.ones(3)), (rows.t(), torch.full((1,), 3))):
        inputs = classification_inputs(logits, index.long(), None, None)
        assert ops.count_bce(inputs, 4).regions.tolist() == [0, 0, 2, 1]
        loss = ops.weighted_bce(inputs, table, table[3], weighted=False, reduce=True)
        assert float(loss) == pytest.approx(3.0485873, rel=1e-6)  # softplus(3)
