"""Tumour regions from any combination of MRI sequences, with and without gradient decoupling.

    python -m benchmarks.brats                                   # phantoms, five to ten minutes
    python -m benchmarks.brats --data BRATS --preset paper --device cuda --amp bf16 --workers 8
    python -m benchmarks.brats --data BRATS18 --preset released --device cuda
    python -m benchmarks.brats --data BRATS23 --regions "WT=1,2,3 TC=1,3 ET=3"
    python -m benchmarks.brats --data BRATS24 --regions "WT=1,2,3 TC=1,3 ET=3 RC=4"
    python -m benchmarks.brats --data BRATS --preset paper --check     # looks at everything, stops
    python -m benchmarks.brats --resume results/brats-2026-01-31 --predict segmentations
    python -m benchmarks.brats --model results/brats-2026-01-31/best-gmd-seed0.safetensors
        --data VALIDATION --predict segmentations                # cases without segmentations

One network is trained per method and seed, from the same initial weights and with the same crops:

    full             only the loss of the combination of all modalities
    sum              the losses of the combinations, no decoupling
    gmd              the GMD paper's rule, in the preset's --scope
    gmd-all          the same on all parameters
    pcgrad           the rule in GMD's released code, in the preset's --scope
    balance          sum, weighted by the gradient norms of the first 20 steps (LossBalance)
    balance+gmd-all  both

BRATS is a folder of cases as BraTS 2018, 2020, 2021, 2023 or 2024 lays it out, or one like it.
Without --data, phantoms are generated, written as NIfTI and read as any other data. The preset sets
all other defaults: quick (minutes on a CPU), paper, or released; benchmarks/brats/presets.py lists
each value and where it comes from. Every test case is segmented from each of the 15 combinations
that it has. Results go to results/brats-DATE: results.json, scores.csv, table.md, pictures, and
the best and last model of each training. Ctrl-C, or a killed process, leaves a checkpoint that
--resume continues from: on a CPU exactly, on a GPU up to its own nondeterminism. On several
ranks, with --device cuda on a GPU each:

    torchrun --nproc-per-node 2 -m benchmarks.brats ...

each step has the same batch, of which each rank takes its share; so has each evaluation.
"""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from benchmarks.brats.cases import (
    MODALITIES,
    BratsData,
    Case,
    Regions,
    load_folder,
    read_regions,
    write_segmentation,
)
from benchmarks.brats.estimate import estimate
from benchmarks.brats.inference import (
    case_logits,
    load_about,
    load_model,
    mean_of,
    model_config,
    model_file,
)
from benchmarks.brats.phantom import write_phantoms
from benchmarks.brats.presets import PRESETS, Config
from benchmarks.brats.report import Report, write_report
from benchmarks.brats.splits import acn_split, read_split, split_cases
from benchmarks.brats.training import Training
from benchmarks.brats.volumes import Prepared, make_dataset
from benchmarks.runs import command, ranks
from benchmarks.runs.methods import sampler_of
from benchmarks.runs.session import Diverged, Session, begin, finished, same_data, told
from benchmarks.runs.training import train_all
from reference_models.unet3d import DynamicSharingUNet3d

__all__ = ["main"]

PROG = "python -m benchmarks.brats"
PHANTOM_SIZE = (52, 64, 49)
PHANTOM_SEED = 0
FOLDS = 5
HERE = ("data", "allow_missing", "amp", "device", "workers", "threads")  # with --model


