"""Weights & Biases as a further place for a run's numbers: `log.wandb`. It is imported only then."""

from __future__ import annotations

import importlib
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from hope.train.sink import Background, Sink

PROJECT = "hope"
ID = "wandb_id"
"""File in the run folder: a resumed run continues its curve."""


def wandb_sink(folder: Path, config: Mapping[str, Any], *, resumed: bool, say: Callable[[str], object]) -> Background:
    """Starts a run of wandb under the folder's name, in the background. Key, server and project come from WANDB_*."""

    def start() -> Sink:
        wandb = importlib.import_module("wandb")
        known = folder / ID
        if not resumed or not known.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            known.write_text(uuid.uuid4().hex[:12] + "\n")
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            id=known.read_text().strip(),
            resume="allow",
            dir=str(folder),
            config=dict(config),
        )
        return cast(Sink, run)

    return Background(start, "wandb", say)
