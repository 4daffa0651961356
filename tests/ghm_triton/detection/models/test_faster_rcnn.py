import dataclasses

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign, batched_nms, clip_boxes_to_image
from torchvision.ops.poolers import LevelMapper

from ghm_triton.detection.models.backbones import build_backbone
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.models.faster_rcnn import FasterRCNNDetector, softmax_logits
from ghm_triton.detection.models.heads import HeadLosses
from ghm_triton.detection.models.losses import SmoothL1, SoftmaxCrossEntropy
from ghm_triton.detection.models.postprocess import DeployedDetector
from ghm_triton.detection.models.rpn import CleanProposalNetwork
from ghm_triton.imbalance.adversarial import Adversary
from ghm_triton.losses import GHMCLoss, GHMRLoss

SIZE = (96, 128)
NO_BOXES = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
SCENE = {
    "boxes": torch.tensor([[4.0, 8.0, 40.0, 44.0], [50.0, 30.0, 110.0, 90.0]]),
    "labels": torch.tensor([2, 0]),
}


@pytest.fixture(params=["sigmoid", "softmax"])
def config(request: pytest.FixtureRequest) -> DetectorConfig:
    return DetectorConfig(
        ("a", "b", "c"),
        SIZE,
        channels=16,
        architecture="faster-rcnn",
        classifier=request.param,
        head_convs=1,
        proposals=60,
        region_samples=32,
    )


@pytest.fixture
def losses(config: DetectorConfig) -> HeadLosses:
    softmax = config.classifier == "softmax"
    return HeadLosses(SoftmaxCrossEntropy() if softmax else GHMCLoss(momentum=0.0), GHMRLoss())


def lively(config: DetectorConfig, losses: HeadLosses | None = None) -> FasterRCNNDetector:
    """Random weights, large enough that scores and boxes differ from place to place."""
    torch.manual_seed(0)
    detector = FasterRCNNDetector(config, losses)
    predictor = detector.roi_heads.box_predictor
    for layer, std in (
        (detector.rpn.head.cls_logits, 0.2),
        (detector.rpn.head.bbox_pred, 0.05),
        (predictor.cls_score, 2.0),
        (predictor.bbox_pred, 2.0),
    ):
        torch.nn.init.normal_(layer.weight, std=std)
    # Regions of these small images on all levels of the pyramid, as those of large ones are.
    detector.roi_heads.box_roi_pool.canonical_scale = 24
    with torch.no_grad():  # no class wins everywhere
        features = detector.eval().features(torch.randn(4, 3, *SIZE))
        pooled = detector.pool(features, *detector.rpn.propose(list(features.values())))
        predictor.cls_score.weight *= 2 / detector.classify(pooled)[0].std(0)[:, None]
        predictor.cls_score.bias -= detector.classify(pooled)[0].mean(0)
    return detector


def torchvisions(detector: FasterRCNNDetector, threshold: float, iou: float) -> FasterRCNN:
    """torchvision's own model of our weights."""
    config = detector.config
    backbone, _ = build_backbone(config)
    model = FasterRCNN(
        backbone,
        min_size=SIZE[0],
        max_size=SIZE[1],
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        rpn_anchor_generator=detector.rpn.anchor_generator,
        rpn_head=RPNHead(16, 3, config.head_convs),
        rpn_pre_nms_top_n_test=config.candidates,
        rpn_post_nms_top_n_test=config.proposals,
        box_roi_pool=MultiScaleRoIAlign(["p3", "p4", "p5"], 7, 2, canonical_scale=24),
        box_head=TwoMLPHead(16 * 49, 64),
        box_predictor=type(detector.roi_heads.box_predictor)(64, 1 + config.num_classes),
        box_score_thresh=threshold,
        box_nms_thresh=iou,
    ).eval()
    model.load_state_dict(detector.state_dict())
    return model


@pytest.mark.parametrize("config", ["softmax"], indirect=True)
def test_softmax_detections_are_torchvisions_on_the_same_weights(config):
    detector = lively(config).eval()
    theirs = torchvisions(detector, threshold=0.3, iou=0.4)
    images = torch.randn(3, 3, *SIZE)
    with torch.inference_mode():
        expected = theirs(list(images))
        found = DeployedDetector(detector)(images, torch.full((3,), 0.3), torch.tensor([0.4]))
    for one in expected:
        one["labels"] = one["labels"] - 1
    assert_equal_detections(found, expected)


@pytest.mark.parametrize("config", ["sigmoid"], indirect=True)
def test_sigmoid_detections_are_those_of_torchvisions_parts(config):
    detector = lively(config).eval()
    images = torch.randn(3, 3, *SIZE)
    with torch.inference_mode():
        found = DeployedDetector(detector)(images, torch.full((3,), 0.6), torch.tensor([0.4]))
        expected = by_parts(detector, images, 0.6, 0.4)
    assert_equal_detections(found, expected)


