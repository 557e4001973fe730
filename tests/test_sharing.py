"""Dynamic Sharing blocks: what they compute, and that the graph tells the truth."""

import itertools

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gradsplit.sharing import ModalityNorm, fuse_available

NAMES = ("text", "audio", "vision")


@pytest.mark.parametrize("groups", [None, 1, 4])
def test_modality_norm_is_torchs_norm_with_the_affine_of_the_modality(groups: int | None) -> None:
    torch.manual_seed(0)
    norm = ModalityNorm(NAMES, 8, groups=groups)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    peer: nn.Module
    if groups is None:
        peer, x = nn.LayerNorm(8), torch.randn(3, 5, 8)
    else:
        peer, x = nn.GroupNorm(groups, 8), torch.randn(3, 8, 4, 5, 6)
    peer.load_state_dict({"weight": norm.weight["audio"], "bias": norm.bias["audio"]})
    torch.testing.assert_close(norm(x, "audio"), peer(x))


@pytest.mark.parametrize("groups", [None, 2])
def test_modality_norm_takes_one_modality_per_sample(groups: int | None) -> None:
    norm = ModalityNorm(("text", "audio"), channels=4, groups=groups)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn_like(parameter))
    features = torch.randn((3, 5, 4) if groups is None else (3, 4, 5, 6))
    names = ["audio", "text", "audio"]
    alone = [norm(one, name) for one, name in zip(features.split(1), names, strict=True)]
    torch.testing.assert_close(norm(features, names), torch.cat(alone))
    with pytest.raises(ValueError, match="one for each of the 3 samples, got 2 names"):
        norm(features, names[:2])
    with pytest.raises(ValueError, match="modality must be one of .* got 'vision'"):
        norm(features, ["audio", "text", "vision"])


def test_modality_norm_reaches_only_its_own_affine() -> None:
    norm = ModalityNorm(NAMES, 4)
    norm(torch.randn(2, 4), "audio").sum().backward()
    reached = {name for name, p in norm.named_parameters() if p.grad is not None}
    assert reached == {"weight.audio", "bias.audio"}


@pytest.mark.parametrize("modalities", [(), 16, "text", ("a.b",), ("",), ("keys",)])
def test_modality_norm_refuses_names_that_no_parameter_can_have(modalities: object) -> None:
    with pytest.raises(ValueError, match="modalities"):
        ModalityNorm(modalities, 4)  # type: ignore[arg-type]


def test_modality_norm_names_an_unknown_modality() -> None:
    with pytest.raises(ValueError, match="'t1'"):
        ModalityNorm(NAMES, 4)(torch.zeros(1, 4), "t1")


def test_modality_norm_refuses_groups_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="groups"):
        ModalityNorm(NAMES, 6, groups=4)


masks = st.lists(
    st.lists(st.booleans(), min_size=3, max_size=3).filter(any), min_size=1, max_size=5
)


@given(masks)
def test_fusion_is_the_mean_over_what_each_sample_has(mask: list[list[bool]]) -> None:
    available = torch.tensor(mask)
    features = torch.randn(3, len(mask), 2, dtype=torch.float64)
    fused = fuse_available(features, available)
    for sample, has in enumerate(mask):
        mean = torch.stack([features[m, sample] for m in range(3) if has[m]]).mean(0)
        torch.testing.assert_close(fused[sample], mean)


@given(masks, st.sampled_from([float("nan"), float("inf"), 1e30]))
def test_fusion_ignores_what_lies_in_a_missing_modality(
    mask: list[list[bool]], content: float
) -> None:
    available = torch.tensor(mask)
    features = torch.randn(3, len(mask), 4)
    replaced = torch.where(available.T[..., None], features, content)
    assert torch.equal(fuse_available(features, available), fuse_available(replaced, available))


@given(masks, masks)
def test_many_combinations_equal_one_at_a_time(
    mask: list[list[bool]], chosen: list[list[bool]]
) -> None:
    available = torch.tensor(mask)
    features = {name: torch.randn(len(mask), 2, dtype=torch.float64) for name in NAMES}
    combinations = [tuple(itertools.compress(NAMES, row)) for row in chosen]
    fused, valid = fuse_available(features, available, combinations, return_valid=True)
    assert isinstance(fused, tuple) and valid.shape == (len(chosen), len(mask))
    for one, has, row in zip(fused, valid, torch.tensor(chosen), strict=True):
        alone, possible = fuse_available(features, available & row, return_valid=True)
        torch.testing.assert_close(one, alone)
        assert torch.equal(has, possible)