@dataclass(frozen=True, kw_only=True)
class Actions(command.Results):
    """Where the results go. What else there is to do."""

    check: bool = False
    """check data and configuration, estimate memory and time, and stop"""
    predict: Annotated[Path | None, command.checked(Path, "a path", "OUT")] = None
    """write segmentations of the test cases to OUT/METHOD-seedN/CASE.nii.gz, from all modalities a
    case has; also with --resume of a finished run, or with --model"""
    model: Annotated[Path | None, command.checked(Path, "a path", "FILE")] = None
    """with --predict OUT and --data FOLDER: train nothing; segment all cases of the folder, which
    need no segmentations, with a model that a run has saved, to OUT/CASE.nii.gz"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return ranks.run(lambda: command.said(PROG, lambda: _main(arguments)))


def _main(arguments: list[str]) -> int:
    config, actions, given = command.parse(arguments, PROG, __doc__ or "", PRESETS, Actions)
    if actions.model is not None:
        return _apply(actions, actions.model, config, given)
    if actions.check and ranks.count() > 1:
        command.refuse("--check", "measures one process; start it without torchrun")
    if actions.predict is not None:
        _make(actions.predict)  # not after hours of training
    given = [option for option in given if option != "--predict"]
    if content := finished(PROG, actions.resume, given):
        if actions.predict is None:
            return told(actions.resume)
        return _predict_again(actions.resume, content, actions.predict)
    with command.blaming("--combinations"):
        sampler_of("sum", config.combinations, MODALITIES, 0)
    with command.blaming("--width"):
        model_config(config, ["any"])
    if actions.check and actions.resume is None:
        torch.set_num_threads(config.threads)
        try:
            print(estimate(config, _prepare(config)))
        except Diverged as error:
            print(f"benchmarks.brats: {error}; try a lower --lr", file=sys.stderr)
            return 1
        return 0
    packages = ["numpy", "scipy", "monai", "nibabel", "matplotlib"]
    session, config, data = begin(PROG, arguments, config, given, actions, _prepare, packages)
    return _run(session, config, data, actions.predict)


def _run(session: Session, config: Config, prepared: Prepared, predict: Path | None) -> int:
    splits = {name: [case.name for case in cases] for name, cases in prepared.split.items()}

    def work() -> str:
        train_all(
            session,
            config,
            lambda method, seed: Training(config, prepared, method, seed),
            samples=len(splits["train"]),
            unit="crop",
            line=_line_of,
        )
        report = Report(prepared.data, splits=splits, **session.facts)
        return ranks.first(lambda: write_report(report, session.folder))

    if predict is None:
        return session.carry_out(work)
    folder, out = session.folder, predict
    return session.carry_out(
        work, lambda: _predict(folder, config, prepared, out), ["--predict", str(predict)]
    )


def _line_of(result: Mapping[str, Any]) -> str:
    values = [
        region["dice"]
        for combinations in result["test"].values()
        for regions in combinations.values()
        for region in regions.values()
    ]
    valid = "no validation" if result["valid_dice"] is None else f"{result['valid_dice']:.3f}"
    return (
        f"{result['method']}, seed {result['seed']}: epoch {result['best_epoch']}, valid Dice "
        f"{valid}, test Dice {math.fsum(values) / len(values):.3f}, mean over cases and the "
        f"combinations each has ({result['seconds']:.0f} s)"
    )


# --- segmentations -------------------------------------------------------------------------------


def _make(folder: Path) -> None:
    with command.blaming("--predict"):
        folder.mkdir(parents=True, exist_ok=True)


def _apply(actions: Actions, model: Path, config: Config, given: Sequence[str]) -> int:
    """Segment all cases of a folder, which need no segmentation of their own, with one model."""
    out, given = actions.predict, [*given, *["--resume"] * (actions.resume is not None)]
    if out is None or config.data is None:
        command.refuse("--model", "say also --predict OUT and --data FOLDER")
    own = {"--model", "--predict", *(f"--{name.replace('_', '-')}" for name in HERE)}
    if others := [name for name in given if name not in own]:
        command.refuse("--model", f"the rest is as in training; leave out {', '.join(others)}")
    with command.blaming("--model"):
        trained = load_about(model)["config"]
        here = {name: getattr(config, name) for name in HERE}
        here["amp"] = config.amp if "--amp" in given else trained["amp"]
        config = command.restored(Config, {**trained, **here})
    torch.set_num_threads(config.threads)
    regions = read_regions(config.regions)
    with command.blaming("--data"):
        data = _load(Path(str(config.data)), regions, config, labelled=False)
    _make(out)
    dataset = make_dataset(data.cases, regions, normalisation=config.normalisation, cache="none")
    _segment({model: out}, config, regions, data.cases, dataset)
    print(f"segmentations written to {out}", file=sys.stderr)
    return 0


def _predict_again(folder: Path, content: Mapping[str, Any], out: Path) -> int:
    """With the models of a finished run, which has written ``content``."""
    with command.blaming("--resume"):
        config = command.restored(Config, content["config"])
    torch.set_num_threads(config.threads)
    prepared = _prepare(config)
    # With folds, other cases would be divided otherwise: training cases might be tested.
    same_data(prepared, content["data"]["sha256"])
    _predict(folder, config, prepared, out)
    return 0


def _predict(folder: Path, config: Config, prepared: Prepared, out: Path) -> None:
    """Segment the test cases, each from all modalities it has, with every training's best model."""
    folders = {
        model_file(folder, "best", method, seed): out / f"{method}-seed{seed}"
        for method, seed in config.plan
    }
    cases, dataset = prepared.split["test"], prepared.datasets["test"]
    _segment(folders, config, prepared.data.regions, cases, dataset)
    print(f"segmentations written to {out}", file=sys.stderr)


