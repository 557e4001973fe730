"""From a model file to the logits of a whole case."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from monai.inferers.utils import sliding_window_inference
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.brats.cases import MODALITIES
from benchmarks.brats.presets import AMP, Config
from benchmarks.runs.results import atomic_path
from benchmarks.runs.session import Diverged
from reference_models.unet3d import DynamicSharingUNet3d, UNet3dConfig

Sample = dict[str, Any]

__all__ = [
    "OVERLAP",
    "autocast",
    "case_logits",
    "convolutions",
    "load_about",
    "load_model",
    "mean_of",
    "model_config",
    "model_file",
    "save_model",
]


OVERLAP = 0.25  # of neighbouring windows in inference


def model_config(config: Config, regions: Sequence[str]) -> UNet3dConfig:
    """The benchmark's network for these regions."""
    return UNet3dConfig(
        modalities=MODALITIES,
        regions=tuple(regions),
        width=config.width,
        activation_checkpointing=config.checkpointing,
    )


def autocast(config: Config) -> torch.autocast:
    device = torch.device(config.device).type
    return torch.autocast(device, AMP[config.amp] or torch.bfloat16, config.amp != "off")


def convolutions(config: Config) -> AbstractContextManager[None]:
    """Within this block convolutions can be trusted.

    On CPUs that know bfloat16, oneDNN's gradient of a conv3d's weight reads memory that nobody has
    written where the volume is 2 voxels deep (torch 2.13). With crops of up to 32 the network has
    such a level: there torch's own convolutions run, which are slower.
    """
    if config.amp == "bf16" and torch.device(config.device).type == "cpu" and config.crop <= 32:
        unknown: AbstractContextManager[None] = torch.backends.mkldnn.flags(enabled=False)
        return unknown
    return nullcontext()


@torch.no_grad()
def case_logits(model: DynamicSharingUNet3d, sample: Sample, config: Config) -> dict[str, Tensor]:
    """Logits of a whole case from each modality it has, at its own resolution.

    Windows of the training crop's size slide over the box that holds all nonzero voxels of the
    available modalities (the brain); outside of it nothing is predicted: the logit there is -inf.
    The network fuses modalities by the mean of their logits, and windows are blended linearly: the
    mean of what is returned here over a combination is the network's output for it. So one pass
    over the available modalities serves all combinations.

    Args:
        model: on the device of ``config``, in whatever mode.
        sample: of a dataset: ``volume`` (M, D, H, W), ``available`` (M,).
        config: the crop, the device, and amp.

    Returns:
        modality -> (R, D, H, W) float32 on the CPU, available modalities only.

    Raises:
        Diverged: there is NaN among them.
    """
    volume, available = sample["volume"], sample["available"].tolist()
    names = list(itertools.compress(MODALITIES, available))
    there = volume[torch.tensor(available)]
    box = _foreground(there)
    inside = there[(slice(None), *box)].contiguous()[None]  # (1, A, d, h, w)

    def branches(windows: Tensor) -> Tensor:  # (b, A, c, c, c) -> (b, A * R, c, c, c)
        parts = dict(zip(names, windows.split(1, dim=1), strict=True))
        with autocast(config):
            logits = model(parts, combinations=[(name,) for name in names])
        return torch.cat(logits, dim=1).float()

    stitched = sliding_window_inference(
        inside,
        roi_size=config.crop,
        sw_batch_size=1,
        predictor=branches,
        overlap=OVERLAP,
        mode="gaussian",
        sw_device=config.device,
        device="cpu",
    )
    assert isinstance(stitched, Tensor)
    if bool(stitched.isnan().any()):
        raise Diverged("a score is not a finite number")
    parts = stitched[0].unflatten(0, (len(names), -1))  # (A, R, d, h, w)
    logits = {}
    for name, part in zip(names, parts, strict=True):
        whole = part.new_full((part.shape[0], *volume.shape[1:]), -math.inf)
        whole[(slice(None), *box)] = part
        logits[name] = whole
    return logits


def mean_of(logits: Mapping[str, Tensor], combination: Sequence[str]) -> Tensor:
    """(R, D, H, W): the output for a combination, from :func:`case_logits`."""
    return torch.stack([logits[name] for name in combination]).mean(0)


def _foreground(volume: Tensor) -> tuple[slice, slice, slice]:
    """The smallest box that holds every nonzero voxel of (M, D, H, W); all of it where none is."""
    inside = (volume != 0).any(0)
    slices = []
    for axis in range(3):
        others = [other for other in range(3) if other != axis]
        occupied = inside.any(others[1]).any(others[0]).nonzero().flatten().tolist()
        slices.append(slice(occupied[0], occupied[-1] + 1) if occupied else slice(None))
    return slices[0], slices[1], slices[2]


def model_file(folder: Path, kind: str, method: str, seed: int) -> Path:
    """Where the ``kind`` ("best" or "last") model of a training lies."""
    return folder / f"{kind}-{method}-seed{seed}.safetensors"


def save_model(path: Path, weights: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a model that :func:`load_model` reads; ``about`` is kept as JSON beside the weights."""
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"gradsplit": json.dumps(about)})


def load_about(path: Path) -> dict[str, Any]:
    """What is known of a model: ``config``, ``model_config``, ``method``, ``seed``, ``epoch``.

    Raises:
        OSError: there is no such file.
        ValueError: it is none of :func:`save_model`.
    """
    path.open("rb").close()  # safetensors names no file in its errors
    try:
        with safe_open(path, "pt") as file:
            about: dict[str, Any] = json.loads(file.metadata()["gradsplit"])
        if not {"config", "model_config"} <= about.keys():
            raise KeyError("config")
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not a model that this version saved, such as best-gmd-seed0.safetensors"
        ) from error
    return about


def load_model(path: Path) -> DynamicSharingUNet3d:
    """A model that a run has saved, ready for inference. Raises as :func:`load_about`."""
    content = load_about(path)["model_config"]
    for name in ("modalities", "regions"):
        content[name] = tuple(content[name])  # JSON has no tuples
    model = DynamicSharingUNet3d(UNet3dConfig(**content))
    model.load_state_dict(load_file(path))
    return model.eval()
