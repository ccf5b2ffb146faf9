"""The log of training steps: one line each in ``log.jsonl``, and TensorBoard where that is installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from craft_fast.store.run import Run, read_log


class StepLog:
    """Writes each step once. As a context it has TensorBoard open.

    Steps that a killed process had logged after its last checkpoint are done again, bit-identically, and not logged
    again; steps that a checkpoint knows and the log lost are logged from the checkpoint.

    Args:
        run: the open run.
        key: the train stage's key.
        losses: of the steps done, None where one was skipped; grows with them.
        grad_norms: likewise.
        rate: learning rate of the step after so many steps.
    """

    def __init__(
        self,
        run: Run,
        key: str,
        losses: Sequence[float | None],
        grad_norms: Sequence[float | None],
        rate: Callable[[int], float],
    ) -> None:
        self.run, self.key, self.losses, self.grad_norms, self.rate = run, key[:16], losses, grad_norms, rate
        self.logged = {
            e.get("step") for e in read_log(run) if e.get("event") == "train_step" and e.get("key") == self.key
        }
        self.board: Any = None
        for step in range(1, len(losses) + 1):
            self.write(step)

    def write(self, step: int) -> None:
        """Log a step, counted from 1."""
        loss, grad_norm, rate = self.losses[step - 1], self.grad_norms[step - 1], self.rate(step - 1)
        if step not in self.logged:
            self.run.log("train_step", key=self.key, step=step, loss=loss, grad_norm=grad_norm, learning_rate=rate)
            self.logged.add(step)
        if self.board is not None and loss is not None:
            for name, value in (("loss", loss), ("grad_norm", grad_norm), ("learning_rate", rate)):
                self.board.add_scalar(f"train/{name}", value, step)

    def __enter__(self) -> None:
        self.board = _tensorboard(self.run, purge_step=len(self.losses) + 1)

    def __exit__(self, *_: object) -> None:
        if self.board is not None:
            self.board.close()


def _tensorboard(run: Run, *, purge_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run.path("tensorboard")), purge_step=purge_step)
