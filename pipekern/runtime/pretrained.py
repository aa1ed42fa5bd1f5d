"""A model of Hugging Face transformers, written by its own ``save_pretrained``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import nn

from pipekern.checkpoint.agree import together
from pipekern.checkpoint.load import Checkpoint
from pipekern.checkpoint.save import save as save_shards
from pipekern.errors import ConfigError
from pipekern.runtime.assembly import Assembly
from pipekern.runtime.names import Names
from pipekern.runtime.saving import Folder, gather_of, shards_of, sources


def refuse_foreign(root: nn.Module) -> None:
    """Raise ``ConfigError`` for a model that ``save_pretrained`` is not for."""
    if not hasattr(getattr(root, "config", None), "save_pretrained") or not hasattr(root, "save_pretrained"):
        raise ConfigError(
            f"save_pretrained of a {type(root).__name__}, which has no config with a save_pretrained of its own; that "
            "is for models of Hugging Face transformers: use save"
        )


def save_pretrained(parts: Assembly, folder: Folder) -> None:
    """See ``Pipeline.save_pretrained``."""
    root: Any = parts.blueprint.root
    rank, gather = parts.star.number, gather_of(parts.star)
    names, staging = Names.of(parts.blueprint), Path(folder) / ".weights"

    def write() -> None:
        checkpoint = Checkpoint(staging)
        tensors = {name: checkpoint.tensor(f"model/{name}") for name in names.unit}
        state = {name: tensors[names.first[name]] for name in parts.blueprint.state}
        root.save_pretrained(folder, state_dict=state)

    files = sources(parts, names, None)
    try:
        save_shards(staging, shards_of(files), dict, rank=rank, gather=gather)
        together(lambda: write() if rank == 0 else None, gather)
    finally:
        if rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
