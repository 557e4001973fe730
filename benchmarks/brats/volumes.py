"""Checked BraTS cases as tensors: normalised volumes, caches, and batches of random crops."""

import hashlib
import json
import os
import pickle
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from monai.transforms.compose import Compose
from monai.transforms.croppad.dictionary import RandSpatialCropd, SpatialPadd
from monai.transforms.spatial.dictionary import RandFlipd
from monai.transforms.utility.dictionary import EnsureTyped
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm.contrib.concurrent import thread_map

from benchmarks.brats.cases import (
    MODALITIES,
    SEGMENTATION,
    BratsData,
    Case,
    Regions,
    masks_of,
    read_volumes,
)
from benchmarks.runs import ranks
from benchmarks.runs.results import atomic_path

__all__ = ["Prepared", "make_dataset", "training_batches"]

CLIP = (1, 99)  # percentiles of the nonzero voxels
CACHE_FORMAT = 2  # raise when what a sample holds of the same files changes

Array = npt.NDArray[Any]
Sample = dict[str, Any]


def _zscore(array: Array) -> Array:
    inside = array != 0
    values = array[inside]
    values = values.clip(*np.percentile(values, CLIP)).astype(np.float32)
    mean, std = values.mean(dtype=np.float64), values.std(dtype=np.float64)
    result = np.zeros_like(array)
    result[inside] = (values - mean) / (std or 1.0)  # a mask has one value: it becomes 0
    return result


def _minmax(array: Array) -> Array:
    low, high = array.min(), array.max()
    scaled: Array = (array - low) / (high - low)
    return scaled


NORMALISATIONS = {"zscore": _zscore, "minmax": _minmax}


def make_dataset(
    cases: Sequence[Case],
    regions: Regions,
    *,
    normalisation: str,
    cache: str,
    cache_folder: Path | None = None,
) -> "Dataset[Sample]":
    """A map-style dataset of whole cases, in the order given, at their own resolution.

    Items are dictionaries of ``volume`` (M, D, H, W) float32, zeros where a modality is missing;
    ``available`` (M,) bool; ``label`` (R, D, H, W) uint8, 0 or 1, unless the case has no
    segmentation; ``name``. Modalities are in the order of MODALITIES, regions in that of
    ``regions``. Tensors of a memory cache are the cache's own: do not change them in place.

    Args:
        cases: of a :class:`~benchmarks.brats.cases.BratsData`.
        regions: name -> labels.
        normalisation: ``"zscore"``: the nonzero voxels of each volume are clipped to their 1st
            and 99th percentile and get mean 0 and standard deviation 1, the others stay 0.
            ``"minmax"``: (x - min) / (max - min) over all voxels, as in GMD's released loader.
        cache: ``"memory"`` reads every case now and keeps it: about 180 MB for a BraTS case.
            ``"disk"`` keeps as much in ``cache_folder``, in files that are read only where a crop
            needs them, by any number of runs; what is there is used again only for the same file
            contents, regions and normalisation. ``"none"`` reads the case every time.
        cache_folder: for ``"disk"``; made where it does not exist.

    Raises:
        ValueError: here or on access, a file is no longer what it was when it was checked.
    """
    folder = cache_folder if cache == "disk" else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    dataset = _Cases(cases, regions, normalisation, folder)
    if cache == "memory":
        numbers = range(len(cases))
        threads, quiet = min(4, os.cpu_count() or 1), not sys.stderr.isatty()
        dataset.kept = thread_map(
            dataset.__getitem__, numbers, max_workers=threads, desc="reading cases", disable=quiet
        )
    return dataset


