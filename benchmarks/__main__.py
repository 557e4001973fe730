"""Lists the benchmarks: ``python -m benchmarks``."""

import importlib

BENCHMARKS = ("sentiment", "brats", "speed", "regimes")

if __name__ == "__main__":
    for name in BENCHMARKS:
        about = (importlib.import_module(f"benchmarks.{name}").__doc__ or "").splitlines()[0]
        print(f"python -m benchmarks.{name:<10} {about}")
