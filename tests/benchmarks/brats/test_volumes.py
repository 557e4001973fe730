"""BraTS cases as tensors: normalisation, caches that never lie, crops that depend on seeds only."""

import itertools
import random
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.transforms import NormalizeIntensity
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.brats.cases import MODALITIES, REGIONS, BratsData, load_folder, read_regions
from benchmarks.brats.volumes import make_dataset, training_batches
from tests.benchmarks.brats.cases import OLD, REAL, SHAPE, Array, arrays, write, write_case

Sample = dict[str, Any]

CACHES = ("memory", "disk", "none")


@pytest.fixture
def data(tmp_path: Path) -> BratsData:
    """Three cases, (5, 6, 7); the second has no t1ce."""
    for number in range(3):
        write_case(tmp_path / f"data/case{number}", number)
    (tmp_path / "data/case1/case1_t1ce.nii.gz").unlink()
    return load_folder(tmp_path / "data", REGIONS, allow_missing=True)


def dataset_of(
    data: BratsData, tmp_path: Path, cache: str = "none", normalisation: str = "zscore"
) -> Dataset[Sample]:
    return make_dataset(
        data.cases,
        data.regions,
        normalisation=normalisation,
        cache=cache,
        cache_folder=tmp_path / "cache",
    )


def one_volume(tmp_path: Path, array: Array, normalisation: str) -> Array:
    """What the t1 volume ``array`` becomes."""
    contents = {**arrays(shape=array.shape), "t1": array}
    write_case(tmp_path / "one", contents)
    dataset = dataset_of(load_folder(tmp_path, REGIONS), tmp_path, normalisation=normalisation)
    volume: Array = dataset[0]["volume"][0].numpy()
    return volume


def assert_same(one: Sample, other: Sample) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, Tensor):
            assert value.dtype == other[key].dtype
            assert torch.equal(value, other[key]), key
        else:
            assert value == other[key]


# --- samples -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", CACHES)
def test_samples(data: BratsData, tmp_path: Path, cache: str) -> None:
    dataset = dataset_of(data, tmp_path, cache)
    assert len(dataset) == 3  # type: ignore[arg-type]
    for _ in range(2):  # made, then from the cache
        for number in range(3):
            sample = dataset[number]
            assert list(sample) == ["volume", "available", "label", "name"]
            assert sample["name"] == f"case{number}"
            for key in ("volume", "available", "label"):
                assert type(sample[key]) is Tensor  # no MetaTensor
            assert (sample["volume"].dtype, sample["volume"].shape) == (torch.float32, (4, *SHAPE))
            assert (sample["label"].dtype, sample["label"].shape) == (torch.uint8, (3, *SHAPE))
            assert sample["available"].tolist() == [True, number != 1, True, True]
            assert sample["volume"].flatten(1).any(1).tolist() == sample["available"].tolist()
            seg = arrays(number)["seg"]
            for channel, labels in zip(sample["label"], REGIONS.values(), strict=True):
                np.testing.assert_array_equal(channel, np.isin(seg, labels))


