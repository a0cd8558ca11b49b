"""A training in Lightning: ``Trainer(..., callbacks=[TrainingCallback(training)])``."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback

from pycompress.train import Training


class TrainingCallback(Callback):
    """Steps a training behind each step of the optimizer; Lightning saves and loads its state with its checkpoints.

    Args:
        training: of the model that the Trainer trains, with one optimizer.
    """

    def __init__(self, training: Training) -> None:
        self.training = training

    def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        """Behind the optimizer's step; with accumulated gradients it makes none for some batches."""
        while self.training.done < trainer.global_step:
            self.training.step()

    def state_dict(self) -> dict[str, Any]:
        return self.training.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.training.load_state_dict(state_dict)
