"""The MMSA layout: what is read, what is repaired and counted, and what is refused, and how."""

import _codecs
import copy
import hashlib
import os
import pickle
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.sentiment.data import (
    MODALITIES,
    SPLITS,
    SentimentData,
    load_file,
    parse,
    synthetic,
    synthetic_layout,
)

REAL = Path(__file__).parents[4] / "shared/data/mosi_heldout/unaligned_50.pkl"

Layout = dict[str, dict[str, Any]]


@pytest.fixture
def layout() -> Layout:
    """Three utterances a split; text (3, 4, 2), audio (3, 5, 1), vision (3, 2, 3), no padding."""
    random = np.random.default_rng(0)
    shapes = {"text": (3, 4, 2), "audio": (3, 5, 1), "vision": (3, 2, 3)}
    return {
        split: {
            **{key: random.normal(size=shape).astype(np.float32) for key, shape in shapes.items()},
            "audio_lengths": [5, 5, 5],
            "vision_lengths": [2, 2, 2],
            "regression_labels": np.array([1.0, -1.0, 0.0], np.float32),
            "raw_text": ["a", "b", "c"],
        }
        for split in SPLITS
    }


def read(layout: Layout, max_frames: int = 50) -> SentimentData:
    return parse(layout, source="some.pkl", digest="", max_frames=max_frames)


def write(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def assert_same(one: SentimentData, other: SentimentData) -> None:
    for split in SPLITS:
        a, b = one.splits[split], other.splits[split]
        assert torch.equal(a.labels, b.labels)
        for name in MODALITIES:
            assert torch.equal(a.features[name], b.features[name])
            assert torch.equal(a.lengths[name], b.lengths[name])


# --- the unpickler -------------------------------------------------------------------------------


class Evil:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (os.system, ("touch {}",), r"the pickle asks for posix\.system, .*refused"),
        (eval, ("open({!r}, 'w')",), r"asks for \S*\.eval, .*refused"),
        (getattr, ("", "upper"), r"asks for \S*\.getattr, .*refused"),
        (np.memmap, ("{}",), r"asks for numpy\.memmap, .*refused"),
        (torch.load, ("{}",), r"asks for torch\.serialization\.load, .*refused"),
        (_codecs.encode, ("abc", "rot13"), r"_codecs\.encode to 'rot13' is refused"),
        # Would take the bytes for a pointer, and crash.
        (np.ndarray, ((1,), np.dtype(object), b"abcdefgh"), r"key 'text': got shape \(0,\)"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])  # 2 writes the module names of Python 2
def test_any_other_global_is_refused_by_name_and_not_called(
    tmp_path: Path, layout: Layout, function: Any, arguments: Any, message: str, protocol: int
) -> None:
    mark = tmp_path / "called"
    filled = [a.format(str(mark)) if isinstance(a, str) else a for a in arguments]
    layout["train"]["text"] = Evil(function, *filled)
    path = write(tmp_path / "evil.pkl", layout, protocol)
    with pytest.raises(ValueError, match=rf"evil\.pkl: .*{message}"):
        load_file(path, 50)
    assert not mark.exists()


@pytest.mark.parametrize("numpy", [b"numpy._core.", b"numpy.core."])  # since numpy 2, and before
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_every_pickle_protocol_is_read(
    tmp_path: Path, layout: Layout, protocol: int, numpy: bytes
) -> None:
    content = pickle.dumps(layout, protocol=protocol)
    if protocol < 4:  # later ones give the length of a name before it
        content = content.replace(b"numpy._core.", numpy)
        assert numpy in content
    (tmp_path / "data.pkl").write_bytes(content)
    data = load_file(tmp_path / "data.pkl", 50)
    assert_same(data, read(layout))
    assert data.digest == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_other_dtypes_orders_and_kinds_of_array_are_read(
    tmp_path: Path, layout: Layout, protocol: int
) -> None:
    for part in layout.values():
        part["vision"] = (part["vision"] * 10).round()
    expected = read(copy.deepcopy(layout))
    train, valid, test = layout.values()
    train["text"] = np.asfortranarray(train["text"].astype(np.float64))
    train["audio"] = train["audio"].astype(">f4")
    train["vision"] = train["vision"].astype(np.int16)
    train["audio_lengths"] = np.array([5, 5, 5])
    train["vision_lengths"] = [np.int64(2)] * 3
    train["regression_labels"] = train["regression_labels"].tolist()
    train["id"] = np.array(["a", None, 3], dtype=object)
    train["annotations"] = np.array(["Positive", "Negative", "Neutral"])
    # One array per utterance.
    valid["text"] = list(valid["text"])
    audio = np.empty(3, object)
    audio[:] = list(valid["audio"])
    valid["audio"] = audio
    valid["audio_lengths"] = np.array(valid["audio_lengths"], object)
    valid["vision_lengths"] = [np.array(2)] * 3
    # Columns.
    test["audio_lengths"] = np.reshape(test["audio_lengths"], (3, 1))
    test["regression_labels"] = np.reshape(test["regression_labels"], (3, 1, 1))
    assert_same(load_file(write(tmp_path / "data.pkl", layout, protocol), 50), expected)


