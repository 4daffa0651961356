"""Feature pyramids: torchvision's ResNets, and one that trains on two CPU cores."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from ghm_triton.detection.models.config import DetectorConfig


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class TinyBackbone(nn.Module):
    """Five strided 3x3 stages, each of the last three refined once, under an FPN.

    Args:
        channels: Width of the deep stages and of the pyramid.

    Shape: `[B, 3, H, W]` to an ordered dict of P3, P4, P5: `[B, channels, H/2^l, W/2^l]`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = (3, channels // 4, channels // 2, channels, channels, channels)
        self.stem = nn.Sequential(_stage(widths[0], widths[1], 2), _stage(widths[1], widths[2], 2))
        self.stages = nn.ModuleList(
            nn.Sequential(
                _stage(widths[i], widths[i + 1], 2), _stage(widths[i + 1], widths[i + 1], 1)
            )
            for i in (2, 3, 4)
        )
        self.fpn = FeaturePyramidNetwork([channels] * 3, channels)
        self.out_channels = channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute P3..P5 of a batch of normalised images."""
        x = self.stem(images)
        levels: OrderedDict[str, Tensor] = OrderedDict()
        for level, stage in enumerate(self.stages, start=3):
            x = stage(x)
            levels[f"p{level}"] = x
        pyramid: dict[str, Tensor] = self.fpn(levels)
        return pyramid


def build_backbone(config: DetectorConfig) -> tuple[nn.Module, tuple[int, ...]]:
    """Build the pyramid that a configuration names, with random weights.

    Returns:
        The module (with `out_channels`) and the strides of its levels, finest first.
    """
    if config.backbone == "tiny":
        return TinyBackbone(config.channels), (8, 16, 32)
    if config.architecture == "faster-rcnn":  # P2..P6, the last a subsampled P5
        backbone = resnet_fpn_backbone(
            backbone_name=config.backbone,
            weights=None,
            norm_layer=nn.BatchNorm2d,
            trainable_layers=5,
        )
        return backbone, (4, 8, 16, 32, 64)
    backbone = resnet_fpn_backbone(
        backbone_name=config.backbone,
        weights=None,
        norm_layer=nn.BatchNorm2d,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    return backbone, (8, 16, 32, 64, 128)