def _segment(
    folders: Mapping[Path, Path],
    config: Config,
    regions: Regions,
    cases: Sequence[Case],
    dataset: "Dataset[dict[str, Any]]",
) -> None:
    """With each model file, into its folder."""

    def segment(model: DynamicSharingUNet3d, below: Path, index: int) -> None:
        logits = case_logits(model, dataset[index], config)
        mask = mean_of(logits, list(logits)) > 0
        write_segmentation(below / f"{cases[index].name}.nii.gz", mask, regions, cases[index])
        bar.update()

    with tqdm(
        total=len(folders) * len(ranks.share(cases)),
        desc="segmenting",
        unit="case",
        disable=not sys.stderr.isatty(),
    ) as bar:
        for path, below in folders.items():
            model = load_model(path).to(config.device)
            below.mkdir(exist_ok=True)
            ranks.divided(partial(segment, model, below), range(len(cases)))


# --- data ----------------------------------------------------------------------------------------


def _prepare(config: Config) -> Prepared:
    """Find, check and divide the cases; anything wrong ends the program here."""
    folder = Path(config.cache_folder)
    with command.blaming("--regions"):
        regions = read_regions(config.regions)
    if config.data is None:
        with command.blaming("--cache-folder"):
            where = ranks.first(
                lambda: write_phantoms(
                    folder / "phantoms",
                    cases=config.phantoms,
                    size=PHANTOM_SIZE,
                    seed=PHANTOM_SEED,
                    progress=sys.stderr.isatty(),
                )
            )
    else:
        where = Path(config.data)
    with command.blaming("--data"):
        data = _load(where, regions, config)
    with command.blaming("--split"):
        split = _split(data, config)
        for name in ("train", "test"):
            if not split[name]:
                raise ValueError(f"no case in {name}; this benchmark needs some")
        complete = any(len(case.files) == len(MODALITIES) for case in split["train"])
        if "full" in config.methods and not complete:
            raise ValueError("no training case has all modalities: leave the method full out")
    with command.blaming("--cache"):
        datasets = {
            name: make_dataset(
                cases,
                regions,
                normalisation=config.normalisation,
                cache=config.cache,
                cache_folder=folder / "volumes",
            )
            for name, cases in split.items()
        }
    return Prepared(data, split, datasets)


def _load(folder: Path, regions: Regions, config: Config, *, labelled: bool = True) -> BratsData:
    data = ranks.first(
        lambda: load_folder(
            folder,
            regions,
            allow_missing=config.allow_missing,
            labelled=labelled,
            workers=config.workers or os.cpu_count() or 1,
            phantom=config.data is None,
            progress=sys.stderr.isatty(),
        )
    )
    if not all(len(case.files) == len(MODALITIES) for case in data.cases):
        print(f"{folder}: of {len(data.cases)} cases, {data.lacking()}", file=sys.stderr)
    return data


def _split(data: BratsData, config: Config) -> dict[str, Any]:
    if config.split == "folds":
        patients = len({case.patient for case in data.cases})
        folds = config.folds or min(FOLDS, max(patients, 3))
        return split_cases(data, seed=0, folds=folds, fold=config.fold)
    if config.split == "acn":
        return acn_split(data)
    return read_split(data, Path(config.split))


if __name__ == "__main__":
    sys.exit(main())