def by_parts(
    detector: FasterRCNNDetector, images: Tensor, threshold: float, iou: float
) -> list[dict[str, Tensor]]:
    """Image by image, as torchvision's `RoIHeads` would with sigmoids."""
    heads, results = detector.roi_heads, []
    for image in images.split(1):
        features = detector.features(image)
        images_list = ImageList(image, [SIZE])
        proposals, _ = RegionProposalNetwork.forward(detector.rpn, images_list, features)
        pooled = heads.box_head(heads.box_roi_pool(features, proposals, [SIZE]))
        logits, deltas = heads.box_predictor(pooled)
        boxes = clip_boxes_to_image(heads.box_coder.decode(deltas, proposals), SIZE)
        scores = torch.sigmoid(logits)
        region, labels = torch.nonzero(scores > threshold).unbind(1)
        boxes, scores = boxes[region, labels], scores[region, labels]
        keep = batched_nms(boxes, scores, labels, iou)[:100]
        results.append({"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]})
    return results


def assert_equal_detections(found: tuple[Tensor, ...], expected: list[dict[str, Tensor]]) -> None:
    for boxes, scores, labels, count, theirs in zip(*found, expected, strict=True):
        assert 10 < int(count) == len(theirs["scores"]) < len(scores)
        assert set(theirs["labels"].tolist()) == {0, 1, 2}
        # The same float32 operations but for their order.
        torch.testing.assert_close(scores[:count], theirs["scores"], rtol=0, atol=1e-5)
        assert torch.equal(labels[:count], theirs["labels"])
        torch.testing.assert_close(boxes[:count], theirs["boxes"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("config", ["sigmoid"], indirect=True)
def test_regions_are_pooled_as_torchvision_pools_them(config):
    detector = lively(config).eval()
    features = {str(i): torch.randn(2, 16, 96 // s, 128 // s) for i, s in enumerate((8, 16, 32))}
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(2, 20, 2, generator=generator) * 60
    sides = 2 + 60 * torch.rand(2, 20, 2, generator=generator) ** 2
    boxes = torch.cat([corner, corner + sides], 2)
    exist = torch.ones(2, 20, dtype=torch.bool)
    exist[1, 13:] = False
    with torch.inference_mode():
        pooled = detector.pool(features, boxes, exist).unflatten(0, (2, 20))
        pooler = detector.roi_heads.box_roi_pool
        expected = pooler(features, [boxes[0], boxes[1, :13]], [SIZE, SIZE])
    assert detector.pyramid_levels(boxes.flatten(0, 1)).unique().tolist() == [0, 1, 2]
    assert torch.equal(torch.cat([pooled[0], pooled[1, :13]]), expected)
    assert not pooled[1, 13:].any()


@pytest.mark.parametrize("config", ["sigmoid"], indirect=True)
def test_levels_are_the_fpn_papers(config):
    detector = FasterRCNNDetector(config)
    sides = torch.tensor([1.0, 100, 111.9, 112, 112.1, 200, 223.99, 224, 225, 300, 447, 448, 900])
    boxes = torch.stack([torch.zeros(13), torch.zeros(13), sides, sides], 1)
    assert torch.equal(detector.pyramid_levels(boxes), LevelMapper(3, 5)([boxes]))
    assert detector.pyramid_levels(boxes).unique().tolist() == [0, 1, 2]


def test_labels_are_what_torchvision_sampled(config, losses, monkeypatch):
    detector = lively(config, losses).train()
    seen, sampled = [], []
    detector.observe_labels(seen.append)
    draw = RoIHeads.select_training_samples

    def note(heads, proposals, targets):
        chosen = draw(heads, proposals, targets)
        sampled.append(chosen)
        return chosen

    monkeypatch.setattr(RoIHeads, "select_training_samples", note)
    detector(torch.randn(3, 3, *SIZE), [SCENE, NO_BOXES, SCENE])
    theirs = torch.cat(sampled[0][2])
    assert [len(x) for x in sampled[0][2]] == [32, 32, 32]
    assert theirs.unique().tolist() == [0, 1, 3]  # background, then classes 0 and 2
    assert torch.equal(seen[0], torch.where(theirs == 0, 3, theirs - 1))


def test_regions_on_ignored_boxes_are_not_sampled(config, losses):
    detector = lively(config, losses).train()
    seen = []
    detector.observe_labels(seen.append)
    target = {**SCENE, "ignore": torch.tensor([True, False])}
    detector(torch.randn(1, 3, *SIZE), [target])
    assert set(seen[0].tolist()) == {0, 3}


class Recorder(torch.nn.Module):
    """Notes what a loss is asked."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        self.asked = a.detach(), b.detach()
        return a.sum()


def test_losses_see_all_regions_and_the_boxes_of_their_class(config, monkeypatch):
    losses = HeadLosses(Recorder(), Recorder())
    detector = lively(config, losses).train()
    noted = {}
    classify = detector.classify

    def note(pooled):
        noted["logits"], noted["deltas"] = classify(pooled)
        return noted["logits"], noted["deltas"]

    monkeypatch.setattr(detector, "classify", note)
    result = detector(torch.randn(2, 3, *SIZE), [SCENE, SCENE])
    assert set(result) == {"classification", "bbox_regression", "rpn_objectness", "rpn_box"}
    logits, labels = losses.classification.asked
    assert logits.shape == (64, 3 + (config.classifier == "softmax"))
    assert torch.equal(logits, noted["logits"])
    predicted, goals = losses.regression.asked
    own = [int(i) for i in torch.nonzero(labels < 3)]
    assert len(own) >= 4
    by_hand = torch.stack([noted["deltas"][i, labels[i]] for i in own])
    assert torch.equal(predicted, by_hand)
    assert goals.shape == predicted.shape
    # A ground truth is a region too, with nothing left to correct; others have much.
    assert int((goals.abs().amax(1) < 1e-5).sum()) in range(1, 5)
    assert float(goals.abs().max()) > 1


@pytest.mark.parametrize("config", ["softmax"], indirect=True)
def test_the_softmax_loss_is_torchvisions(config):
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 4), torch.randint(0, 4, (50,))
    theirs = torch.nn.functional.cross_entropy(logits, (labels + 1) % 4)
    # 50 float32 terms in another order.
    assert float(SoftmaxCrossEntropy()(logits, labels)) == pytest.approx(float(theirs), rel=1e-6)
    ignored = torch.cat([labels, torch.tensor([-1, -1])])
    more = torch.cat([logits, torch.randn(2, 4)])
    assert float(SoftmaxCrossEntropy("sum")(more, ignored)) == pytest.approx(50 * float(theirs))
    assert float(SoftmaxCrossEntropy()(more, ignored)) == pytest.approx(float(theirs), rel=1e-6)


def test_a_batch_without_boxes_trains_on_its_background(config, losses):
    detector = lively(config, losses).train()
    result = detector(torch.randn(2, 3, *SIZE), [NO_BOXES, NO_BOXES])
    sum(result.values()).backward()
    assert float(result["bbox_regression"].detach()) == 0.0
    assert all(bool(torch.isfinite(p.grad).all()) for p in detector.parameters())
    assert bool(detector.roi_heads.box_predictor.cls_score.weight.grad.any())


@pytest.mark.parametrize("config", ["sigmoid"], indirect=True)
def test_the_density_is_that_of_all_sampled_regions(config, monkeypatch):
    detector = lively(config, HeadLosses(GHMCLoss(momentum=0.0), SmoothL1())).train()
    noted = []
    classify = detector.classify
    monkeypatch.setattr(detector, "classify", lambda x: noted.append(classify(x)) or noted[-1])
    detector.observe_labels(noted.append)
    loss = detector(torch.randn(2, 3, *SIZE), [SCENE, NO_BOXES])["classification"]
    labels, (logits, _) = noted
    assert float(loss.detach()) == pytest.approx(
        float(GHMCLoss(momentum=0.0)(logits.detach(), labels)), rel=1e-6
    )


def test_what_it_cannot_do_is_said(config, losses):
    images = torch.zeros(1, 3, *SIZE)
    with pytest.raises(RuntimeError, match="without losses"):
        FasterRCNNDetector(config)(images, [SCENE])
    with pytest.raises(RuntimeError, match="training mode only"):
        FasterRCNNDetector(config, losses).eval()(images, [SCENE])
    with pytest.raises(ValueError, match=r"\(64, 64\).*\(96, 128\)"):
        FasterRCNNDetector(config).predict(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("config", ["sigmoid"], indirect=True)
def test_the_prior_is_the_probability_at_the_start(config):
    detector = FasterRCNNDetector(dataclasses.replace(config, prior=0.02)).eval()
    with torch.inference_mode():
        scores = detector.predict(torch.zeros(1, 3, *SIZE)).scores
    # The weights add a little to the bias; the median region stays near the prior.
    assert float(scores[scores > 0].median()) == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("config", ["softmax"], indirect=True)
def test_boxes_without_a_side_never_stand(config):
    detector = lively(config).eval()
    with torch.no_grad():
        detector.roi_heads.box_predictor.bbox_pred.weight.zero_()
        detector.roi_heads.box_predictor.bbox_pred.bias.fill_(-1e4)  # far to the upper left
        answer = DeployedDetector(detector)(
            torch.randn(1, 3, *SIZE), torch.zeros(3), torch.tensor([0.5])
        )
    assert int(answer[3]) == 0


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_softmax_ranks_are_log_odds(scale):
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(200, 5, generator=generator, dtype=torch.float64)
    others = torch.stack([logits[:, [k for k in range(5) if k != j]] for j in range(5)], 1)
    expected = logits - others.logsumexp(2)
    # float32 rounds logits of up to 100 to 1e-5.
    ours = softmax_logits(logits.float()).double()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-5)


def test_of_two_softmaxes_that_are_equal_in_float32_the_rank_tells():
    logits = torch.tensor([[0.0, 18.0], [0.0, 18.5]])
    scores = torch.softmax(logits, 1)[:, 1]
    assert scores[0] == scores[1]
    ranks = softmax_logits(logits)[:, 1]
    assert ranks.tolist() == pytest.approx([18.0, 18.5])


def test_softmax_ranks_of_equal_logits_are_finite():
    assert softmax_logits(torch.zeros(1, 2)).tolist() == [[0.0, 0.0]]


class Bystander(torch.nn.Module):
    """An adversary that notes what it is shown and hides every object."""

    def forward(self, pooled, probability):
        self.pooled, self.sure = pooled.detach(), probability(pooled).detach()
        return pooled * 0, pooled.new_tensor(7.0)


def test_the_adversary_meets_the_positive_regions_alone(config, losses, monkeypatch):
    bystander = Bystander()
    detector = lively(config, dataclasses.replace(losses, adversary=lambda _: bystander)).train()
    asked, seen = [], []
    classify = detector.classify
    monkeypatch.setattr(detector, "classify", lambda x: asked.append(x.detach()) or classify(x))
    detector.observe_labels(seen.append)
    result = detector(torch.randn(2, 3, *SIZE), [SCENE, NO_BOXES])
    assert float(result["adversary"]) == 7.0
    labels = seen[0]
    own = labels < 3
    assert 2 <= int(own.sum()) < len(own)
    assert torch.equal(bystander.pooled, asked[0])
    assert not asked[1][own].any()  # as the adversary left them
    assert bool(asked[1][~own].flatten(1).any(1).all())
    logits, _ = classify(bystander.pooled)
    scores = torch.softmax(logits, 1)[:, 1:] if logits.shape[1] == 4 else torch.sigmoid(logits)
    by_hand = [float(row[label].detach()) for row, label in zip(scores, labels[own], strict=True)]
    assert bystander.sure.tolist() == pytest.approx(by_hand, rel=1e-5)


def test_an_adversary_takes_no_part_in_detecting(config, losses):
    detectors = []
    for chosen in (losses, dataclasses.replace(losses, adversary=Adversary)):
        torch.manual_seed(0)
        detectors.append(FasterRCNNDetector(config, chosen))
    plain, armed = detectors
    added = armed.state_dict().keys() - plain.state_dict().keys()
    assert added
    assert all(key.startswith("adversary.") for key in added)
    for key, weight in plain.state_dict().items():  # it draws from the generator last
        assert torch.equal(weight, armed.state_dict()[key]), key
    images = torch.randn(1, 3, *SIZE)
    with torch.inference_mode():
        ours, theirs = (x.eval().predict(images) for x in detectors)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_with_an_adversary_every_part_learns(config, losses):
    detector = lively(config, dataclasses.replace(losses, adversary=Adversary)).train()
    with torch.no_grad():  # as after some steps; from zero, layers before it start a step late
        torch.nn.init.normal_(detector.adversary.astn.localisation[-1].weight, std=0.1)
    result = detector(torch.randn(2, 3, *SIZE), [SCENE, SCENE])
    sum(result.values()).backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in detector.parameters())
    assert all(bool(p.grad.any()) for p in detector.adversary.astn.parameters())
    assert bool(detector.roi_heads.box_head.fc6.weight.grad.any())


def test_clean_proposals_are_a_matter_of_the_configuration(config, losses):
    config = dataclasses.replace(config, assigner="cleanliness")
    detector = lively(config, dataclasses.replace(losses, objectness=GHMCLoss())).train()
    assert isinstance(detector.rpn, CleanProposalNetwork)
    result = detector(torch.randn(2, 3, *SIZE), [SCENE, NO_BOXES])
    assert set(result) == {"classification", "bbox_regression", "rpn_objectness", "rpn_box"}
    assert int(detector.rpn.classification_loss.density.updates) == 1
    with pytest.raises(RuntimeError, match="built without a loss"):
        lively(config, losses).train()(torch.randn(1, 3, *SIZE), [SCENE])
