"""Optimizers that were checked and need no page: wrapped, they are what they are bare.

The bare one is fed with the oracle's merged gradient. Not in the list: those that want a closure,
Hessians or groups of their own; and SOAP and its kin, whose eigenbases make 1e-3 of 1e-15 of noise.
"""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from your_model import Model, samples

from gradsplit import ModalityDecoupledOptimizer
from tests.recipes.by_hand import by_hand

NAMES = {
    "torch.optim": """
        ASGD Adadelta Adafactor Adagrad Adam AdamW Adamax NAdam RAdam RMSprop Rprop SGD""",
    "torch_optimizer": """
        A2GradExp A2GradInc A2GradUni AccSGD AdaBelief AdaBound AdaMod Adafactor AdamP AggMo Apollo
        DiffGrad LARS Lamb MADGRAD NovoGrad PID QHAdam QHM RAdam Ranger RangerQH RangerVA SGDP SGDW
        SWATS Shampoo Yogi""",
    "pytorch_optimizer": """
        A2Grad ADOPT APOLLO ASGD AccSGD AdEMAMix AdaBelief AdaBound AdaDelta AdaFactor AdaGC AdaMax
        AdaMod AdaNorm AdaPNM AdaShift AdaSmooth AdaTAM Adai Adalite Adam AdamC AdamG AdamP AdamS
        AdamW AdamWSN Adan AggMo Aida Alice Amos Ano ApolloDQN AvaGrad BCOS CAME Conda DASH
        DAdaptAdaGrad DAdaptAdam DAdaptAdan DAdaptLion DAdaptSGD DiffGrad DualAdam EXAdam EmoFact
        EmoLynx EmoNavi FOCUS FTRL Fira FlashAdamW Fromage GaLore Grams Gravity GrokFastAdamW Kate
        Kron LARS LaProp Lamb Lion LoRARite MADGRAD MARS MSVAG NAdam Nero NovoGrad PAdam PID PNM
        Prodigy QHAdam QHM RACS RAdam RMSprop ROSE Ranger SCION SCIONLight SGD SGDP SGDSaI SGDW SM3
        SPAM SPlus SRMM SWATS SaRA ScalableShampoo ScheduleFreeAdamW ScheduleFreeRAdam
        ScheduleFreeSGD Shampoo SignSGD SimplifiedAdEMAMix StableAdamW StableSPAM TAM Tiger VSGD
        Yogi""",
    "timm.optim": """
        AdaBelief Adadelta Adafactor AdafactorBigVision Adagrad Adam AdamP AdamW AdamWLegacy Adamax
        Adan Adopt LaProp Lamb Lars Lion MADGRAD Mars Muon NAdam NAdamLegacy NAdamW NvNovoGrad RAdam
        RAdamLegacy RMSprop RMSpropTF SGD SGDP SGDW""",
    "heavyball": """
        ADOPT AdEMAMix AdamC AdamW HeavyKLShampoo HyperBallAdamW KLShampoo LATHER LaProp LaPropOrtho
        MSAMLaProp Muon MuonAdamW MuonLaProp NAdam OrthoLaProp PSGDKron PSGDLRA PSGDPRO QSGD RMSprop
        SFAdamW SGD SUDSAdamW Scion SignLaProp UnscaledAdamW""",
    "bitsandbytes.optim": """
        AdEMAMix AdEMAMix8bit Adagrad Adagrad8bit Adam Adam8bit AdamW AdamW8bit LAMB LAMB8bit Lion
        Lion8bit PagedAdEMAMix PagedAdam PagedAdamW PagedLion RMSprop RMSprop8bit""",
    "dadaptation": "DAdaptAdaGrad DAdaptAdam DAdaptAdan DAdaptLion DAdaptSGD",
    "prodigyopt": "Prodigy",
    "lion_pytorch": "Lion",
    "schedulefree": "AdamWScheduleFree RAdamScheduleFree SGDScheduleFree",
}
SINGLE = ("heavyball", "bitsandbytes.optim")  # these know no float64


def module(package: str) -> Any:
    found = pytest.importorskip(package, reason=f"needs {package.split('.')[0]}")
    if package == "heavyball":
        importlib.import_module("heavyball.utils").compile_mode = None  # or each takes minutes
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("package", "name"), [(package, name) for package in NAMES for name in NAMES[package].split()]
)
def test_wrapped_is_bare(package: str, name: str) -> None:
    kind, single = getattr(module(package), name), package in SINGLE
    if single:
        torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model, data = Model(), samples(32)
    twin = copy.deepcopy(model)
    opt = ModalityDecoupledOptimizer(kind(model.parameters(), lr=1e-3))
    opt.train()
    torch.manual_seed(1)  # some draw at random
    for batch in DataLoader(data, batch_size=8):
        opt.step(model(**batch))
    bare = kind(twin.parameters(), lr=1e-3)
    getattr(bare, "train", lambda: None)()
    torch.manual_seed(1)
    by_hand(twin, data, [bare])
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 if single else 1e-10)
