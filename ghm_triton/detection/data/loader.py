"""Batches that depend on seed and step alone, so that a resumed run repeats them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ghm_triton.detection.data.sample import DetectionDataset
from ghm_triton.detection.data.transforms import InputFormat, Letterbox, flip

Target = dict[str, Tensor]
Batch = tuple[Tensor, list[Target]]
Draw = tuple[int, int]  # (index in the data set, seed of its augmentation)


class StepSampler(Sampler[list[Draw]]):
    """Shuffled batches without end, a function of `(seed, step)`.

    Args:
        length: Samples in the data set.
        batch_size: Samples per step, over all ranks.
        seed: Seed of the shuffles.
        start: First step.
        stop: One past the last step.
        rank: Rank of this process, which takes every `world_size`-th sample of a batch.
        world_size: Number of processes.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if length < 1:
            raise ValueError("the training split is empty")
        if batch_size < world_size:
            raise ValueError(f"batch_size {batch_size} is less than the {world_size} processes")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start, self.stop = start, stop
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in range(self.start, self.stop):
            draws = range(step * self.batch_size, (step + 1) * self.batch_size)
            yield [(self._index(n), self.seed + n) for n in draws[self.rank :: self.world_size]]

    def _index(self, draw: int) -> int:
        epoch, offset = divmod(draw, self.length)
        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = torch.randperm(self.length, generator=generator).tolist()
            self._epoch = epoch
        return int(self._order[offset])


class TrainingView(Dataset[tuple[Tensor, Target]]):
    """The samples of a data set, letterboxed and randomly mirrored.

    Args:
        dataset: The samples.
        config: The network's input, such as a `DetectorConfig`.
        flips: Probabilities of a horizontal and a vertical mirror image.
    """

    def __init__(
        self, dataset: DetectionDataset, config: InputFormat, flips: tuple[float, float]
    ) -> None:
        self.dataset, self.flips = dataset, flips
        self.letterbox = Letterbox(config)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Target]:
        index, seed = draw
        sample = self.dataset[index]
        image, (scale_x, scale_y) = self.letterbox(sample.image)
        boxes = sample.boxes * torch.tensor([scale_x, scale_y, scale_x, scale_y])
        dice = torch.rand(2, generator=torch.Generator().manual_seed(seed)).tolist()
        image, boxes = flip(
            image, boxes, horizontal=dice[0] < self.flips[0], vertical=dice[1] < self.flips[1]
        )
        return image, {"boxes": boxes, "labels": sample.labels, "ignore": sample.ignore}


def collate(examples: list[tuple[Tensor, Target]]) -> Batch:
    """Stack images of one size; targets stay a list."""
    images, targets = zip(*examples, strict=True)
    return torch.stack(images), list(targets)


def training_loader(view: TrainingView, sampler: StepSampler, workers: int) -> DataLoader[Batch]:
    """Batches of `view` in the order of `sampler`."""
    loader: DataLoader[Batch] = DataLoader(
        view,  # type: ignore[arg-type]
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=False,
    )
    return loader