class _Cases(Dataset[Sample]):
    """Samples as :func:`make_dataset` describes them. Not resampled.

    Not MONAI's CacheDataset and PersistentDataset: the second moves entries from the system's
    temporary folder, which copies where that is another file system (killed meanwhile, it leaves
    half an entry, and fails on reading it), and reads the whole entry for every crop.
    """

    def __init__(
        self, cases: Sequence[Case], regions: Regions, normalisation: str, folder: Path | None
    ) -> None:
        self.cases = cases
        self.regions = dict(regions)
        self.normalisation = normalisation
        self.folder = folder
        self.kept: list[Sample] = []

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> Sample:
        if self.kept:
            return dict(self.kept[index])  # who changes the dictionary he got changes a copy
        case = self.cases[index]
        return self._read(case) if self.folder is None else self._from_disk(case, self.folder)

    def _read(self, case: Case) -> Sample:
        arrays = read_volumes(case)
        segmentation = arrays.pop(SEGMENTATION, None)
        volume = np.zeros((len(MODALITIES), *case.shape), np.float32)
        for number, name in enumerate(MODALITIES):
            if name in arrays:
                normalise = NORMALISATIONS[self.normalisation]
                volume[number] = normalise(arrays.pop(name).astype(np.float32))
        sample: Sample = {
            "volume": torch.from_numpy(volume),
            "available": torch.tensor([name in case.files for name in MODALITIES]),
        }
        if segmentation is not None:
            label = masks_of(segmentation, self.regions)
            sample["label"] = torch.from_numpy(label.astype(np.uint8))
        return {**sample, "name": case.name}

    def _from_disk(self, case: Case, folder: Path) -> Sample:
        """Entries are named by everything that the sample depends on."""
        described = [CACHE_FORMAT, case.name, case.digest, MODALITIES, self.normalisation]
        key = json.dumps([*described, list(CLIP), list(self.regions.items())])
        path = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.pt"
        if path.is_file():
            try:
                # mmap: pages are read when touched, and writing to them changes only memory.
                return cast(Sample, torch.load(path, weights_only=True, mmap=True))
            except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
                warnings.warn(f"{path}: damaged ({error}); made again", stacklevel=2)
        sample = self._read(case)
        with atomic_path(path) as temporary:
            torch.save(sample, temporary)
        return sample


# --- training ------------------------------------------------------------------------------------


def training_batches(
    dataset: "Dataset[Sample]",
    *,
    crop: int,
    batch_size: int,
    seed: int,
    epoch: int,
    workers: int = 0,
    pin_memory: bool = False,
) -> "DataLoader[Sample]":
    """The batches of one epoch: every case once, a random crop of it, randomly flipped.

    Gives dictionaries of ``volume`` (B, M, crop, crop, crop) float32, ``available`` (B, M) bool,
    ``label`` (B, R, crop, crop, crop) uint8 and ``name``, a list; the last batch may be smaller.
    Crops lie anywhere inside the volume with the same probability, after zeros were added around
    what is smaller than the crop. Each of the three axes is flipped with probability 1/2.

    A rank gets its share of every batch, which may be nothing.

    The order depends on seed, epoch and the number of cases; a crop and its flips on seed, epoch
    and the case's place in the dataset. Nothing depends on ``workers`` or on torch's and NumPy's
    global generators, or changes them.

    Args:
        dataset: from :func:`make_dataset`.
        crop: voxels along each axis.
        batch_size: cases in a batch.
        seed: not negative.
        epoch: not negative.
        workers: processes that prepare batches; 0 prepares them in this one.
        pin_memory: whether batches lie in pinned memory, for faster copies to a GPU.
    """
    count = len(dataset)  # type: ignore[arg-type]
    order = np.random.RandomState(_derived(seed, epoch, 0)).permutation(count)
    batches = [order[start : start + batch_size] for start in range(0, count, batch_size)]
    return DataLoader(
        _Crops(dataset, crop, seed, epoch),
        batch_sampler=[ranks.share(batch).tolist() for batch in batches],
        collate_fn=_batch,
        num_workers=workers,
        pin_memory=pin_memory,
        # Workers' own seeds, which nothing here uses, would otherwise come from torch's generator.
        generator=torch.Generator(),
    )


def _batch(samples: list[Sample]) -> Sample:
    if samples:
        batch: Sample = default_collate(samples)
        return batch
    nothing, available = torch.empty(0), torch.empty(0, len(MODALITIES), dtype=torch.bool)
    return {"volume": nothing, "available": available, "label": nothing, "name": []}


class _Crops(Dataset[Sample]):
    def __init__(self, dataset: "Dataset[Sample]", crop: int, seed: int, epoch: int) -> None:
        keys = ("volume", "label")
        self.dataset = dataset
        self.seed = seed
        self.epoch = epoch
        self.augment = Compose(
            [
                SpatialPadd(keys, spatial_size=crop),
                RandSpatialCropd(keys, roi_size=crop, random_size=False),
                *(RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(3)),
                EnsureTyped(keys, track_meta=False),
            ]
        )

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Sample:
        self.augment.set_random_state(_derived(self.seed, self.epoch, index + 1))
        sample: Sample = self.augment(self.dataset[index])
        for key in ("volume", "label"):  # a crop without flips is a view of the cached volume
            sample[key] = sample[key].clone(memory_format=torch.contiguous_format)
        return sample


def _derived(*parts: int) -> int:
    """A seed of 32 bits from several numbers, none of them negative."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


@dataclass(frozen=True)
class Prepared:
    """Checked data, divided, and ready to be read."""

    data: BratsData
    split: Mapping[str, Sequence[Case]]  # train, valid, test
    datasets: Mapping[str, "Dataset[Sample]"]  # the same keys

    @property
    def source(self) -> str:
        return self.data.source

    @property
    def digest(self) -> str:
        return self.data.digest
