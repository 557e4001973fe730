"""The sentiment model: independence of what is missing, truthful graph, compute that is counted."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from gradsplit import ModalityDecoupledOptimizer, modality_combinations
from reference_models.sentiment_transformer import (
    SentimentTransformer,
    SentimentTransformerConfig,
)

DIMS = {"text": 6, "audio": 3, "vision": 4}
NAMES = tuple(DIMS)
COMBINATIONS = modality_combinations(NAMES)
Inputs = dict[str, tuple[Tensor, Tensor]]


def small_model(dropout: float = 0.0) -> SentimentTransformer:
    torch.manual_seed(0)
    return SentimentTransformer(
        SentimentTransformerConfig(dims=DIMS, width=8, depth=2, heads=2, dropout=dropout)
    )


def some_inputs(batch: int = 3) -> Inputs:
    """Every modality has its own number of frames, and padding."""
    generator = torch.Generator().manual_seed(1)
    inputs = {}
    for frames, (name, dim) in enumerate(DIMS.items(), start=2):
        lengths = torch.randint(1, frames + 1, (batch,), generator=generator)
        inputs[name] = (torch.randn(batch, frames, dim, generator=generator), lengths)
    return inputs


def test_default_parameter_count_is_the_documented_one() -> None:
    model = SentimentTransformer()
    total = sum(parameter.numel() for parameter in model.parameters())
    shared = sum(parameter.numel() for parameter in model.shared_parameters())
    assert (total, shared) == (156_545, 103_681)
    for number in (total, shared, total - shared):
        assert f"{number:,}" in (SentimentTransformer.__doc__ or "")


@given(st.sampled_from(COMBINATIONS[1:]), st.sampled_from([float("nan"), float("-inf"), 1e30, 0.0]))
def test_the_output_is_independent_of_what_lies_in_a_missing_modality(
    combination: tuple[str, ...], content: float
) -> None:
    model, inputs = small_model(), some_inputs()
    expected = model({name: inputs[name] for name in combination})
    junk: Inputs = {
        name: (sequence if name in combination else torch.full_like(sequence, content), lengths)
        for name, (sequence, lengths) in inputs.items()
    }
    available = torch.tensor([[name in combination for name in NAMES]] * 3)
    assert torch.equal(model(junk, available), expected)
    assert torch.equal(model(junk, combinations=[combination])[0], expected)


@pytest.mark.parametrize("content", [float("nan"), float("inf"), 7.0])
def test_the_output_and_gradients_are_independent_of_padding(content: float) -> None:
    model, inputs = small_model(), some_inputs()
    padded = {}
    for name, (sequence, lengths) in inputs.items():
        beyond = torch.full((3, 4, DIMS[name]), content)
        sequence = torch.cat([sequence, beyond], dim=1)
        outside = torch.arange(sequence.shape[1]) >= lengths[:, None]
        padded[name] = (sequence.masked_fill(outside[..., None], content), lengths)
    torch.testing.assert_close(model(padded), model(inputs))
    model(padded).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_each_sample_scores_as_it_would_alone() -> None:
    model, inputs = small_model(), some_inputs()
    available = torch.tensor([[True, True, True], [False, True, False], [True, False, True]])
    scores = model(inputs, available)
    for sample in range(3):
        alone = {
            name: (sequence[sample : sample + 1, : lengths[sample]], lengths[sample : sample + 1])
            for column, (name, (sequence, lengths)) in enumerate(inputs.items())
            if available[sample, column]
        }
        torch.testing.assert_close(model(alone)[0], scores[sample])


def test_many_combinations_equal_one_at_a_time() -> None:
    model, inputs = small_model(), some_inputs()
    scores = model(inputs, combinations=COMBINATIONS)
    assert isinstance(scores, tuple)
    for score, combination in zip(scores, COMBINATIONS, strict=True):
        torch.testing.assert_close(score, model({name: inputs[name] for name in combination}))


def assert_truthful(model: SentimentTransformer, scores: tuple[Tensor, ...]) -> None:
    """The loss of each of COMBINATIONS reaches the parameters that it uses and no others."""
    shared = {id(parameter) for parameter in model.shared_parameters()}
    for score, combination in zip(scores, COMBINATIONS, strict=True):
        named = dict(model.named_parameters())
        gradients = torch.autograd.grad(
            score.sum(), list(named.values()), retain_graph=True, allow_unused=True
        )
        for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
            used = id(parameter) in shared or any(part in combination for part in name.split("."))
            assert (gradient is not None) == used, (combination, name)


def test_the_graph_tells_which_parameters_a_combination_uses() -> None:
    model = small_model()
    assert_truthful(model, model(some_inputs(), combinations=COMBINATIONS))


@pytest.mark.parametrize("unused", [False, True])
def test_combinations_stay_apart_in_ddp(unused: bool) -> None:
    """It takes a tuple of outputs apart and puts it together again."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = small_model()
        parallel = DistributedDataParallel(model, find_unused_parameters=unused)
        assert_truthful(model, parallel(some_inputs(), combinations=COMBINATIONS))
    finally:
        distributed.destroy_process_group()


def test_shared_parameters_are_those_that_every_loss_reaches() -> None:
    model, inputs = small_model(), some_inputs()
    scores = model(inputs, combinations=COMBINATIONS)
    reached = []
    for score in scores:
        gradients = torch.autograd.grad(
            score.sum(), list(model.parameters()), retain_graph=True, allow_unused=True
        )
        pairs = zip(model.parameters(), gradients, strict=True)
        reached.append({id(p) for p, gradient in pairs if gradient is not None})
    assert set.intersection(*reached) == {id(p) for p in model.shared_parameters()}