def test_what_is_read_is_let_go(layout: Layout) -> None:
    layout["train"]["text"].setflags(write=False)  # as unpickled: it has to be copied
    original = weakref.ref(layout["train"]["text"])
    data = read(layout)
    assert original() is None
    assert data.dims["text"] == 2


@pytest.mark.parametrize("content", [0, 1, 200, -1, b'{"train": 1}', b"\x89HDF\r\n"])
def test_what_is_cut_off_or_of_another_format_is_named(
    tmp_path: Path, layout: Layout, content: int | bytes
) -> None:
    path = write(tmp_path / "data.pkl", layout)
    path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)
    with pytest.raises(ValueError, match=r"data\.pkl: not a readable pickle.*fetch it again"):
        load_file(path, 50)


# --- the layout ----------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [[1, 2], {}, {"train": [1]}, None])
def test_other_contents_are_refused(content: Any) -> None:
    with pytest.raises(ValueError, match=r"some\.pkl: expected the splits .* 'train' is miss"):
        read(content)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("regression_labels", [1.0, np.nan, 0.0], "some are not finite"),
        ("regression_labels", [0.0, 0.0, 0.0], "all are 0"),
        ("regression_labels", np.ones((3, 2)), r"got shape \(3, 2\); expected \(N,\)"),
        ("regression_labels", [1.0, None, 0.0], "got dtype object"),
        ("regression_labels", [], r"got shape \(0,\)"),
        ("regression_labels", ["a", "b", "c"], "expected an array of numbers"),
        ("text", np.ones((3, 4)), r"got shape \(3, 4\); expected \(3, time steps, features\)"),
        ("audio", np.ones((2, 5, 1)), r"got shape \(2, 5, 1\); expected \(3, time steps"),
        ("vision", np.ones((3, 0, 3)), r"got shape \(3, 0, 3\)"),
        ("vision", [[[1.0]], [[1.0], [2.0]], [[1.0]]], "not one array"),
        ("audio", [np.ones((5, 1)), np.ones((4, 1)), np.ones((5, 1))], "not one array"),
        ("audio", np.ones((3, 1)), r"got shape \(3, 1\); .* need a time axis of 1"),
        ("audio_lengths", np.ones((3, 2)), r"got shape \(3, 2\); expected \(3,\)"),
        ("audio_lengths", [5, 5], r"got shape \(2,\); expected \(3,\)"),
        ("audio_lengths", [5, -1, 5], "no lengths"),
        ("vision_lengths", [1.5, 1, 1], "no lengths"),
        ("text_bert", np.ones((3, 3, 7)), r"got shape \(3, 3, 7\); expected \(3, 3, 4\)"),
    ],
)
def test_a_wrong_key_is_named(layout: Layout, key: str, value: Any, message: str) -> None:
    layout["test"][key] = value
    with pytest.raises(ValueError, match=rf"some\.pkl: split 'test', key '{key}': .*{message}"):
        read(layout)


@pytest.mark.parametrize("key", ["text", "vision", "regression_labels"])
def test_a_missing_key_is_named(layout: Layout, key: str) -> None:
    del layout["valid"][key]
    with pytest.raises(ValueError, match=rf"some\.pkl: split 'valid', key '{key}': missing"):
        read(layout)


def test_splits_that_do_not_fit_or_have_nothing_to_score_are_refused(layout: Layout) -> None:
    layout["test"]["vision"][:2] = 0  # the third has the label 0
    with pytest.raises(
        ValueError, match=r"some\.pkl: split 'test', key 'text, audio, vision': no utterance"
    ):
        read(copy.deepcopy(layout))
    layout["test"]["vision"] = np.ones((3, 2, 2))
    with pytest.raises(ValueError, match=r"some\.pkl: key 'vision': the splits have different num"):
        read(layout)


# --- MMSA's own files ----------------------------------------------------------------------------

