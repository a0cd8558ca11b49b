"""A training in transformers' ``Trainer``: ``Trainer(..., callbacks=[TrainingCallback(training)])``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from pycompress.train import Training

FILE = "pycompress_training.pt"


class TrainingCallback(TrainerCallback):
    """Steps a training behind each step of the optimizer, saves its state beside each checkpoint, and goes on from there.

    Args:
        training: of the model that the Trainer trains, for as many steps as the Trainer makes.
    """

    def __init__(self, training: Training) -> None:
        self.training = training

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Raises ValueError where the Trainer makes another number of steps, or goes on from a checkpoint without the state."""
        if state.max_steps != self.training.steps:
            raise ValueError(
                f"TrainingCallback: the Trainer makes {state.max_steps} steps, the training was prepared for {self.training.steps}"
            )
        if state.global_step > self.training.done:
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE
            if not path.exists():
                raise ValueError(
                    f"TrainingCallback: the Trainer goes on at step {state.global_step}, and there is no {path}"
                )
            self.training.load_state_dict(torch.load(path, weights_only=True))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self.training.step()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            torch.save(self.training.state_dict(), folder / FILE)
