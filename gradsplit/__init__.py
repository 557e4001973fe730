"""Gradient-guided modality decoupling for any torch optimizer.

>>> from gradsplit import ModalityDecoupledOptimizer, modality_combinations, CombinationSampler
"""

from gradsplit import rules, sharing
from gradsplit.balance import LossBalance
from gradsplit.combinations import CombinationSampler, modality_combinations
from gradsplit.decoupling import Decoupling
from gradsplit.optimizer import ModalityDecoupledOptimizer

__version__ = "0.1.0"
__all__ = [
    "CombinationSampler",
    "Decoupling",
    "LossBalance",
    "ModalityDecoupledOptimizer",
    "modality_combinations",
    "rules",
    "sharing",
]
