"""Files of a run: its settings, its checkpoint and its models."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from . import checkpoint, distributed
from .data import SegmentationData
from .errors import TrainingError, diverged
from .recipe import Recipe
from .state import TrainingState


def has_run(path: Path, resume: bool) -> bool:
    """True if there is a run in the folder, on any rank, which will be resumed.

    If there is none although ``resume`` is true, rank 0 says so on standard error.

    Raises:
        TrainingError: the folder contains a run and ``resume`` is false.
    """
    has_checkpoint, log = (path / "last.pt").exists(), path / "log.jsonl"
    has_files = has_checkpoint or log.exists() and log.stat().st_size > 0
    if distributed.any_process(not resume and has_files):
        raise TrainingError(
            f"{path}: there is a run in that folder (expected resume, or another output)"
        )
    has_checkpoint = distributed.any_process(has_checkpoint)
    if resume and not has_checkpoint and distributed.rank() == 0:
        tqdm.write(f"{path}: no run to resume (no last.pt), so this starts one", file=sys.stderr)
    return has_checkpoint


class RunFolder:
    """Output folder of a run. Only rank 0 writes, and all ranks call the methods.

    Args:
        path: the folder, which all ranks share.
        settings: architecture, classes, number of images and recipe, which must not change when a
            run is resumed; see :func:`resume_settings`.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.checkpoint = path / "last.pt"

    def start_or_resume(self, state: TrainingState, seed: int) -> None:
        """Seed the random generators, and restore the checkpoint if there is one.

        Raises:
            TrainingError: the checkpoint is damaged or belongs to another run, or not all ranks see
                the same folder.
        """
        torch.manual_seed(seed + distributed.rank())
        if self.checkpoint.exists():
            self._restore(state)
        if len(set(distributed.gather(state.step))) > 1:
            raise TrainingError(
                f"{self.checkpoint}: not there for all processes (expected a folder that they "
                "share)"
            )

    def _restore(self, state: TrainingState) -> None:
        saved = checkpoint.load(self.checkpoint, self.settings)
        state.load_state_dict(saved)
        # If the number of processes changed, dropout cannot continue its random numbers, and keeps
        # the new seed.
        if len(saved["random"]) == distributed.world_size():
            checkpoint.set_random_state(saved["random"][distributed.rank()], state.device)

    def create(self, recipe: Recipe) -> None:
        """Make the folder, remove half-written files of a killed run, and write config.json."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for partial in self.path.glob(".*.partial"):
                partial.unlink()
        except OSError as error:
            raise TrainingError(f"{self.path}: {error.strerror} (expected a folder)") from error
        processes = distributed.world_size()
        config = {**self.settings, "recipe": asdict(recipe), "processes": processes}
        checkpoint.write(self.path / "config.json", json.dumps(config, indent=2).encode() + b"\n")

    def save(self, state: TrainingState) -> None:
        """Write the checkpoint.

        Raises:
            TrainingError: a weight is not finite, or the file cannot be written.
        """
        weights = state.model.state_dict().values()
        if not torch.stack([weight.isfinite().all() for weight in weights]).all():
            raise diverged("a weight is not finite", state.step, self.path)
        random = distributed.gather(checkpoint.random_state(state.device))
        content = {**self.settings, **state.state_dict(), "random": random}
        distributed.on_rank_zero(lambda: checkpoint.save(self.checkpoint, content))

    def save_model(self, state: TrainingState, name: str) -> None:
        """Write the model, or its moving average, for ``from_pretrained``."""
        path = self.path / name

        def write() -> None:
            try:
                state.result.save_pretrained(path)
            except (OSError, SafetensorError) as error:
                raise checkpoint.cannot_write(path, error) from error

        distributed.on_rank_zero(write)


def resume_settings(model: Any, data: SegmentationData, recipe: Recipe) -> dict[str, Any]:
    """Settings that must not change when a run is resumed, in JSON types.

    ``grad_accum_steps``, which only saves memory, is left out, and ``epochs`` is None if the
    learning rate does not depend on it.
    """
    values = json.loads(json.dumps(asdict(recipe)))
    del values["grad_accum_steps"]
    if recipe.power == 0:
        values["epochs"] = None
    return {
        "architecture": {
            "model": type(model).__name__,
            **model.config,
            "num_classes": model.classifier[-1].out_channels,
            "aux_loss": model.aux_classifier is not None,
        },
        "classes": list(data.classes),
        "images": len(data),
        "recipe": values,
    }
