"""whorl: T1 and T2 maps from spiral MR Fingerprinting, made while the scan arrives.

The data's way through the package is that of the method's figure: `pipeline.scan.reconstruct_scan`
reads as a list of its steps.
"""

import os

__version__ = "0.1.0"

# OpenMP threads that spin for long while they wait for each other take the core from the very thread
# they wait for as soon as anything else runs on the machine: a fit of the INR then takes ten times as
# long. They shall soon sleep. Must be set before PyTorch and FINUFFT load their OpenMP libraries.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