def test_zscore(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(200, 90, (9, 10, 11)).astype(np.float32)
    array[:3] = 0
    array[4, 4, 4], array[4, 4, 5], array[4, 4, 6] = 60000, -900, -0.5  # the border is negative
    found = one_volume(tmp_path, array, "zscore")
    inside = array != 0
    ordered = np.sort(array[inside].astype(float))
    last = len(ordered) - 1
    low, high = np.interp([0.01 * last, 0.99 * last], np.arange(last + 1), ordered)
    clipped = np.where(inside, array.astype(float).clip(low, high), 0)
    expected = NormalizeIntensity(nonzero=True, dtype=np.float64)(clipped)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.dtype == np.float32
    assert not found[~inside].any()
    assert found[inside].mean() == pytest.approx(0, abs=1e-6)
    assert found[inside].std() == pytest.approx(1, abs=1e-6)
    assert found[4, 4, 4] == found.max() < 4


def test_zscore_of_large_values_does_not_lose_digits(tmp_path: Path) -> None:
    """Sums in float32 over a volume of such values would be off by percents."""
    array = np.full((40, 40, 40), 0, np.float32)
    array[:20] = 30000 + np.random.default_rng(0).normal(0, 1, (20, 40, 40))
    found = one_volume(tmp_path, array, "zscore")[:20].astype(float)
    assert found.mean() == pytest.approx(0, abs=1e-5)
    assert found.std() == pytest.approx(1, abs=1e-5)


def test_zscore_of_a_mask_is_finite(tmp_path: Path) -> None:
    array = np.zeros(SHAPE, np.int16)
    array[2:4] = 5
    assert not one_volume(tmp_path, array, "zscore").any()


def test_minmax(tmp_path: Path) -> None:
    array = np.zeros(SHAPE, np.float32)
    array[2] = 30
    array[3] = -10
    found = one_volume(tmp_path, array, "minmax")
    assert [np.unique(plane).tolist() for plane in found[:4]] == [[0.25], [0.25], [1.0], [0.0]]


# --- caches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", CACHES)
def test_what_is_done_to_a_sample_or_batch_does_not_reach_the_cache(
    data: BratsData, tmp_path: Path, cache: str
) -> None:
    dataset = dataset_of(data, tmp_path, cache)
    before = [
        {key: value.clone() if isinstance(value, Tensor) else value for key, value in item.items()}
        for item in (dataset[number] for number in range(3))
    ]
    dataset[0]["volume"] = torch.zeros(1)
    del dataset[1]["label"]
    for epoch in range(16):  # crops of the whole volume, among them some without a flip
        for batch in training_batches(dataset, crop=7, batch_size=1, seed=0, epoch=epoch):
            batch["volume"].fill_(-7)
            batch["label"].fill_(9)
    for number in range(3):
        assert_same(dataset[number], before[number])


def test_a_crop_does_not_keep_the_volume_alive(data: BratsData, tmp_path: Path) -> None:
    dataset = dataset_of(data, tmp_path, "memory")
    batches = training_batches(dataset, crop=2, batch_size=1, seed=0, epoch=0)
    crop = batches.dataset[0]["volume"]
    assert crop.untyped_storage().nbytes() == 4 * 2**3 * 4


def entries(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache").iterdir()}


def test_disk_entries_belong_to_contents_and_options(data: BratsData, tmp_path: Path) -> None:
    dataset_of(data, tmp_path, "disk")[0]
    first = entries(tmp_path)
    assert len(first) == 1
    dataset_of(data, tmp_path, "disk")[0]
    assert entries(tmp_path) == first
    minmax = dataset_of(data, tmp_path, "disk", "minmax")
    assert_same(minmax[0], dataset_of(data, tmp_path, "none", "minmax")[0])
    other = dataset_of(replace(data, regions={"core": (1, 4)}), tmp_path, "disk")
    np.testing.assert_array_equal(other[0]["label"][0], np.isin(arrays()["seg"], (1, 4)))
    renamed = replace(data, regions=dict(reversed(REGIONS.items())))
    label = dataset_of(data, tmp_path, "disk")[0]["label"]
    assert torch.equal(dataset_of(renamed, tmp_path, "disk")[0]["label"], label.flip(0))
    assert len(entries(tmp_path)) == 4
    # Another file in the same place.
    write(tmp_path / "data/case0/case0_t2.nii.gz", arrays(5)["t2"])
    changed = load_folder(tmp_path / "data", REGIONS, allow_missing=True)
    assert_same(dataset_of(changed, tmp_path, "disk")[0], dataset_of(changed, tmp_path)[0])
    assert len(entries(tmp_path)) == 5


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_damaged_disk_entry_is_made_again(data: BratsData, tmp_path: Path, share: float) -> None:
    sample = dataset_of(data, tmp_path, "disk")[0]
    expected = {key: torch.as_tensor(value) for key, value in sample.items() if key != "name"}
    expected = {key: value.clone() for key, value in expected.items()}
    (path,) = (tmp_path / "cache").iterdir()
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.warns(UserWarning, match="made again"):
        again = dataset_of(data, tmp_path, "disk")[0]
    assert_same({**expected, "name": "case0"}, again)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(dataset_of(data, tmp_path, "disk")[0], again)


@pytest.mark.slow
def test_killed_while_it_writes(tmp_path: Path) -> None:
    """SIGKILL as soon as a file appears: it is no entry, and the next run makes one."""
    write_case(tmp_path / "data/case0", arrays(0, (160, 160, 100)))  # 40 MB take a while
    program = """if True:
        import sys
        from pathlib import Path
        from benchmarks.brats.cases import REGIONS, load_folder
        from benchmarks.brats.volumes import make_dataset
        data = load_folder(Path(sys.argv[1]) / "data", REGIONS)
        make_dataset(data.cases, REGIONS, normalisation="zscore", cache="disk",
                     cache_folder=Path(sys.argv[1]) / "cache")[0]
    """
    command = [sys.executable, "-c", program, str(tmp_path)]
    cache = tmp_path / "cache"
    with subprocess.Popen(command, cwd=Path(__file__).parents[3]) as process:
        while process.poll() is None and not (cache.exists() and any(cache.iterdir())):
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    (left,) = cache.iterdir()
    assert left.stat().st_size < 4 * 4 * 160 * 160 * 100
    data = load_folder(tmp_path / "data", REGIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(dataset_of(data, tmp_path, "disk")[0], dataset_of(data, tmp_path)[0])
    assert len(entries(tmp_path)) == 2


@pytest.mark.parametrize("cache", CACHES)
def test_a_file_that_changed_after_the_check_is_not_trained_on(
    data: BratsData, tmp_path: Path, cache: str
) -> None:
    write(tmp_path / "data/case0/case0_t2.nii.gz", arrays(5)["t2"])
    with pytest.raises(ValueError, match="case0: its files have changed since they were checked"):
        dataset_of(data, tmp_path, cache)[0]


# --- training batches ----------------------------------------------------------------------------


def assert_same_batches(one: Iterable[Sample], other: Iterable[Sample]) -> None:
    for first, second in itertools.zip_longest(one, other):
        assert_same(first, second)


def test_batches(data: BratsData, tmp_path: Path) -> None:
    dataset = dataset_of(data, tmp_path, "memory")
    batches = training_batches(dataset, crop=4, batch_size=2, seed=0, epoch=0)
    first, last = batches
    assert len(batches) == 2
    assert sorted(first["name"] + last["name"]) == ["case0", "case1", "case2"]
    assert first["volume"].shape == (2, 4, 4, 4, 4)
    assert last["volume"].shape == (1, 4, 4, 4, 4)
    assert first["label"].shape == (2, 3, 4, 4, 4)
    assert (first["volume"].dtype, first["label"].dtype) == (torch.float32, torch.uint8)
    for batch in (first, last):
        for key in ("volume", "available", "label"):
            assert type(batch[key]) is Tensor
            assert batch[key].is_contiguous()
        for name, available in zip(batch["name"], batch["available"].tolist(), strict=True):
            assert available == [True, name != "case1", True, True]


def test_batches_depend_on_seed_and_epoch_and_nothing_else(data: BratsData, tmp_path: Path) -> None:
    options = {"crop": 4, "batch_size": 2, "seed": 3, "epoch": 5}
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    expected = list(training_batches(dataset_of(data, tmp_path), **options))
    dataset = dataset_of(data, tmp_path, "disk")
    batches = training_batches(dataset, **options)
    assert_same_batches(expected, batches)
    assert_same_batches(expected, batches)  # a second pass over the same epoch
    assert_same_batches(expected, training_batches(dataset, workers=2, **options))
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:], "global generators"
    list(training_batches(dataset, **{**options, "epoch": 6}))
    torch.rand(3)
    np.random.rand(3)
    assert_same_batches(expected, training_batches(dataset, **options))


def test_seeds_and_epochs_differ(data: BratsData, tmp_path: Path) -> None:
    dataset = dataset_of(data, tmp_path, "memory")
    drawn = set()
    for seed, epoch in itertools.product(range(4), range(4)):
        batches = training_batches(dataset, crop=3, batch_size=3, seed=seed, epoch=epoch)
        (batch,) = batches
        drawn.add((tuple(batch["name"]), batch["volume"].numpy().tobytes()))
    assert len(drawn) == 16
    assert len({names for names, _ in drawn}) > 3


def coordinates_case(folder: Path, shape: tuple[int, int, int]) -> BratsData:
    """A case whose t1 at voxel i is i + 1 in reading order, and whose labels follow from it."""
    numbers = np.arange(1, np.prod(shape) + 1).reshape(shape)
    contents = {name: numbers.astype(np.int16) for name in OLD}
    contents["seg"] = np.array([0, 1, 2, 4], np.uint8)[numbers % 4]
    write_case(folder / "one", contents)
    return load_folder(folder, REGIONS)


def test_crops_are_pieces_of_the_volume_drawn_uniformly_and_flipped(tmp_path: Path) -> None:
    """Place and flip are independent: else a flip would tell where the crop was."""
    shape, crop = (4, 4, 3), 3
    dataset = dataset_of(coordinates_case(tmp_path, shape), tmp_path, "memory", "minmax")
    whole = dataset[0]
    drawn: Counter[tuple[Any, ...]] = Counter()
    for epoch in range(160):
        (batch,) = training_batches(dataset, crop=crop, batch_size=1, seed=0, epoch=epoch)
        volume, label = batch["volume"][0], batch["label"][0]
        flipped = tuple(bool(volume[0].diff(dim=axis).mean() < 0) for axis in range(3))
        axes = [axis for axis, turned in zip((-3, -2, -1), flipped, strict=True) if turned]
        volume, label = volume.flip(axes), label.flip(axes)
        place = int((whole["volume"][0] == volume[0, 0, 0, 0]).int().argmax())
        start = tuple(map(int, np.unravel_index(place, shape)))
        window = (slice(None), *(slice(at, at + crop) for at in start))
        assert torch.equal(volume, whole["volume"][window])
        assert torch.equal(label, whole["label"][window])
        drawn[start, flipped] += 1
    assert len(drawn) == 4 * 8
    for part, size in ((0, 4), (1, 8)):
        counts = Counter(key[part] for key in drawn.elements())
        assert all(abs(count - 160 / size) < 24 for count in counts.values())  # std is 5.5 at most


def test_what_is_smaller_than_the_crop_gets_zeros_around_it(tmp_path: Path) -> None:
    data = coordinates_case(tmp_path, (3, 4, 9))
    dataset = dataset_of(data, tmp_path, "memory")
    whole = dataset[0]
    for epoch in range(5):
        (batch,) = training_batches(dataset, crop=6, batch_size=1, seed=0, epoch=epoch)
        volume, label = batch["volume"][0], batch["label"][0]
        assert volume.shape == (4, 6, 6, 6)
        assert label.shape == (3, 6, 6, 6)
        occupied = volume[0] != 0
        assert occupied.sum() == 3 * 4 * 6
        assert not label[:, ~occupied].any()
        assert set(volume[0][occupied].tolist()) <= set(whole["volume"][0].flatten().tolist())


# --- real cases ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="the real cases are not in ../shared/data/openms")
def test_real_cases() -> None:
    data = load_folder(REAL, read_regions("lesion=1"), workers=2)
    dataset = make_dataset(data.cases[:1], data.regions, normalisation="zscore", cache="memory")
    volume = dataset[0]["volume"]
    assert volume.shape == (len(MODALITIES), 182, 218, 182)
    for channel in volume:
        inside = channel[channel != 0].double()
        assert inside.mean() == pytest.approx(0, abs=1e-4)
        assert inside.std() == pytest.approx(1, abs=1e-4)
        assert 0.1 < len(inside) / channel.numel() < 0.2
    (batch,) = training_batches(dataset, crop=128, batch_size=1, seed=0, epoch=0)
    assert batch["volume"].shape == (1, 4, 128, 128, 128)
    assert batch["label"].shape == (1, 1, 128, 128, 128)