# Name -> steps of text, shapes of audio and vision: of MOSI's two files and of CH-SIMS's.
MMSA = {
    "unaligned_50": (50, (375, 5), (500, 20)),
    "aligned_50": (50, (50, 5), (50, 20)),
    "unaligned_39": (39, (400, 33), (55, 709)),
}


def mmsa_split(name: str, count: int, seed: int) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """What MMSA's file holds, and the lengths of each modality."""
    random = np.random.default_rng(seed)
    steps, audio, vision = MMSA[name]
    shapes = {"text": (steps, 768), "audio": audio, "vision": vision}
    lengths = {key: random.integers(3, shape[0], count).tolist() for key, shape in shapes.items()}
    made = {key: random.normal(2, 5, (count, *shape)) for key, shape in shapes.items()}
    inside = {
        key: np.arange(shape[0]) < np.array(lengths[key])[:, None] for key, shape in shapes.items()
    }
    for key in ("audio", "vision"):
        made[key][~inside[key]] = 0  # BERT writes something behind the last token, too
    made["audio"][0, 0, 0] = -np.inf
    labels = np.linspace(-1, 1, count) * (1 if name == "unaligned_39" else 3)
    tokens = random.integers(0, 30000, (count, 3, steps)).astype(np.float32)
    tokens[:, 1], tokens[:, 2] = inside["text"], 0
    part: dict[str, Any] = {
        "raw_text": np.array(["so good"] * count),
        "audio": made["audio"],
        "vision": made["vision"],
        "id": [f"03bSnISJMiM$_${number}" for number in range(count)],
        "text": made["text"].astype(np.float32),
        "text_bert": tokens,
        "annotations": ["Neutral"] * count,
        "classification_labels": np.ones(count),
        "regression_labels": labels,
    }
    if not name.startswith("aligned"):
        part |= {f"{key}_lengths": lengths[key] for key in ("audio", "vision")}
    if name == "unaligned_39":
        part |= {f"regression_labels_{each}": labels for each in "TAV"}
    return part, lengths


@pytest.mark.parametrize("name", MMSA)
def test_the_files_of_mmsa(tmp_path: Path, name: str) -> None:
    made = {split: mmsa_split(name, 5 - i, seed=i) for i, split in enumerate(SPLITS)}
    path = write(tmp_path / f"{name}.pkl", {split: part for split, (part, _) in made.items()})
    data = load_file(path, max_frames=500)
    for split, (part, lengths) in made.items():
        found = data.splits[split]
        np.testing.assert_array_equal(found.labels, part["regression_labels"].astype(np.float32))
        for key in MODALITIES:
            assert found.lengths[key].tolist() == lengths[key]
            frames = [
                frame[:end].astype(np.float64)
                for frame, end in zip(made["train"][0][key], made["train"][1][key], strict=True)
            ]
            known = np.nan_to_num(np.concatenate(frames), neginf=0)
            for number, end in enumerate(lengths[key]):
                raw = np.nan_to_num(part[key][number][:end].astype(np.float64), neginf=0)
                scaled = ((raw - known.mean(0)) / known.std(0)).clip(-10, 10)
                features = found.features[key][number]
                np.testing.assert_allclose(features[:end], scaled, atol=1e-4)
                assert not features[end:].any()
        assert data.cleaning[split]["audio"]["nonfinite_values"] == 1
    sims = [remark for remark in data.remarks() if "CH-SIMS" in remark]
    assert len(sims) == (name == "unaligned_39")


# --- lengths -------------------------------------------------------------------------------------


def test_without_lengths_a_modality_ends_at_its_last_row_that_is_not_zero(layout: Layout) -> None:
    part = layout["train"]
    del part["audio_lengths"]
    part["text"][0, 2:] = part["text"][2] = part["audio"][1, 3:] = 0
    part["text"][1, 1] = 0  # a zero row within
    data = read(layout)
    assert data.splits["train"].lengths["text"].tolist() == [2, 4, 0]
    assert data.splits["train"].lengths["audio"].tolist() == [5, 3, 5]
    assert data.cleaning["train"]["text"]["empty_utterances"] == 1


def test_in_aligned_files_each_modality_has_its_own_lengths(layout: Layout) -> None:
    for part in layout.values():
        del part["audio_lengths"], part["vision_lengths"]
        part["audio"] = np.ones((3, 4, 1), np.float32)
        part["vision"] = np.ones((3, 4, 3), np.float32)
        part["text"][0] = part["audio"][1, 2:] = part["vision"][2] = 0
    split = read(layout).splits["train"]
    lengths = [split.lengths[name].tolist() for name in MODALITIES]
    assert lengths == [[0, 4, 4], [4, 2, 4], [4, 4, 0]]
    assert split.available.tolist() == [[False, True, True], [True] * 3, [True, True, False]]
    inputs, _ = split.batch(torch.tensor([0]))
    assert inputs["text"][0].tolist() == [[[0, 0]]] and inputs["text"][1].tolist() == [1]


