"""Dynamic Sharing blocks: what they compute, and that the graph tells the truth."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gradsplit.sharing import ModalityNorm, fuse_available, stack_combinations

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


def test_many_combinations_equal_one_at_a_time() -> None:
    features = {name: torch.randn(4, 3, 2) for name in NAMES}
    combinations = [("text", "vision"), ("audio",), NAMES]
    fused = fuse_available(features, combinations=combinations)
    assert fused.shape == (3, 4, 3, 2)
    for one, combination in zip(fused, combinations, strict=True):
        torch.testing.assert_close(one, fuse_available({n: features[n] for n in combination}))
    as_mask = torch.tensor([[True, False, True], [False, True, False], [True, True, True]])
    assert torch.equal(fused, fuse_available(features, combinations=as_mask))
    assert torch.equal(fused, fuse_available(features, as_mask)), "(C, M) where C is not B"


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
    assert fused[:, :, 0].tolist() == [[1.0, 1.0], [2.5, 3.0], [2.0, 0.0]]


def test_each_combination_reaches_only_its_modalities() -> None:
    features = {name: torch.randn(2, 3, requires_grad=True) for name in NAMES}
    combinations = [("text", "vision"), ("audio",)]
    fused = fuse_available(features, combinations=combinations)
    for one, combination in zip(fused, combinations, strict=True):
        gradients = torch.autograd.grad(one.sum(), list(features.values()), allow_unused=True)
        reached = {n for n, g in zip(NAMES, gradients, strict=True) if g is not None}
        assert reached == set(combination)


def test_stacked_combinations_are_an_ordinary_tensor_otherwise() -> None:
    outputs = [torch.randn(4, requires_grad=True) for _ in range(3)]
    stacked, plain = stack_combinations(outputs), torch.stack(outputs)
    assert torch.equal(stacked, plain)
    assert type(stacked * 2) is Tensor and type(stacked[1:]) is Tensor
    assert torch.equal(stacked[:, 2], plain[:, 2])
    gradients = torch.autograd.grad(stacked.square().sum(), outputs)
    for gradient, output in zip(gradients, outputs, strict=True):
        torch.testing.assert_close(gradient, 2 * output)
    assert [part is output for part, output in zip(stacked.unbind(), outputs, strict=True)]
    with torch.no_grad():
        assert type(stack_combinations(outputs)) is Tensor, "predictions pickle as plain tensors"


@pytest.mark.parametrize(
    ("features", "arguments", "message"),
    [
        ({"a": torch.zeros(2, 3), "b": torch.zeros(2, 4)}, {}, "features must have one shape"),
        ({"a": None}, {}, "no modality"),
        ({"a": torch.zeros(2, 3)}, {"available": torch.ones(2, 2, dtype=torch.bool)}, "available"),
        ({"a": torch.zeros(2, 3)}, {"combinations": [("a", "x")]}, "unknown modality 'x'"),
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


def stacked_pair() -> tuple[Tensor, Tensor, Tensor]:
    a, b = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    return a, b, stack_combinations([a, b])


@pytest.mark.parametrize(
    "second",
    [
        lambda s: s[1],
        lambda s: s[-1],
        lambda s: s[np.int64(1)],
        lambda s: s[1, 0],
        lambda s: s[1, :, 2],
        lambda s: list(s)[1],
        lambda s: s.unbind()[1],
        lambda s: torch.unbind(s, 0)[1],
        lambda s: s.double()[1],
        lambda s: s.to(torch.bfloat16)[1],
        lambda s: dict(enumerate(s))[1],
    ],
)
def test_every_usual_access_to_one_combination_is_truthful(
    second: Callable[[Tensor], Tensor],
) -> None:
    a, b, stacked = stacked_pair()
    plain = torch.stack([a, b])
    assert torch.equal(second(stacked), second(plain))
    torch.autograd.backward(second(stacked).sum())
    assert a.grad is None and b.grad is not None


def test_a_stack_changed_in_place_is_what_indexing_shows() -> None:
    _, _, stacked = stacked_pair()
    stacked.mul_(10)
    assert torch.equal(stacked[1], stacked[:][1])
    with torch.no_grad():
        _, _, other = stacked_pair()
        other[0] = 5.0
    assert other[0].eq(5).all()


def test_a_stack_prints_and_saves_as_a_plain_tensor() -> None:
    _, _, stacked = stacked_pair()
    assert "Stack" not in repr(stacked) and stacked[True].shape == (1, 2, 2, 3)
    file = io.BytesIO()
    torch.save(stacked.detach(), file)
    torch.save(stacked, file)
    file.seek(0)
    assert type(torch.load(file, weights_only=True)) is Tensor


def test_combinations_stay_apart_under_autocast_and_output_conversion() -> None:
    """Accelerate and Fabric run the forward under autocast and convert what it returns."""
    features = {name: torch.randn(2, 4, requires_grad=True) for name in NAMES}
    layer = nn.Linear(4, 1)
    with torch.autocast("cpu", torch.bfloat16):
        fused = fuse_available(features, combinations=[("text",), ("audio",)])
        scores = stack_combinations([layer(one) for one in fused]).float()
    torch.autograd.backward(scores[0].sum())
    assert features["text"].grad is not None and features["audio"].grad is None


def test_a_modality_that_no_sample_has_stays_out_of_the_graph() -> None:
    features = {name: torch.randn(2, 3, requires_grad=True) for name in NAMES}
    nobody_speaks = torch.tensor([[True, False, True], [False, False, True]])
    torch.autograd.backward(fuse_available(features, nobody_speaks).sum())
    assert features["audio"].grad is None and features["text"].grad is not None
