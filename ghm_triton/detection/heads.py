"""`HarmonizedRetinaNetHead` and `HeadLosses` under the name that the README documents."""

from ghm_triton.detection.models.heads import HarmonizedRetinaNetHead, HeadLosses

__all__ = ["HarmonizedRetinaNetHead", "HeadLosses"]