def test_private_encoders_get_the_plain_sum_in_a_decoupled_step() -> None:
    """The reason for the truthful graph: nobody else's conflict rescales a private projection."""
    model, inputs = small_model(), some_inputs()
    singles = [(name,) for name in NAMES]
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = ModalityDecoupledOptimizer(base, reduction="sum")
    signs = (1.0, -1.0, 1.0)
    losses = [
        s * score.sum() for s, score in zip(signs, model(inputs, combinations=singles), strict=True)
    ]
    report = opt.backward(losses)
    assert report.conflicts()
    private = list(model.project.parameters())
    got = [p.grad.clone() for p in private if p.grad is not None]
    model.zero_grad()
    scores = model(inputs, combinations=singles)
    total = torch.stack([s * score.sum() for s, score in zip(signs, scores, strict=True)]).sum()
    torch.autograd.backward(total)
    torch.testing.assert_close(got, [p.grad for p in private])


def flops(model: SentimentTransformer, inputs: Inputs, **kwargs: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        model(inputs, **kwargs)
    return int(counter.get_total_flops())


def test_compute_is_proportional_to_what_is_available() -> None:
    """Counted in floating-point operations: projections, attention and MLPs of absent pairs."""
    model, batch = small_model(), 6
    sequences = {name: torch.randn(batch, 5, dim) for name, dim in DIMS.items()}
    lengths = torch.full((batch,), 5)
    inputs = {name: (sequence, lengths) for name, sequence in sequences.items()}
    available = torch.zeros(batch, 3, dtype=torch.bool)
    available[:, 0] = True
    head = sum(2 * batch * p.numel() for p in model.head.parameters() if p.dim() == 2)
    text_only = flops(model, {"text": inputs["text"]}) - head
    assert text_only > 0
    assert flops(model, inputs, available=available) - head == text_only
    available[: batch // 2, 0] = False
    available[: batch // 2, 1] = True
    audio_only = flops(model, {"audio": inputs["audio"]}) - head
    assert flops(model, inputs, available=available) - head == (text_only + audio_only) // 2
    everything = flops(model, inputs) - head
    all_seven = flops(model, inputs, combinations=COMBINATIONS) - 7 * head
    assert all_seven == everything, "seven combinations cost one pass"
    single = flops(model, inputs, combinations=[("text",)]) - head
    assert single == text_only, "what no combination asks for is not computed"


def test_incomplete_samples_train_with_a_validity_mask() -> None:
    model, inputs = small_model(), some_inputs()
    available = torch.tensor([[True, True, True], [False, True, True], [True, False, True]])
    singles = [("text",), ("audio",)]
    scores, valid = model(inputs, available, singles, return_valid=True)
    assert valid.tolist() == [[True, False, True], [True, True, False]]
    for score, ok in zip(scores, valid, strict=True):
        score[ok].sum().backward(retain_graph=True)
    assert model.project["text"].weight.grad is not None
    assert model.project["vision"].weight.grad is None


@pytest.mark.parametrize(
    ("inputs", "arguments", "message"),
    [
        ({}, {}, "inputs is empty"),
        ({"video": torch.zeros(1, 2, 3)}, {}, "unknown modality 'video'"),
        ({"text": torch.zeros(1, 2, 3)}, {}, r"inputs\['text'\] must be \(B, T, 6\)"),
        ({"text": torch.zeros(1, 2, 6), "audio": torch.zeros(2, 2, 3)}, {}, "one batch size"),
        ({"text": (torch.zeros(1, 2, 6), torch.tensor([3]))}, {}, "lengths must be between 1"),
        ({"text": (torch.zeros(1, 2, 6), torch.tensor([0]))}, {}, "lengths must be between 1"),
        ({"text": (torch.zeros(1, 2, 6), torch.tensor([1, 1]))}, {}, "lengths must be"),
        ({"text": torch.zeros(1, 2, 6)}, {"available": torch.ones(1, 2) > 0}, "available must be"),
        ({"text": torch.zeros(1, 2, 6)}, {"combinations": [("audio",)]}, "no sample has anything"),
        ({"text": torch.zeros(1, 2, 6)}, {"combinations": [("text", "x")]}, "combinations must be"),
        (
            {"text": torch.zeros(2, 2, 6), "audio": torch.zeros(2, 2, 3)},
            {"available": torch.tensor([[True, True, False], [False, False, True]])},
            "sample 1 has nothing available",
        ),
    ],
)
def test_bad_inputs_are_named(inputs: Inputs, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model()(inputs, **arguments)


@pytest.mark.parametrize(
    "config",
    [{"dims": {}}, {"width": 6, "heads": 4}, {"depth": 0}, {"dropout": 1.0}],
)
def test_bad_configurations_are_named(config: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(config))):
        SentimentTransformerConfig(**config)  # type: ignore[arg-type]


def test_a_batch_without_what_is_asked_for_is_all_invalid() -> None:
    """Sampled combinations meet incomplete data: no score means anything, and nothing raises."""
    model, inputs = small_model(), some_inputs()
    text_only = torch.tensor([[True, False, False]] * 3)
    scores, valid = model(inputs, text_only, [("audio",), ("vision",)], return_valid=True)
    assert isinstance(scores, tuple) and valid.shape == (2, 3)
    assert not valid.any() and not torch.stack(scores).any()
    scores, valid = model(inputs, ~text_only & text_only, return_valid=True)
    assert scores.shape == (3,) and not valid.any()


def test_a_modality_name_that_no_parameter_can_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'a\.b'"):
        SentimentTransformer(SentimentTransformerConfig({"a.b": 3}))
