"""Triton kernels of pipekern, imported as ``pipekern.kernels``; one op a file."""
