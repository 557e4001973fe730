"""Tumour regions from any combination of MRI sequences, with and without gradient decoupling.

    python -m benchmarks.brats                                   # phantoms, five to ten minutes
    python -m benchmarks.brats --data BRATS --preset paper --device cuda --amp bf16 --workers 8
    python -m benchmarks.brats --data BRATS18 --preset released --device cuda
    python -m benchmarks.brats --data BRATS23 --regions "WT=1,2,3 TC=1,3 ET=3"
    python -m benchmarks.brats --data BRATS24 --regions "WT=1,2,3 TC=1,3 ET=3 RC=4"
    python -m benchmarks.brats --data BRATS --preset paper --check     # looks at everything, stops
    python -m benchmarks.brats --resume results/brats-2026-01-31 --predict segmentations
    python -m benchmarks.brats --model results/brats-2026-01-31/best-gmd-seed0.pt --data VALIDATION
        --predict segmentations                                  # cases without segmentations

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
that it has. Results go to results/brats-DATE: results.json, table.md, dice.png, angles.png,
dominance.png, cases.png, and the best and last model of each training. Ctrl-C, or a killed process,
leaves a checkpoint that --resume continues from: on a CPU exactly, on a GPU up to its own
nondeterminism.
On several ranks, with --device cuda on a GPU each:

    torchrun --nproc-per-node 2 -m benchmarks.brats ...

each step has the same batch, of which each rank takes its share; so has each evaluation.
"""

import argparse
import dataclasses
import datetime
import io
import itertools
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from benchmarks.brats.cases import (
    MODALITIES,
    REGIONS_2023,
    BratsData,
    Case,
    Regions,
    load_folder,
    read_regions,
    write_segmentation,
)
from benchmarks.brats.inference import (
    OVERLAP,
    case_logits,
    load_config,
    load_model,
    mean_of,
    model_config,
    model_file,
)
from benchmarks.brats.phantom import write_phantoms
from benchmarks.brats.presets import AMP, LOSSES, OPTIMIZERS, PRESETS, SCHEDULES, Config
from benchmarks.brats.report import Report, write_report
from benchmarks.brats.splits import acn_split, read_split, split_cases
from benchmarks.brats.training import Training
from benchmarks.brats.volumes import (
    CACHES,
    NORMALISATIONS,
    Prepared,
    make_dataset,
    training_batches,
)
from benchmarks.runs import ranks, results
from benchmarks.runs.command import (
    absolute,
    combinations_of,
    from_zero,
    methods,
    positive_float,
    positive_int,
    whole,
)
from benchmarks.runs.methods import METHODS
from benchmarks.runs.session import Diverged, Session, check_digest
from reference_models.unet3d import DynamicSharingUNet3d

__all__ = ["main"]

PHANTOM_SIZE = (52, 64, 49)
PHANTOM_SEED = 0
FOLDS = 5
FREE = ("data", "allow_missing", "amp", "device", "workers", "threads")  # with --model
MEASURED_CROP = 48  # --check on a CPU measures a step of at most this crop, and scales it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return ranks.run(lambda: _main(arguments))


def _main(arguments: list[str]) -> int:
    try:
        return _begin(arguments)
    except KeyboardInterrupt:  # while data were read, or segmentations written
        print("\ninterrupted", file=sys.stderr)
        return 130


def _begin(arguments: list[str]) -> int:
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    predict = options.pop("predict", None)
    if "model" in options:
        return _apply(parser, options.pop("model"), options, predict)
    check = options.pop("check", False)
    if check and ranks.count() > 1:
        parser.error("argument --check: measures one process; start it without torchrun")
    if predict is not None:
        _make(parser, predict)  # not after hours of training
    if "resume" in options:
        return _resume(parser, options.pop("resume"), [*options, *["check"] * check], predict)
    wanted = options.pop("out", Path("results") / f"brats-{datetime.date.today()}")
    config = dataclasses.replace(PRESETS[options.get("preset", "quick")](), **options)
    torch.set_num_threads(config.threads)  # sums depend on how they are split
    try:
        model_config(config, ["any"])
    except ValueError as error:
        name = str(error).split()[0].replace("_", "-")
        parser.error(f"argument --{name}: {error}")
    prepared = _prepare(parser, config)
    if check:
        try:
            print(_checked(config, prepared))
        except Diverged as error:
            print(f"benchmarks.brats: {error}; try a lower --lr", file=sys.stderr)
            return 1
        return 0
    command = shlex.join([*ranks.command("python"), "-m", "benchmarks.brats", *arguments])
    environment, digest = _versions(), prepared.data.digest
    session = Session.start(parser, wanted, asdict(config), command, environment, digest)
    return _run(session, config, prepared, predict)


