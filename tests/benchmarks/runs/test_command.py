"""What every command line has: options, presets, help, refusals."""

import dataclasses
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.brats import __main__ as brats
from benchmarks.brats.presets import PRESETS as OF_BRATS
from benchmarks.regimes import __main__ as regimes
from benchmarks.runs import command
from benchmarks.sentiment import __main__ as sentiment
from benchmarks.sentiment.training import PRESETS as OF_SENTIMENT
from benchmarks.speed import __main__ as speed
from tests.benchmarks.running import Capsys, Main, refused

MAINS = {"sentiment": sentiment.main, "brats": brats.main, "regimes": regimes.main}
PRESETS: dict[str, dict[str, Any]] = {
    "sentiment": OF_SENTIMENT, "brats": OF_BRATS, "regimes": regimes.PRESETS,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "sentiment",
            ["--methods", "magic"],
            "--methods: unknown method 'magic' (choose from full",
        ),
        ("sentiment", ["--methods", "gmd,gmd"], "--methods: 'gmd,gmd' names a method twice"),
        ("sentiment", ["--combinations", "5"], "--combinations: '5' (choose from all, singles, k="),
        ("sentiment", ["--combinations", "k=8"], "--combinations: k must be between 1 and 7"),
        ("sentiment", ["--combinations", "k=0"], "--combinations: k must be between 1 and 7"),
        ("sentiment", ["--seeds", "0"], "--seeds: must be a whole number of at least 1, got '0'"),
        ("sentiment", ["--seeds", "1.5"], "--seeds: must be a whole number of at least 1, got"),
        ("sentiment", ["--first-seed=-1"], "--first-seed: must be whole, from 0 to below 2^32"),
        ("brats", ["--first-seed", str(2**64)], "--first-seed: must be whole, from 0 to"),
        ("sentiment", ["--lr", "-1"], "--lr: must be positive, got '-1'"),
        ("sentiment", ["--lr", "nan"], "--lr: must be positive, got 'nan'"),
        ("sentiment", ["--weight-decay", "inf"], "--weight-decay: must be at least 0, got 'inf'"),
        ("sentiment", ["--dropout", "1"], "--dropout: must be from 0 to below 1, got '1'"),
        ("sentiment", ["--preset", "best"], "invalid choice 'best' for argument '--preset'"),
        ("sentiment", ["--optimizer", "sgd"], "Unrecognized options: --optimizer"),
        ("sentiment", ["--width", "10"], "--width: must be even and a multiple of --heads, got 10"),
        ("sentiment", ["--missing", "text"], "--missing: must be NAME=RATE,..., got 'text'"),
        ("sentiment", ["--missing", "text=1"], "--missing: must be from 0 to below 1, got '1'"),
        (
            "sentiment",
            ["--missing", "smell=0.1"],
            "expected NAME=RATE once for some of text, audio",
        ),
        ("sentiment", ["--data", "nowhere.pkl"], "nowhere.pkl: No such file"),
        ("sentiment", ["--resume", "nowhere"], "--resume: nowhere holds no checkpoint.pt"),
        ("brats", ["--combinations", "k=16"], "--combinations: k must be between 1 and 15"),
        ("brats", ["--scope", "some"], "invalid choice 'some' for argument '--scope'"),
        ("brats", ["--amp", "fp8"], "invalid choice 'fp8' for argument '--amp'"),
        ("brats", ["--width", "12"], "--width: "),
        ("brats", ["--regions", "WT"], "--regions: regions 'WT': 'WT' is not NAME=LABEL"),
        ("brats", ["--data", "nowhere"], "--data: "),
        ("brats", ["--device", "abacus"], "--device: 'abacus' cannot be used here"),
        ("brats", ["--device", "meta"], "--device: 'meta' cannot be used here: it holds no"),
        pytest.param(
            "brats",
            ["--device", "cuda"],
            "--device: 'cuda' cannot be used here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
        ("brats", ["--model", "x"], "--model: say also --predict OUT and --data FOLDER"),
        (
            "brats",
            ["--model", "x", "--predict", "y", "--data", "z", "--epochs", "36", "--resume", "o"],
            "--model: the rest is as in training; leave out --epochs, --resume",
        ),
        ("regimes", ["--parts", "units,speed"], "--parts: unknown part 'speed' (choose from units"),
        ("regimes", ["--seeds", "1001"], "--seeds: must be at most 1000, where tuning seeds begin"),
        ("regimes", ["--device", "cpu:0"], "--device: its networks are too small for anything"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_named_and_leave_nothing_behind(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capsys,
    name: str,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(MAINS[name], capsys, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", MAINS)
def test_a_preset_sets_the_other_defaults(name: str) -> None:
    for preset, config in PRESETS[name].items():
        assert config.preset == preset
        found, where, given = command.parse(["--preset", preset], "x", "", PRESETS[name])
        assert found == config
        assert (where.out, where.resume, given) == (None, None, ["--preset"])
    found, _, given = command.parse([], "x", "", PRESETS[name])
    assert (found, given) == (next(iter(PRESETS[name].values())), [])


def test_what_is_given_beside_a_preset() -> None:
    arguments = ["--seeds", "4", "--preset=study", "--missing", "text=0.2,vision=0.5"]
    found, where, given = command.parse([*arguments, "--resume", "x"], "x", "", OF_SENTIMENT)
    missing = {"text": 0.2, "vision": 0.5}
    assert found == dataclasses.replace(OF_SENTIMENT["study"], seeds=4, missing=missing)
    assert where.resume == Path("x")
    assert given == ["--seeds", "--preset", "--missing"]
    assert found.plan[:8] == [
        *((method, 100) for method in found.methods), (found.methods[0], 101)
    ]  # fmt: skip


def test_a_path_holds_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--data", "cases", "--split", "some.json", "--cache-folder", "../cache"]
    config, _, _ = command.parse(arguments, "x", "", OF_BRATS)
    assert [config.data, config.split] == [str(tmp_path / "cases"), str(tmp_path / "some.json")]
    assert Path(config.cache_folder).is_absolute()


@pytest.mark.parametrize("name", MAINS)
def test_help_names_every_option_in_groups(name: str, capsys: Capsys) -> None:
    preset, config = list(PRESETS[name].items())[-1]
    with pytest.raises(SystemExit) as caught:
        MAINS[name](["--preset", preset, "--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: python -m benchmarks.{name} ")
    assert f"python -m benchmarks.{name} --resume results/{name}-" in said
    options = re.findall(r"^[│ ]+--([a-z][a-z-]*)", said.partition("show this help")[2], re.M)
    wanted = {field.name.replace("_", "-") for field in dataclasses.fields(config)}
    assert wanted < set(options)
    for title in ("What is compared.", "Where it runs.", "Where the results go."):
        assert title.lower() in said.lower()
    assert f"(default: {config.seeds})" in said


def test_the_benchmarks_are_listed(capsys: Capsys) -> None:
    runpy.run_module("benchmarks", run_name="__main__")
    said = capsys.readouterr().out.splitlines()
    found = [re.fullmatch(r"python -m benchmarks\.(\w+) +\S.{20,}\.", line) for line in said]
    assert [match and match[1] for match in found] == ["sentiment", "brats", "speed", "regimes"]


@pytest.mark.parametrize("main", [speed.main, regimes.main], ids=["speed", "regimes"])
def test_what_does_not_divide_its_work_refuses_torchrun(
    main: Main, capsys: Capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "here")
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = refused(main, capsys, "--preset", "quick", "--out", tmp_path / "out")
    assert "start it without torchrun" in said
    assert not (tmp_path / "out").exists()


def test_an_error_without_a_file_says_what_it_says() -> None:
    expected = pytest.raises(command.Refused, match="^argument --data: cannot use no space left$")
    with expected, command.blaming("--data"):
        raise OSError("no space left")
