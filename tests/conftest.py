"""Hypothesis profiles: ``pytest --hypothesis-profile=thorough`` searches longer."""

import os

import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # Triton reads this when it is first imported: without a GPU its kernels are interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The tensors are small: two threads would wait for each other longer than they compute.
torch.set_num_threads(1)

_SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large]

settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=_SLOW_IS_FINE,
)
settings.register_profile(
    "thorough", deadline=None, max_examples=2000, suppress_health_check=_SLOW_IS_FINE
)
settings.load_profile("default")