def _make(parser: argparse.ArgumentParser, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --predict: cannot create {folder}: {error.strerror}")


def _apply(
    parser: argparse.ArgumentParser, path: Path, options: Mapping[str, Any], out: Path | None
) -> int:
    """Segment all cases of a folder, which need no segmentation of their own, with one model."""
    if out is None or "data" not in options:
        parser.error("argument --model: say also --predict OUT and --data FOLDER")
    if given := [f"--{name.replace('_', '-')}" for name in options if name not in FREE]:
        parser.error(f"argument --model: the rest is as in training; leave out {', '.join(given)}")
    source = "--model"
    try:
        here = {name: getattr(Config(), name) for name in ("allow_missing", "device", "threads")}
        config = dataclasses.replace(load_config(path), **{**here, **options})
        torch.set_num_threads(config.threads)
        source = "--data"
        regions = read_regions(config.regions)
        data = _load(Path(options["data"]), regions, config, labelled=False)
    except ValueError as error:
        parser.error(f"argument {source}: {error}")
    except OSError as error:
        parser.error(f"argument {source}: cannot use {error.filename}: {error.strerror}")
    _make(parser, out)
    dataset = make_dataset(data.cases, regions, normalisation=config.normalisation, cache="none")
    _segment({path: out}, config, regions, data.cases, dataset)
    print(f"segmentations written to {out}", file=sys.stderr)
    return 0


def _resume(
    parser: argparse.ArgumentParser, folder: Path, given: Sequence[str], predict: Path | None
) -> int:
    if not given and (folder / results.RESULTS).exists():
        if predict is None:
            table = (folder / results.TABLE).read_text("utf-8")
            print(f"{folder} is already finished:\n\n{table}")
            return 0
        content = json.loads((folder / results.RESULTS).read_text("utf-8"))
        config = _config_of(parser, content["config"])
        prepared = _prepare(parser, config)
        # With folds, other cases would be divided otherwise: training cases might be tested.
        digest: str = content["data"]["sha256"]
        check_digest(parser, prepared.data.source, prepared.data.digest, digest)
        _predict(folder, config, prepared, predict)
        return 0
    session = Session.resume(parser, folder, given, _versions())
    config = _config_of(parser, session.config)
    prepared = _prepare(parser, config)
    check_digest(parser, prepared.data.source, prepared.data.digest, session.digest)
    return _run(session, config, prepared, predict)


def _config_of(parser: argparse.ArgumentParser, content: Mapping[str, Any]) -> Config:
    """The configuration that a run began with."""
    try:
        _device(content["device"])
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --resume: the run began on {content['device']}: {error}")
    torch.set_num_threads(content["threads"])
    return Config(**{**content, "methods": tuple(content["methods"])})  # JSON has no tuples


def _run(session: Session, config: Config, prepared: Prepared, predict: Path | None) -> int:
    splits = {name: [case.name for case in cases] for name, cases in prepared.split.items()}
    try:
        session.save()  # from here on a kill loses at most an epoch
        session.train(
            # Every method for a seed, then the next seed: what is there early can be compared.
            [(method, seed) for seed in config.all_seeds for method in config.methods],
            lambda method, seed: Training(config, prepared, method, seed),
            epochs=config.epochs,
            epoch_length=len(splits["train"]),
            unit="crop",
            line=_line_of,
            saved=lambda training: training.save_models(session.folder),
        )
        report = Report(
            prepared.data,
            splits=splits,
            config=session.config,
            command=session.command,
            environment=session.environment,
            done=session.done,
        )
        table = ranks.first(lambda: write_report(report, session.folder))
        session.close()
        if predict is not None:
            _predict(session.folder, config, prepared, predict)
    except KeyboardInterrupt:
        again = session.how_to_continue(*([] if predict is None else ["--predict", str(predict)]))
        print(f"\ninterrupted; to continue:\n  {again}", file=sys.stderr)
        return 130
    except Diverged as error:
        print(f"benchmarks.brats: {error}", file=sys.stderr)
        return 1
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an ASCII terminal has no circles
    print(table)
    print(f"written to {session.folder}")
    return 0


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


def _predict(folder: Path, config: Config, prepared: Prepared, out: Path) -> None:
    """Segment the test cases, each from all modalities it has, with every training's best model."""
    folders = {
        model_file(folder, "best", method, seed): out / f"{method}-seed{seed}"
        for method in config.methods
        for seed in config.all_seeds
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


def _prepare(parser: argparse.ArgumentParser, config: Config) -> Prepared:
    """Find, check and divide the cases; anything wrong ends the program here."""
    folder, source = Path(config.cache_folder), "--data"
    try:
        source = "--regions"
        regions = read_regions(config.regions)
        source = "--data"
        if config.data is None:
            source = "--cache-folder"
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
        data = _load(where, regions, config)
        source = "--split"
        split = _split(data, config)
        for name in ("train", "test"):
            if not split[name]:
                raise ValueError(f"no case in {name}; this benchmark needs some")
        complete = any(len(case.files) == len(MODALITIES) for case in split["train"])
        if "full" in config.methods and not complete:
            raise ValueError("no training case has all modalities: leave the method full out")
        source = "--cache"
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
    except ValueError as error:
        parser.error(f"argument {source}: {error}")
    except OSError as error:
        parser.error(f"argument {source}: cannot use {error.filename}: {error.strerror}")
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
        folds = min(FOLDS, max(patients, 3)) if config.folds is None else config.folds
        return split_cases(data, seed=0, folds=folds, fold=config.fold)
    if config.split == "acn":
        return acn_split(data)
    return read_split(data, Path(config.split))


def _versions() -> dict[str, str]:
    return results.environment(["numpy", "scipy", "monai", "nibabel", "matplotlib"])


# --- dry run -------------------------------------------------------------------------------------


def _checked(config: Config, prepared: Prepared) -> str:
    """What a run would take: sizes, memory, time. The data are good, or we would not be here."""
    cpu = torch.device(config.device).type == "cpu"
    crop = min(config.crop, MEASURED_CROP) if cpu else config.crop
    small = dataclasses.replace(config, crop=crop)
    scale = (config.crop / crop) ** 3
    training = Training(small, prepared, config.methods[-1], 0)
    n = sum(parameter.numel() for parameter in training.model.parameters())
    m = len(training.sampler())
    kept, step_seconds = _measured_step(training, prepared, small)
    windows, window_seconds = _measured_windows(training, prepared, small)
    runs = len(config.methods) * config.seeds
    steps = runs * config.epochs * training.steps_per_epoch
    validations = runs * math.ceil(config.epochs / config.validate_every)
    valid_windows = validations * windows["valid"]
    test_windows = runs * windows["test"]
    train_time = steps * step_seconds * scale
    window_time = (valid_windows + test_windows) * window_seconds * scale
    voxels = sum(math.prod(case.shape) for cases in prepared.split.values() for case in cases)
    cached = voxels * (4 * len(MODALITIES) + len(prepared.data.regions))
    cases = prepared.data.cases
    shapes = sorted({case.shape for case in cases})
    sizes = ", ".join(" x ".join(map(str, shape)) for shape in shapes[:3])
    more = f" and {len(shapes) - 3} more" if len(shapes) > 3 else ""
    measured = "" if scale == 1 else f" (from a step of {crop}^3, scaled by voxels)"
    lines = {
        "data": f"{len(cases)} cases in {prepared.data.source}, all read and checked; "
        f"SHA-256 {prepared.data.digest[:12]}",
        "voxels": f"{sizes}{more}; {prepared.data.lacking()}",
        "regions": ", ".join(f"{k} = {{{','.join(map(str, v))}}}"
                             for k, v in prepared.data.regions.items()),
        "split": ", ".join(f"{name} {len(part)}" for name, part in prepared.split.items()),
        "trainings": f"{runs} ({', '.join(config.methods)}; seeds {config.seeds}), "
        f"{config.epochs} epochs of {training.steps_per_epoch} steps, {m} losses each",
        "parameters": f"{n:,}, of which {n - _shared(training):,} private",
        "memory": f"activations {_gb(kept * scale)}{measured}; "
        f"gradients at most (m + 1) n = {_gb(4 * (m + 1) * n)}; "
        f"parameters and optimizer {_gb(4 * 3 * n)}; "
        + (f"volumes {_gb(cached)}" if config.cache == "memory" else "volumes on disk"),
        "time": f"training {_duration(train_time)} ({step_seconds * scale:.2g} s a step), "
        f"validation and test {_duration(window_time)} without surface distances, on this machine "
        f"as busy as it is now{measured}",
    }  # fmt: skip
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def _measured_step(training: Training, prepared: Prepared, config: Config) -> tuple[int, float]:
    """Bytes that the forward of one micro-batch keeps for the backward; seconds of a step."""
    batches = training_batches(
        prepared.datasets["train"],
        crop=config.crop, batch_size=config.batch_size, seed=0, epoch=0,
    )  # fmt: skip
    # With incomplete cases, a batch may have nothing of what is drawn.
    batch = next(batch for batch in itertools.cycle(batches) if training.step([batch]) is not None)
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    names = list(itertools.compress(MODALITIES, batch["available"].any(0).tolist()))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        training.losses(batch, [(name,) for name in names])
    seconds = None
    while seconds is None:
        started = time.perf_counter()
        if (
            training.step([batch] * config.accumulate) is not None
        ):  # it reads the loss, so it is done
            seconds = time.perf_counter() - started
    return sum(storages.values()), seconds


def _measured_windows(
    training: Training, prepared: Prepared, config: Config
) -> tuple[dict[str, int], float]:
    """How many windows the cases of each split take, and seconds of one."""
    volume = torch.randn(len(MODALITIES), *[config.crop] * 3)
    sample = {"volume": volume, "available": torch.ones(len(MODALITIES), dtype=torch.bool)}
    case_logits(training.model, sample, config)
    started = time.perf_counter()
    case_logits(training.model, sample, config)
    seconds = time.perf_counter() - started
    stride = config.crop * (1 - OVERLAP)
    windows = {
        name: sum(
            math.prod(max(1, math.ceil((size - config.crop) / stride) + 1) for size in case.shape)
            for case in cases
        )
        for name, cases in prepared.split.items()
    }
    return windows, seconds


def _shared(training: Training) -> int:
    return sum(parameter.numel() for parameter in training.model.shared_parameters())


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# --- command line --------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    presets = {name: make() for name, make in PRESETS.items()}
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.brats",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # absent unless given: presets and --resume must tell
    )

    def add(name: str, kind: Callable[[str], Any], text: str, **more: Any) -> None:
        field = name[2:].replace("-", "_")
        values = [_shown(getattr(config, field)) for config in presets.values()]
        if len(set(values)) > 1:
            default = ", ".join(f"{k}: {v}" for k, v in zip(presets, values, strict=True))
        else:
            default = values[0]
        parser.add_argument(name, type=kind, help=f"{text} (default: {default})", **more)

    def flag(name: str, text: str) -> None:
        parser.add_argument(name, action="store_true", help=text)

    add("--preset", str, "all other defaults", choices=list(PRESETS))
    add("--data", absolute, "folder of cases; without it, phantoms", metavar="FOLDER")
    add("--regions", str, f'region to labels; BraTS 2023: "{REGIONS_2023}", 2024 (GLI): RC=4, too',
        metavar="TEXT")  # fmt: skip
    flag("--allow-missing", "train and test on cases that lack modality files, too")
    add("--phantoms", positive_int, "cases to generate without --data", metavar="N")
    add("--normalisation", str, "of each volume", choices=list(NORMALISATIONS))
    add("--split", _split_argument, "folds, acn (the released protocol), or a JSON file of names",
        metavar="SPLIT")  # fmt: skip
    parser.add_argument(
        "--folds", type=positive_int, metavar="N",
        help=f"of --split folds (default: {FOLDS}, or one per patient where there are fewer)",
    )  # fmt: skip
    add("--fold", whole, "the one that is tested; the next one validates", metavar="N")
    add("--cache", str, "where normalised volumes are kept", choices=list(CACHES))
    add("--cache-folder", absolute, "for phantoms and --cache disk", metavar="FOLDER")
    add("--methods", methods, f"comma-separated, of {', '.join(METHODS)}", metavar="LIST")
    add("--combinations", combinations_of(MODALITIES), "trained on: all, singles, or k=N per step")
    add("--scope", str, "where conflicts are measured and removed", choices=["shared", "all"])
    add("--reduction", str, "of the losses", choices=["mean", "sum", "released"])
    add("--seeds", positive_int, "number of seeds", metavar="N")
    add("--first-seed", whole, "the others follow it", metavar="N")
    add("--epochs", positive_int, "passes over train, one crop of every case", metavar="N")
    add("--batch-size", positive_int, "crops per micro-batch", metavar="N")
    add("--accumulate", positive_int, "micro-batches per step", metavar="N")
    add("--crop", positive_int, "voxels along each side, in training and inference", metavar="N")
    add("--loss", str, "of each combination", choices=list(LOSSES))
    add("--optimizer", str, "what the decoupling wraps", choices=list(OPTIMIZERS))
    add("--lr", positive_float, "learning rate at the start", metavar="X")
    add("--weight-decay", from_zero, "of the optimizer", metavar="X")
    add("--schedule", str, "of the learning rate, over all steps", choices=list(SCHEDULES))
    add("--clip-norm", positive_float, "clip the merged gradient to this norm", metavar="X")
    add("--validate-every", positive_int, "epochs between validations", metavar="N")
    add("--width", positive_int, "channels of the first level, a multiple of 8", metavar="N")
    add("--private-encoder-levels", whole, "of each modality's own, 0 to 5", metavar="N")
    flag("--checkpointing", "recompute activations in the backward: less memory, more time")
    add("--amp", str, "autocast to", choices=list(AMP))
    flag("--compile", "compile the network's blocks")
    add("--device", _device, "cpu, cuda, cuda:1, ...", metavar="DEVICE")
    add("--workers", whole, "processes that read and crop", metavar="N")
    add("--threads", positive_int, "of torch; sums depend on it", metavar="N")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="result folder (default: results/brats-DATE)"
    )
    parser.add_argument(
        "--resume", type=Path, metavar="DIR", help="continue the interrupted run in DIR"
    )
    parser.add_argument(
        "--predict", type=Path, metavar="OUT",
        help="write segmentations of the test cases to OUT/METHOD-seedN/CASE.nii.gz, from all "
        "modalities a case has; also with --resume of a finished run, or with --model",
    )  # fmt: skip
    parser.add_argument(
        "--model", type=Path, metavar="FILE",
        help="with --predict OUT and --data FOLDER: train nothing; segment all cases of the "
        "folder, which need no segmentations, with a model that a run has saved, to "
        "OUT/CASE.nii.gz",
    )  # fmt: skip
    flag("--check", "check data and configuration, estimate memory and time, and stop")
    return parser


def _shown(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _split_argument(text: str) -> str:
    return text if text in ("folds", "acn") else absolute(text)


def _device(text: str) -> str:
    try:
        device = torch.device(text)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=device)
        if device.type == "cuda" and ranks.count() > 1 and device.index is not None:
            raise RuntimeError("every rank has its own GPU; say cuda")
        if device.type == "cuda" and not ranks.has_own_gpu():
            raise RuntimeError(
                f"more ranks here than GPUs, of which there are {torch.cuda.device_count()}"
            )
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {reason}") from None
    return str(device)


if __name__ == "__main__":
    sys.exit(main())
