"""pipekern: pipeline parallel training of PyTorch models."""

from pipekern._version import __version__

__all__ = ["__version__"]
