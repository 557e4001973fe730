"""The 3D U-Net: its size, what it computes and for whom, and that the graph tells the truth."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gradsplit import ModalityDecoupledOptimizer, modality_combinations
from gradsplit.sharing import ModalityNorm
from reference_models.unet3d import DynamicSharingUNet3d, UNet3dConfig

NAMES = ("t1", "t1ce", "t2", "flair")
COMBINATIONS = modality_combinations(NAMES)


def small_model(**config: Any) -> DynamicSharingUNet3d:
    torch.manual_seed(0)
    return DynamicSharingUNet3d(UNet3dConfig(width=4, groups=2, **config))


def some_volume(batch: int = 2, size: tuple[int, int, int] = (16, 16, 16)) -> Tensor:
    return torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(1))


def reached(output: Tensor, model: DynamicSharingUNet3d) -> set[str]:
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(
        output.sum(), list(named.values()), retain_graph=True, allow_unused=True
    )
    return {name for name, g in zip(named, gradients, strict=True) if g is not None}


def test_the_default_has_the_published_number_of_parameters() -> None:
    model = DynamicSharingUNet3d()
    norms = [m for m in model.modules() if isinstance(m, ModalityNorm)]
    assert sum(p.numel() for p in model.parameters()) == 3_245_235
    assert sum(p.numel() for norm in norms for p in norm.parameters()) == 8_832
    assert sum(p.numel() for p in model.shared_parameters()) == 3_245_235 - 8_832


@settings(max_examples=8)
@given(st.tuples(*[st.integers(1, 35)] * 3))
def test_any_size_goes_in_and_comes_out(size: tuple[int, int, int]) -> None:
    with torch.no_grad():
        assert small_model()(some_volume(1, size)).shape == (1, 3, *size)


@settings(max_examples=12)
@given(st.sampled_from(COMBINATIONS[1:]), st.sampled_from([float("nan"), float("inf"), 1e20]))
def test_the_output_is_independent_of_what_lies_in_a_missing_modality(
    combination: tuple[str, ...], content: float
) -> None:
    model, volume = small_model(), some_volume()
    columns = [name in combination for name in NAMES]
    mapping = {n: volume[:, [i]] for i, n in enumerate(NAMES) if n in combination}
    junk = volume.clone()
    junk[:, [not column for column in columns]] = content
    with torch.no_grad():
        expected = model(mapping)
        assert torch.equal(model(junk, combination), expected)
        assert torch.equal(model(junk, torch.tensor([columns] * 2)), expected)
        assert torch.equal(model(junk, combinations=[combination])[0], expected)


def test_fusion_is_the_mean_of_the_branches_of_each_sample() -> None:
    model, volume = small_model(), some_volume()
    available = torch.tensor([[True, False, True, False], [False, True, True, True]])
    with torch.no_grad():
        alone = {name: model(volume, (name,)) for name in NAMES}
        fused = model(volume, available)
    for sample in range(2):
        has = [n for n, ok in zip(NAMES, available[sample].tolist(), strict=True) if ok]
        mean = torch.stack([alone[name][sample] for name in has]).mean(0)
        torch.testing.assert_close(fused[sample], mean, rtol=1e-4, atol=1e-5)


def test_samples_with_nothing_for_a_combination_can_be_left_out() -> None:
    model, volume = small_model(), some_volume()
    available = torch.tensor([[True, False, False, False], [False, True, True, True]])
    combinations = [("t1",), ("t1", "t2")]
    with torch.no_grad():
        logits, valid = model(volume, available, combinations, return_valid=True)
        assert valid.tolist() == [[True, False], [True, True]]
        first = model(volume[:1], ("t1",))
        torch.testing.assert_close([one[:1] for one in logits], [first, first])
        with pytest.raises(ValueError, match="sample 1 has nothing available"):
            model(volume, available, combinations)


def test_many_combinations_equal_one_at_a_time_and_share_four_passes() -> None:
    model, volume = small_model(), some_volume(1)
    with torch.no_grad():
        logits = model(volume, combinations=COMBINATIONS)
        assert isinstance(logits, tuple)
        for one, combination in zip(logits, COMBINATIONS, strict=True):
            torch.testing.assert_close(one, model(volume, combination))


@pytest.mark.parametrize("private", [0, 1])
def test_one_sample_without_gradients_is_what_training_computes(private: int) -> None:
    """Without gradients the modalities of a single sample run as one batch."""
    model, volume = small_model(private_encoder_levels=private), some_volume(1)
    with torch.no_grad():
        for parameter in model.parameters():  # else all affines are ones and zeros
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    combinations = [("flair", "t1"), ("t1ce",), NAMES]
    trained = model(volume, combinations=combinations)
    with torch.no_grad():
        for arguments in ({}, {"available": torch.ones(1, 4, dtype=torch.bool)}):
            inferred = model(volume, combinations=combinations, **arguments)
            torch.testing.assert_close(inferred, trained, rtol=1e-4, atol=1e-5)


def flops(model: DynamicSharingUNet3d, *arguments: Any, **named: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*arguments, **named)
    return int(counter.get_total_flops())


def test_only_available_pairs_are_computed() -> None:
    model, volume = small_model(), some_volume(2)
    one = flops(model, volume[:1], ("t1",))  # one pair
    assert one > 0
    assert flops(model, volume[:1], combinations=COMBINATIONS) == 4 * one
    assert flops(model, volume[:1], combinations=[("t1", "t2"), ("t2",)]) == 2 * one
    assert flops(model, volume, ("t1", "flair")) == 4 * one
    available = torch.tensor([[True, False, False, False], [True, False, True, True]])
    assert flops(model, volume, available) == 4 * one


@pytest.mark.parametrize("private", [0, 2, 5])
def test_the_graph_tells_which_parameters_a_combination_uses(private: int) -> None:
    model = small_model(private_encoder_levels=private)
    combinations = [("t1", "flair"), ("t2",), NAMES]
    logits = model(some_volume(1), combinations=combinations)
    shared = {id(parameter) for parameter in model.shared_parameters()}
    for one, combination in zip(logits, combinations, strict=True):
        expected = {
            name
            for name, parameter in model.named_parameters()
            if id(parameter) in shared or set(name.split(".")) & set(combination)
        }
        assert reached(one, model) == expected
    singles = model(some_volume(1), combinations=[(name,) for name in NAMES])
    everywhere = set.intersection(*(reached(one, model) for one in singles))
    assert everywhere == {n for n, p in model.named_parameters() if id(p) in shared}


def test_private_levels_differ_between_modalities() -> None:
    """Same content in two modalities: without private levels only the norms could tell."""
    volume = some_volume(1)[:, :1].expand(-1, 4, -1, -1, -1)
    shared, private = small_model(), small_model(private_encoder_levels=1)
    with torch.no_grad():
        assert torch.equal(shared(volume, ("t1",)), shared(volume, ("t2",)))
        assert not torch.equal(private(volume, ("t1",)), private(volume, ("t2",)))


def test_checkpointing_keeps_less_and_changes_no_gradient() -> None:
    gradients, kept = [], []
    for checkpointing in (False, True):
        model = small_model(activation_checkpointing=checkpointing)
        opt = ModalityDecoupledOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        storages: dict[int, int] = {}

        def keep(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(some_volume(1), combinations=COMBINATIONS[-5:])
        kept.append(sum(storages.values()))
        opt.backward([one.square().mean() for one in logits])
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)
    assert kept[1] < kept[0] / 2


def test_autocast_and_channels_last() -> None:
    model, volume = small_model(), some_volume(1)
    expected = model(volume, combinations=[("t1",), ("t2", "flair")])
    with torch.autocast("cpu", torch.bfloat16):
        halves = model(volume, combinations=[("t1",), ("t2", "flair")])
    for half, one in zip(halves, expected, strict=True):
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), one, rtol=0.1, atol=0.1)
    last = torch.channels_last_3d
    model = model.to(memory_format=last)  # type: ignore[call-overload]
    converted = model(volume.contiguous(memory_format=last), ("t1",))
    torch.testing.assert_close(converted, expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_compiled_step_equals_an_eager_one() -> None:
    model, volume = small_model(), some_volume(1)
    gradients = []
    for forward in (model, torch.compile(model)):
        model.zero_grad()
        opt = ModalityDecoupledOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        opt.backward({n: lambda n=n, f=forward: f(volume, (n,)).square().mean() for n in NAMES})
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("volume", "arguments", "message"),
    [
        (torch.zeros(1, 3, 8, 8, 8), {}, r"volume must be \(B, 4, D, H, W\)"),
        ({}, {}, "volume is empty"),
        ({"pet": torch.zeros(1, 1, 8, 8, 8)}, {}, "unknown modality 'pet'"),
        ({"t1": torch.zeros(1, 2, 8, 8, 8)}, {}, r"volume\['t1'\] must be"),
        (torch.zeros(1, 4, 8, 8, 8), {"available": ("t1", "pet")}, "available must name"),
        (torch.zeros(1, 4, 8, 8, 8), {"available": ()}, "available must name"),
        (torch.zeros(1, 4, 8, 8, 8), {"available": torch.ones(2, 4) > 0}, r"available must be \(B"),
        (torch.zeros(1, 4, 8, 8, 8), {"combinations": [("pet",)]}, "combinations must be"),
        (torch.zeros(1, 4, 8, 8, 8), {"available": torch.ones(1, 4) < 0}, "no modality"),
        ({"t1": torch.zeros(1, 1, 8, 8, 8)}, {"combinations": [("t1",), ("t2",)]}, "sample 0"),
    ],
)
def test_bad_inputs_are_named(volume: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model()(volume, **arguments)


def test_a_mask_that_is_not_bool_is_refused() -> None:
    with pytest.raises(TypeError, match="bool"):
        small_model()(some_volume(1), torch.ones(1, 4))


@pytest.mark.parametrize(
    "config",
    [
        {"modalities": ()},
        {"modalities": "t1"},
        {"regions": ("WT", "WT")},
        {"width": 12},
        {"private_encoder_levels": 6},
    ],
)
def test_bad_configurations_are_named(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(config))):
        UNet3dConfig(**config)
