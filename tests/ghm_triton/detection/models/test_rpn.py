import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers
from torchvision.ops import box_iou, clip_boxes_to_image

from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.models.rpn import CleanProposalNetwork, ProposalNetwork
from ghm_triton.imbalance.cleanliness import assign_top_anchors
from ghm_triton.imbalance.sampling_free import GuidedLoss
from ghm_triton.losses import GHMCLoss

STRIDES = (8, 16, 32)
SIZE = (64, 96)


@pytest.fixture
def config(config: DetectorConfig) -> DetectorConfig:
    return dataclasses.replace(config, architecture="faster-rcnn", image_size=SIZE)


def network(config: DetectorConfig, guide: GuidedLoss | None = None) -> ProposalNetwork:
    torch.manual_seed(0)
    rpn = ProposalNetwork(16, STRIDES, config, guide)
    for layer in (rpn.head.cls_logits, rpn.head.bbox_pred):
        torch.nn.init.normal_(layer.weight, std=0.1)
    return rpn


def pyramid(batch: int) -> list[Tensor]:
    return [torch.randn(batch, 16, SIZE[0] // s, SIZE[1] // s) for s in STRIDES]


# Of 288 + 72 + 18 anchors some levels lose candidates or none, and the answer is full or not.
@pytest.mark.parametrize(
    ("candidates", "proposals", "full"),
    [(1000, 378, False), (50, 40, True), (20, 1000, False), (300, 7, True)],
)
def test_proposals_are_torchvisions(candidates, proposals, full, config):
    rpn = network(dataclasses.replace(config, candidates=candidates, proposals=proposals)).eval()
    features = pyramid(3)
    with torch.inference_mode():
        boxes, exist = rpn.propose(features)
        images = ImageList(torch.zeros(3, 3, *SIZE), [SIZE] * 3)
        levels = {str(i): x for i, x in enumerate(features)}
        expected, _ = RegionProposalNetwork.forward(rpn, images, levels)
    for ours, real, theirs in zip(boxes, exist, expected, strict=True):
        count = len(theirs)
        assert count == proposals if full else 0 < count < len(real)
        assert real.tolist() == [True] * count + [False] * (len(real) - count)
        # float32 operations in another order.
        torch.testing.assert_close(ours[:count], theirs, rtol=0, atol=1e-4)
        assert not ours[count:].any()


def test_proposals_without_a_side_are_none(config):
    rpn = network(config).eval()
    torch.nn.init.constant_(rpn.head.bbox_pred.bias[0], 0.0)
    with torch.no_grad():
        rpn.head.bbox_pred.weight.zero_()
        rpn.head.bbox_pred.bias.copy_(torch.tensor([50.0, 0.0, 0.0, 0.0]).repeat(3))  # far right
        _, exist = rpn.propose(pyramid(2))
    assert not bool(exist.any())


def test_scores_that_are_equal_in_float32_do_not_tie(config):
    """Objectness saturates early; the surer proposal comes first all the same."""
    rpn = network(config).eval()
    with torch.no_grad():
        rpn.head.cls_logits.weight.mul_(0.1)
        rpn.head.cls_logits.bias.fill_(30.0)
        rpn.head.bbox_pred.weight.zero_()
        objectness, _ = rpn.head(features := pyramid(1))
        boxes, _ = rpn.propose(features)
    assert all(bool((torch.sigmoid(x) == 1).all()) for x in objectness)
    first = torch.cat([x.permute(0, 2, 3, 1).flatten() for x in objectness]).argmax()
    # Unmoved anchors; sums of centres and halves round.
    expected = clip_boxes_to_image(rpn.anchors[first], SIZE)
    torch.testing.assert_close(boxes[0, 0], expected, rtol=0, atol=1e-5)


def test_ignored_boxes_are_neither_object_nor_background(config):
    rpn = network(config)
    boxes = rpn.anchors[[100, 250]] + torch.tensor([1.0, 0.0, 1.0, 0.0])
    kept = {"boxes": boxes, "labels": torch.tensor([7, 3])}
    hidden = {**kept, "ignore": torch.tensor([True, False])}
    seen, matched = rpn.assign_targets_to_anchors([rpn.anchors], [kept])
    labels, _ = rpn.assign_targets_to_anchors([rpn.anchors], [hidden])
    first = (seen[0] == 1) & (matched[0] == boxes[0]).all(1)
    assert bool(first[100])
    assert bool((labels[0][first] == -1).all())
    assert int(labels[0][250]) == 1
    assert torch.equal(labels[0][~first], seen[0][~first])


def test_an_image_of_no_boxes_is_background(config):
    rpn = network(config)
    empty = {"boxes": torch.zeros(0, 4), "ignore": torch.zeros(0, dtype=torch.bool)}
    labels, _ = rpn.assign_targets_to_anchors([rpn.anchors], [empty])
    assert not labels[0].any()


def test_boxes_are_float32_under_autocast(config):
    rpn = network(config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        objectness, deltas = rpn.head(pyramid(1))
    assert {x.dtype for x in (*objectness, *deltas)} == {torch.float32}


def test_anchors_grow_with_the_stride_and_the_scale(config):
    rpn = network(dataclasses.replace(config, anchor_scale=2.5))
    areas = (rpn.anchors[:, 2:] - rpn.anchors[:, :2]).prod(1).sqrt()
    for stride, own in zip(STRIDES, areas.split(rpn.level_anchors), strict=True):
        # torchvision rounds the corners of anchors to whole pixels.
        assert float(own.median()) == pytest.approx(2.5 * stride, abs=1)


def test_anchors_are_objects_from_an_iou_of_0_7_and_background_below_0_3(config):
    rpn = network(config)
    # Nearly half-way between two anchors of 24 pixels: IoU 0.72 and 0.71, and 0.66 and 0.63.
    shift = torch.tensor([[3.9, 0.0, 3.9, 0.0], [3.7, 1.5, 3.7, 1.5]])
    boxes = rpn.anchors[[103, 187]] + shift
    (labels,), _ = rpn.assign_targets_to_anchors([rpn.anchors], [{"boxes": boxes}])
    overlap = box_iou(boxes, rpn.anchors)
    best = overlap.amax(0)
    nearest = (overlap == overlap.amax(1, keepdim=True)).any(0)  # of a box, whatever the IoU
    assert torch.equal(labels == 1, (best >= 0.7) | nearest)
    assert torch.equal(labels == -1, (best >= 0.3) & (best < 0.7) & ~nearest)
    assert int((labels == 1).sum()) > 2
    between = (best >= 0.6) & (best < 0.7) & ~nearest
    assert bool(between.any())


class Asked(torch.nn.Module):
    """Notes what a loss is asked."""

    def forward(self, logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        self.logits, self.target, self.weight = logits.detach(), target.detach(), weight.detach()
        return logits.sum()


def clean(
    config: DetectorConfig,
    loss: torch.nn.Module | None = None,
    guide: GuidedLoss | None = None,
) -> CleanProposalNetwork:
    torch.manual_seed(0)
    clean = dataclasses.replace(config, assigner="cleanliness")
    rpn = CleanProposalNetwork(16, STRIDES, clean, loss, guide).train()
    for layer in (rpn.head.cls_logits, rpn.head.bbox_pred):
        torch.nn.init.normal_(layer.weight, std=0.1)
    return rpn


TARGETS = [
    {"boxes": torch.tensor([[4.0, 8.0, 40.0, 44.0], [38.0, 20.0, 92.0, 60.0]])},
    {"boxes": torch.zeros(0, 4)},
    {
        "boxes": torch.tensor([[10.0, 10.0, 30.0, 30.0], [50.0, 5.0, 80.0, 40.0]]),
        "ignore": torch.tensor([False, True]),
    },
]


def learn(rpn: ProposalNetwork) -> dict[str, Tensor]:
    torch.manual_seed(1)
    levels = {str(i): x for i, x in enumerate(pyramid(3))}
    _, losses = rpn(ImageList(torch.zeros(3, 3, *SIZE), [SIZE] * 3), levels, TARGETS)
    return losses


def raw(rpn: CleanProposalNetwork) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        objectness, deltas = concat_box_prediction_layers(*rpn.head(pyramid(3)))
    return objectness.view(3, -1), deltas.view(3, -1, 4)


def test_the_labels_of_a_clean_network_are_those_of_the_definition(config):
    loss = Asked()
    rpn = clean(config, loss)
    losses = learn(rpn)
    logits, deltas = raw(rpn)
    assert torch.equal(loss.logits.view(3, -1), logits)
    anchors, soft = rpn.anchors.double(), loss.target.view(3, -1)
    counted, off, positives = loss.weight.view(3, -1), 0.0, 0
    for i, target in enumerate(TARGETS):
        boxes = target["boxes"].double()
        owner = assign_top_anchors(boxes, anchors)
        for a in range(len(anchors)):
            if owner[a] < 0:
                assert (float(soft[i, a]), float(counted[i, a])) == (0.0, 1.0)
                continue
            if "ignore" in target and bool(target["ignore"][owner[a]]):
                assert float(counted[i, a]) == 0.0
                continue
            box, anchor, delta = boxes[owner[a]], anchors[a], deltas[i, a].double()
            size = anchor[2:] - anchor[:2]
            centre, sides = (anchor[:2] + anchor[2:]) / 2 + delta[:2] * size, delta[2:].exp() * size
            moved = torch.cat([centre - sides / 2, centre + sides / 2])
            loc = float(box_iou(moved[None], box[None]))
            cls = float(torch.sigmoid(logits[i, a].double()))
            # float32 against float64, through a box that was encoded and decoded.
            assert float(soft[i, a]) == pytest.approx(0.5 * loc + 0.5 * cls, abs=1e-5)
            goal = torch.cat(
                [
                    ((box[:2] + box[2:]) / 2 - (anchor[:2] + anchor[2:]) / 2) / size,
                    ((box[2:] - box[:2]) / size).log(),
                ]
            )
            d = (delta - goal).abs()
            off += float(torch.where(d <= 1 / 9, d * d / (2 / 9), d - 1 / 18).sum())
            positives += 1
    assert positives > 150
    # A sum of a thousand float32 terms.
    assert float(losses["loss_rpn_box_reg"].detach()) == pytest.approx(off / positives, rel=1e-4)


def test_a_clean_network_learns_by_ghm_over_every_anchor(config):
    asked, loss = Asked(), GHMCLoss(momentum=0.0, average="positives")
    learn(clean(config, asked))
    total = learn(clean(config, loss))["loss_objectness"]
    assert len(asked.logits) == 3 * 378
    expected = GHMCLoss(momentum=0.0, average="positives")(asked.logits, asked.target, asked.weight)
    assert torch.equal(total.detach(), expected)


def test_cleanliness_is_no_way_for_the_gradient(config):
    """The gradient of the objectness is that of BCE on constant labels, and boxes get none."""
    asked = Asked()
    learn(clean(config, asked))
    rpn = clean(config, GHMCLoss(momentum=0.0, strength=0.0))
    learn(rpn)["loss_objectness"].backward()
    assert rpn.head.bbox_pred.weight.grad is None
    valid = asked.weight.bool()
    slope = (torch.sigmoid(asked.logits) - asked.target)[valid].sum() / valid.sum()
    assert float(rpn.head.cls_logits.bias.grad.sum()) == pytest.approx(float(slope), rel=1e-4)


def test_a_network_starts_where_it_is_told(config):
    for rpn in (clean(config), network(config), network(config, GuidedLoss())):
        rpn.start_at(0.2)
        assert rpn.head.cls_logits.bias.tolist() == pytest.approx([math.log(0.2 / 0.8)] * 3)
    assert clean(config).head.cls_logits.bias.tolist() == pytest.approx([math.log(0.01 / 0.99)] * 3)


def test_labels_are_of_the_anchors_that_are_learnt_from(config):
    """Of a sampling network those it draws; of a guided one all that are not in between."""
    rpn = network(config)
    assigned, _ = rpn.assign_targets_to_anchors([rpn.anchors] * 3, TARGETS)
    guided = network(config, GuidedLoss()).labels(TARGETS)
    theirs = torch.stack(assigned)
    assert torch.equal(guided == 0, theirs == 1)
    assert torch.equal(guided == 1, theirs == 0)
    assert set(guided.unique().tolist()) == {-1, 0, 1}
    rpn.fg_bg_sampler.batch_size_per_image = 4
    drawn = rpn.labels(TARGETS)
    positives = (theirs == 1).sum(1).clamp(max=2)
    assert 0 < int(positives[0]) < int((theirs[0] == 1).sum())
    assert (drawn == 0).sum(1).tolist() == positives.tolist()
    assert (drawn >= 0).sum(1).tolist() == [4] * len(TARGETS)
    assert torch.equal(drawn[drawn >= 0], guided[drawn >= 0])


def test_a_guided_network_learns_from_every_anchor_by_the_definition(config):
    """In float64 and by hand: a mean over anchors, one over positives, and their ratio."""
    rpn = network(config, GuidedLoss()).train()
    noted = {}
    handed_on = rpn.compute_loss

    def note(*given):
        noted["given"] = given
        return handed_on(*given)

    rpn.compute_loss = note
    losses = learn(rpn)
    logits, deltas, labels, goals = noted["given"]
    labels, goals = torch.cat(labels), torch.cat(goals).double()
    x, own = logits.flatten().detach().double(), labels == 1
    entries = torch.where(own, -torch.sigmoid(x).log(), -torch.sigmoid(-x).log())
    classes = float(entries[labels >= 0].mean())
    d = (deltas - goals)[own].abs().detach()
    boxes = float(torch.where(d < 1 / 9, 4.5 * d**2, d - 1 / 18).sum() / own.sum())
    assert int(own.sum()) >= 2
    # Ours are float32 sums of a thousand terms.
    assert float(losses["unguided_objectness"]) == pytest.approx(classes, rel=1e-6)
    assert float(losses["loss_rpn_box_reg"].detach()) == pytest.approx(boxes, rel=1e-6)
    assert float(losses["loss_objectness"].detach()) == pytest.approx(boxes, rel=1e-6)
    assert not losses["unguided_objectness"].requires_grad
    losses["loss_objectness"].backward()
    slope = (torch.sigmoid(x) - own.double())[labels >= 0].mean() * boxes / classes
    assert float(rpn.head.cls_logits.bias.grad.sum()) == pytest.approx(float(slope), rel=1e-5)


def test_a_guided_network_without_boxes_learns_that_all_is_background(config):
    rpn = network(config, GuidedLoss()).train()
    levels = {str(i): x for i, x in enumerate(pyramid(1))}
    _, losses = rpn(ImageList(torch.zeros(1, 3, *SIZE), [SIZE]), levels, [TARGETS[1]])
    assert float(losses["loss_rpn_box_reg"].detach()) == 0.0
    assert float(losses["loss_objectness"].detach()) == float(losses["unguided_objectness"]) > 0
    losses["loss_objectness"].backward()
    assert bool((rpn.head.cls_logits.bias.grad > 0).all())


def test_a_clean_network_can_be_guided(config):
    losses = learn(clean(config, GHMCLoss(momentum=0.0), GuidedLoss()))
    plain = learn(clean(config, GHMCLoss(momentum=0.0)))
    assert float(losses["unguided_objectness"]) == float(plain["loss_objectness"].detach())
    wanted = float(plain["loss_rpn_box_reg"].detach())
    assert float(losses["loss_rpn_box_reg"].detach()) == wanted
    assert float(losses["loss_objectness"].detach()) == pytest.approx(wanted, rel=1e-6)


def test_a_clean_network_without_boxes_or_loss(config):
    rpn = clean(config, GHMCLoss())
    levels = {str(i): x for i, x in enumerate(pyramid(1))}
    images = ImageList(torch.zeros(1, 3, *SIZE), [SIZE])
    _, losses = rpn(images, levels, [TARGETS[1]])
    assert float(losses["loss_rpn_box_reg"].detach()) == 0.0
    sum(losses.values()).backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in rpn.parameters() if p.grad is not None)
    assert rpn.head.cls_logits.bias.grad.any()
    with pytest.raises(RuntimeError, match="without a loss"):
        clean(config)(images, levels, [TARGETS[0]])


def test_a_clean_network_proposes_as_any_other(config):
    rpn = clean(config).eval()
    plain = network(config).eval()
    plain.load_state_dict(rpn.state_dict())
    torch.manual_seed(2)
    features = pyramid(2)
    with torch.inference_mode():
        for ours, theirs in zip(rpn.propose(features), plain.propose(features), strict=True):
            assert torch.equal(ours, theirs)


def test_a_clean_network_learns_where_to_look(config):
    """Two boxes of one picture, among ten proposals."""
    rpn = clean(config, GHMCLoss(average="positives"))
    rpn.start_at(0.05)
    rpn.config = dataclasses.replace(rpn.config, proposals=10)
    torch.manual_seed(3)
    features = pyramid(1)
    levels = {str(i): x for i, x in enumerate(features)}
    images = ImageList(torch.zeros(1, 3, *SIZE), [SIZE])

    def found() -> float:
        with torch.inference_mode():
            boxes, _ = rpn.eval().propose(features)
        return float(box_iou(TARGETS[0]["boxes"], boxes[0]).amax(1).min())

    before = found()
    optimizer = torch.optim.Adam(rpn.parameters(), 3e-3)
    for _ in range(60):
        _, losses = rpn.train()(images, levels, TARGETS[:1])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert before < 0.7
    assert found() > 0.85