def test_frames_of_zeros_alone_are_no_modality_whatever_length_they_are_given(
    layout: Layout,
) -> None:
    layout["train"]["vision"][1] = 0
    layout["train"]["text"][2] = 0
    layout["train"]["text_bert"] = np.ones((3, 3, 4))
    split = read(layout).splits["train"]
    assert [split.lengths[name].tolist() for name in ("text", "vision")] == [[4, 4, 0], [2, 0, 2]]


@pytest.mark.parametrize("said_by", ["nothing", "text_bert", "audio_lengths"])
def test_zeros_at_the_front_are_padding(layout: Layout, said_by: str) -> None:
    """Read as the same file with its padding at the end is; zeros within stay where they are."""
    name, steps = ("audio", 5) if said_by == "audio_lengths" else ("text", 4)
    mask = np.ones((3, 3, 4))
    layout["train"][name][1, 1] = layout["train"][name][2] = 0
    layout["train"][name][0, 2:] = mask[0, :, 2:] = 0
    if said_by == "text_bert":
        layout["train"]["text_bert"] = mask
    if said_by == "audio_lengths":
        layout["train"]["audio_lengths"] = [2, 5, 0]
    padded = copy.deepcopy(layout)
    for array in (padded["train"][name], padded["train"].get("text_bert", mask).swapaxes(1, 2)):
        array[0] = np.roll(array[0], steps - 2, axis=0)
    expected, found = read(layout), read(padded)
    assert_same(found, expected)
    assert found.splits["train"].lengths[name].tolist() == [2, steps, 0]
    counted = [data.cleaning["train"][name] for data in (expected, found)]
    assert [counts["front_padded_utterances"] for counts in counted] == [0, 1]


def test_zeros_at_the_front_are_data_where_the_file_says_so(layout: Layout) -> None:
    layout["train"]["audio_lengths"] = [4, 5, 3]
    layout["train"]["audio"][:2, :2] = layout["train"]["audio"][0, 4:] = 0
    layout["train"]["text_bert"] = np.ones((3, 3, 4))
    layout["train"]["text"][0, :2] = 0
    data = read(layout)
    assert data.splits["train"].lengths["audio"].tolist() == [4, 5, 3]
    assert data.splits["train"].lengths["text"].tolist() == [4, 4, 4]
    assert {data.cleaning["train"][name]["front_padded_utterances"] for name in MODALITIES} == {0}


def test_lengths_are_brought_into_range_and_counted(layout: Layout) -> None:
    layout["train"]["audio_lengths"] = [0, 9, 3]
    data = read(layout)
    assert data.splits["train"].lengths["audio"].tolist() == [0, 5, 3]
    counts = data.cleaning["train"]["audio"]
    assert {what: count for what, count in counts.items() if count} == {
        "empty_utterances": 1,
        "lengths_beyond_the_end": 1,
    }


# --- values --------------------------------------------------------------------------------------


def test_values_that_are_not_finite_become_zero_and_are_counted(layout: Layout) -> None:
    audio = layout["train"]["audio"].astype(np.float64)
    audio[0, 0], audio[1, 2], audio[2, 4], audio[2, 3] = -np.inf, np.inf, np.nan, 1e300
    layout["train"]["audio"] = audio
    expected = np.where(np.abs(audio) < 1e30, audio, 0)
    data = read(layout)
    assert data.cleaning["train"]["audio"]["nonfinite_values"] == 4
    assert data.cleaning["valid"]["audio"]["nonfinite_values"] == 0
    scaled = (expected - expected.mean()) / expected.std()
    np.testing.assert_allclose(data.splits["train"].features["audio"], scaled, atol=1e-5)


def test_features_are_standardised_by_the_valid_frames_of_train(layout: Layout) -> None:
    audio = np.full((3, 5, 1), 1000.0, np.float32)  # beyond the lengths
    audio[0, :2, 0], audio[1, 0, 0], audio[2, 0, 0] = [1, 3], 5, 7
    layout["train"].update(audio=audio, audio_lengths=[2, 1, 1])
    layout["test"]["audio"] = np.full((3, 5, 1), 6.0, np.float32)
    data = read(layout)
    std = np.sqrt(5.0)  # of 1, 3, 5, 7 about 4
    train = data.splits["train"].features["audio"][..., 0]
    expected = [[-3 / std, -1 / std, 0, 0, 0], [1 / std, 0, 0, 0, 0], [3 / std, 0, 0, 0, 0]]
    torch.testing.assert_close(train, torch.tensor(expected, dtype=torch.float32))
    test = data.splits["test"].features["audio"]
    torch.testing.assert_close(test, torch.full((3, 5, 1), float(2 / std)))