def test_a_sequence_is_a_mapping_from_positions() -> None:
    features = [torch.randn(2, 3) for _ in range(3)]
    named = {str(index): branch for index, branch in enumerate(features)}
    combinations = [("0", "2"), ("1",)]
    expected = fuse_available(named, combinations=combinations)
    for unnamed in (features, torch.stack(features)):
        torch.testing.assert_close(fuse_available(unnamed, combinations=combinations), expected)


def test_a_sample_with_nothing_available_is_named() -> None:
    features = {name: torch.randn(2, 3) for name in NAMES}
    available = torch.tensor([[True, True, True], [True, False, False]])
    with pytest.raises(ValueError, match=r"sample 1 .*'audio', 'vision'"):
        fuse_available(features, available, [("text",), ("audio", "vision")])


def test_a_validity_mask_instead_of_the_error() -> None:
    features = {
        name: torch.full((2, 3), float(i), requires_grad=True)
        for i, name in enumerate(NAMES, start=1)
    }
    available = torch.tensor([[True, True, True], [True, False, True]])
    fused, valid = fuse_available(
        features, available, [("text",), ("audio", "vision"), ("audio",)], return_valid=True
    )
    assert valid.tolist() == [[True, True], [True, True], [True, False]]
    assert torch.stack(fused)[:, :, 0].tolist() == [[1.0, 1.0], [2.5, 3.0], [2.0, 0.0]]


def reached(output: Tensor, features: dict[str, Tensor]) -> set[str]:
    gradients = torch.autograd.grad(
        output.sum(), list(features.values()), retain_graph=True, allow_unused=True
    )
    return {name for name, g in zip(features, gradients, strict=True) if g is not None}


@pytest.mark.parametrize(
    "available", [None, torch.tensor([[True, True, True], [True, True, False]])]
)
def test_each_combination_reaches_only_its_modalities(available: Tensor | None) -> None:
    features = {name: torch.randn(2, 3, requires_grad=True) for name in NAMES}
    combinations = [("text", "vision"), ("audio",), NAMES]
    fused = fuse_available(features, available, combinations)
    for one, combination in zip(fused, combinations, strict=True):
        assert reached(one, features) == set(combination)


def test_combinations_stay_apart_under_autocast_and_output_conversion() -> None:
    """Accelerate and Fabric run the forward under autocast and convert what it returns."""
    features = {name: torch.randn(2, 4, requires_grad=True) for name in NAMES}
    layer = nn.Linear(4, 1)

    @convert_outputs_to_fp32
    @torch.autocast("cpu", torch.bfloat16)
    def forward() -> tuple[Tensor, ...]:
        fused = fuse_available(features, combinations=[("text",), ("audio", "vision")])
        return tuple(layer(one) for one in fused)

    first, second = forward()
    assert first.dtype == second.dtype == torch.float32
    assert reached(first, features) == {"text"}
    assert reached(second, features) == {"audio", "vision"}


def test_a_modality_that_no_sample_has_stays_out_of_the_graph() -> None:
    features = {name: torch.randn(2, 3, requires_grad=True) for name in NAMES}
    nobody_speaks = torch.tensor([[True, False, True], [False, False, True]])
    assert reached(fuse_available(features, nobody_speaks), features) == {"text", "vision"}


@pytest.mark.parametrize(
    ("features", "arguments", "message"),
    [
        ({"a": torch.zeros(2, 3), "b": torch.zeros(2, 4)}, {}, "features must have one shape"),
        ({"a": None}, {}, "no modality"),
        (
            {"a": torch.zeros(2, 3)},
            {"available": torch.ones(3, 1, dtype=torch.bool)},
            r"available must be \(B, M\) = \(2, 1\), got \(3, 1\); .*combinations=",
        ),
        ({"a": torch.zeros(2, 3)}, {"combinations": [("a", "x")]}, "unknown modality 'x'"),
        ({"a": torch.zeros(2, 3)}, {"combinations": torch.ones(3, 1) > 0}, "unknown modality"),
        ({"a": torch.zeros(2, 3)}, {"combinations": []}, "non-empty"),
        ({"a": torch.zeros(2, 3)}, {"combinations": [()]}, "non-empty"),
        ({"a": torch.zeros(2, 3)}, {"combinations": [("a", "a")]}, "twice"),
    ],
)
def test_fusion_errors(features: object, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fuse_available(features, **arguments)  # type: ignore[call-overload]


def test_a_mask_that_is_not_bool_is_refused() -> None:
    with pytest.raises(TypeError, match="bool"):
        fuse_available({"a": torch.zeros(2, 3)}, torch.ones(2, 1))
