"""Triton kernels of pipekern: ``from pipekern.kernels.rms_norm import rms_norm``; one op a file, of its name.

Without a GPU, and without Triton, the ops run on the CPU. Nothing is imported here, so that this needs not even torch.
"""
