"""What a run would take, measured by one step and one window: ``--check``."""

import dataclasses
import itertools
import math
import time

import torch

from benchmarks.brats.cases import MODALITIES
from benchmarks.brats.inference import OVERLAP, case_logits
from benchmarks.brats.presets import Config
from benchmarks.brats.training import Training
from benchmarks.brats.volumes import Prepared, training_batches

__all__ = ["estimate"]

MEASURED_CROP = 48  # on a CPU a step of at most this crop is measured, and scaled


def estimate(config: Config, prepared: Prepared) -> str:
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
        if training.step([batch] * config.accumulate) is not None:  # the loss is read: it is done
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