def test_constant_features_are_centred_and_outliers_clipped(layout: Layout) -> None:
    layout["train"]["vision"][..., 1] = 0.1
    layout["test"]["vision"][..., 1] = 0.6
    layout["test"]["vision"][0, 0, 2] = 1e6
    data = read(layout)
    assert data.cleaning["constant_features_vision"] == 1
    assert data.splits["train"].features["vision"][..., 1].abs().max() < 1e-6
    torch.testing.assert_close(
        data.splits["test"].features["vision"][..., 1], torch.full((3, 2), 0.5)
    )
    assert data.splits["test"].features["vision"][0, 0, 2] == 10.0


def test_a_batch_is_cropped_to_its_longest_utterance(layout: Layout) -> None:
    layout["train"]["audio_lengths"] = [2, 5, 3]
    split = read(layout).splits["train"]
    inputs, labels = split.batch(torch.tensor([2, 0]))
    audio, lengths = inputs["audio"]
    assert audio.shape == (2, 3, 1)
    assert lengths.tolist() == [3, 2]
    assert labels.tolist() == [0.0, 1.0]
    assert torch.equal(audio[1, :2], split.features["audio"][0, :2])


def test_long_sequences_are_averaged_down(layout: Layout) -> None:
    audio = np.zeros((3, 5, 1), np.float32)
    audio[0, :4, 0], audio[1, :5, 0], audio[2, :2, 0] = [1, 3, 5, 9], [2, 2, 5, 8, 8], [4, 6]
    layout["train"].update(audio=audio, audio_lengths=[4, 5, 2])
    split = read(layout, max_frames=2).splits["train"]
    assert split.lengths["audio"].tolist() == [2, 2, 2]
    assert split.features["audio"].shape == (3, 2, 1)
    # Windows of equal size: of five steps, the middle one is in both.
    means = torch.tensor([[2.0, 7.0], [3.0, 7.0], [4.0, 6.0]])
    expected = (means - means.mean()) / means.std(correction=0)
    torch.testing.assert_close(split.features["audio"][..., 0], expected)


# --- the synthetic set ---------------------------------------------------------------------------


def test_the_synthetic_set_is_the_same_for_the_same_seed_and_through_a_file(
    tmp_path: Path,
) -> None:
    data = load_file(write(tmp_path / "data.pkl", synthetic_layout()), 50)
    assert_same(data, synthetic(50))
    assert synthetic(50).digest == synthetic(50, 0).digest != synthetic(50, 4).digest
    assert synthetic(50).synthetic and not data.synthetic


def test_synthetic_text_dominates_and_the_others_say_something() -> None:
    data = synthetic(50)
    strength = {name: linear_correlation(data, name) for name in MODALITIES}
    assert strength["text"] > 0.7
    assert 0.2 < strength["audio"] < 0.6
    assert 0.2 < strength["vision"] < 0.6


def linear_correlation(data: SentimentData, name: str) -> float:
    """Of test labels and least squares on the mean frame."""

    def mean_frames(split: str) -> torch.Tensor:
        part = data.splits[split]
        mean = part.features[name].sum(1) / part.lengths[name][:, None]
        return torch.cat([mean, torch.ones(len(part), 1)], dim=1)

    weights = torch.linalg.lstsq(mean_frames("train"), data.splits["train"].labels[:, None])
    guess = (mean_frames("test") @ weights.solution)[:, 0]
    return float(torch.corrcoef(torch.stack([guess, data.splits["test"].labels]))[0, 1])


# --- the real file -------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL.exists(), reason=f"the real MOSI data is not here ({REAL})")
def test_the_real_file_is_read_as_its_provenance_says() -> None:
    data = load_file(REAL, 50)
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 449,
        "valid": 109,
        "test": 194,
    }
    assert data.dims == {"text": 96, "audio": 73, "vision": 100}
    assert data.splits["train"].lengths["text"].max() <= 50
    assert data.splits["train"].labels.abs().max() <= 3
    for split in SPLITS:
        for counts in data.cleaning[split].values():
            assert not any(count for what, count in counts.items() if what != "clipped_values")
