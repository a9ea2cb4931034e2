"""whorl: T1 and T2 maps from spiral MR Fingerprinting, made while the scan arrives.

The data's way through the package is that of the method's figure: `pipeline.reconstruct_scan`
reads as a list of its steps.
"""

__version__ = "0.1.0"
