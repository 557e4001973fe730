"""Inference: one pass over a case gives the network's output for each combination."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from monai.inferers.utils import sliding_window_inference
from torch import Tensor

from benchmarks.brats.cases import MODALITIES
from benchmarks.brats.inference import case_logits, mean_of
from gradsplit import modality_combinations
from reference_models.unet3d import DynamicSharingUNet3d, UNet3dConfig
from tests.benchmarks.brats.tiny import small, weights_of

COMBINATIONS = modality_combinations(MODALITIES)
SINGLES = COMBINATIONS[-4:]

Sample = dict[str, Any]


@pytest.fixture(scope="module")
def model() -> DynamicSharingUNet3d:
    """With norms that differ between modalities, as after training."""
    torch.manual_seed(3)
    network = DynamicSharingUNet3d(UNet3dConfig(width=8))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return network.eval()


def sample_of(shape: Sequence[int], missing: Sequence[str] = (), seed: int = 0) -> Sample:
    """A head that fills a box inside the volume, off centre; some of its voxels are 0.

    T1 is cut off at one side, T2 at another: the head is what any modality shows.
    """
    generator = torch.Generator().manual_seed(seed)
    volume = torch.zeros(4, *shape)
    inner = volume[:, 2:, : shape[1] - 3, 1 : shape[2] - 1]
    inner[:] = torch.randn(inner.shape, generator=generator)
    inner[torch.rand(inner.shape, generator=generator) < 0.2] = 0.0
    inner[0, :3], inner[2, :, -2:] = 0.0, 0.0
    available = torch.tensor([name not in missing for name in MODALITIES])
    volume[~available] = 0.0
    return {"volume": volume, "available": available, "name": "case"}


def expected_logits(
    model: DynamicSharingUNet3d, sample: Sample, combination: Sequence[str]
) -> Tensor:
    """The network run for this combination alone, by MONAI's inferer on the box of the head."""
    volume = sample["volume"]
    places = (volume != 0).any(0).nonzero()
    low, high = places.min(0).values.tolist(), (places.max(0).values + 1).tolist()
    box = tuple(map(slice, low, high))

    def predictor(windows: Tensor) -> Tensor:
        logits: Tensor = model(windows, available=tuple(combination))
        return logits

    with torch.no_grad():
        inside = sliding_window_inference(
            volume[(slice(None), *box)][None], 16, 1, predictor, overlap=0.25, mode="gaussian"
        )
    assert isinstance(inside, Tensor)
    whole = torch.full((inside.shape[1], *volume.shape[1:]), -torch.inf)
    whole[(slice(None), *box)] = inside[0]
    return whole


@pytest.mark.parametrize(
    ("shape", "combinations"),
    [
        ((20, 20, 16), COMBINATIONS[::3]),
        ((9, 12, 21), COMBINATIONS[3:6]),  # smaller than the crop in two directions
        ((35, 17, 18), COMBINATIONS[:1] + SINGLES[1:2]),
    ],
)
def test_one_pass_gives_what_the_network_gives_per_combination(
    model: DynamicSharingUNet3d, shape: tuple[int, ...], combinations: list[tuple[str, ...]]
) -> None:
    sample = sample_of(shape)
    logits = case_logits(model, sample, small())
    assert list(logits) == list(MODALITIES)
    for combination in combinations:
        found = mean_of(logits, combination)
        expected = expected_logits(model, sample, combination)
        assert found.shape == (3, *shape)
        assert torch.equal(found.isneginf(), expected.isneginf())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_volume_of_zeros_is_segmented(model: DynamicSharingUNet3d) -> None:
    sample = {"volume": torch.zeros(4, 17, 5, 16), "available": torch.tensor([True] * 4)}
    logits = case_logits(model, sample, small())
    assert all(one.shape == (3, 17, 5, 16) and one.isfinite().all() for one in logits.values())


@pytest.mark.parametrize("missing", [["t1ce", "flair"], ["t1", "t1ce", "t2"]])
def test_what_lies_in_a_missing_modality_has_no_influence(
    model: DynamicSharingUNet3d, missing: list[str]
) -> None:
    sample = sample_of((20, 20, 16), missing)
    expected = case_logits(model, sample, small())
    assert list(expected) == [name for name in MODALITIES if name not in missing]
    for content in (math.nan, 7.0):
        volume = sample["volume"].clone()
        volume[~sample["available"]] = content
        found = case_logits(model, {**sample, "volume": volume}, small())
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_case_leaves_no_trace(model: DynamicSharingUNet3d) -> None:
    sample, before = sample_of((20, 20, 16)), weights_of(model)
    alone = case_logits(model, sample, small())
    case_logits(model, sample_of((9, 12, 21), ["t2"], seed=1), small())
    again = case_logits(model, sample, small())
    assert all(torch.equal(alone[name], again[name]) for name in alone)
    assert not any(one.requires_grad for one in alone.values())
    assert all(torch.equal(one, before[name]) for name, one in weights_of(model).items())


def test_inference_in_half_precision_returns_float32(model: DynamicSharingUNet3d) -> None:
    sample = sample_of((20, 20, 16))
    exact = case_logits(model, sample, small())["t2"]
    half = case_logits(model, sample, small(amp="bf16"))["t2"]
    assert half.dtype == torch.float32
    inside = exact.isfinite()
    assert not torch.equal(half, exact)
    difference = (half[inside] - exact[inside]).norm() / exact[inside].norm()
    assert difference < 0.05


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_inference_on_cuda_returns_what_the_cpu_returns(model: DynamicSharingUNet3d) -> None:
    sample = sample_of((20, 20, 16), ["t2"])
    exact = case_logits(model, sample, small())
    try:
        found = case_logits(model.to("cuda"), sample, small(device="cuda"))
    finally:
        model.to("cpu")
    assert found.keys() == exact.keys()
    for name in exact:
        assert found[name].device.type == "cpu"
        torch.testing.assert_close(found[name], exact[name], rtol=1e-2, atol=1e-2)
