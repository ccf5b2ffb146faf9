"""The five linear layers that LAION's aesthetic predictor and ImageReward end in."""

from __future__ import annotations

from torch import Tensor, nn


class ScoreHead(nn.Module):
    """Five linear layers with dropouts and no activations, as LAION's and ImageReward's heads are.

    Args:
        width: D, size of the embedding.
        hidden: sizes of the four inner layers; the published heads use (1024, 128, 64, 16).
    """

    def __init__(self, width: int, hidden: tuple[int, int, int, int] = (1024, 128, 64, 16)) -> None:
        super().__init__()
        first, second, third, fourth = hidden
        self.layers = nn.Sequential(
            nn.Linear(width, first),
            nn.Dropout(0.2),
            nn.Linear(first, second),
            nn.Dropout(0.2),
            nn.Linear(second, third),
            nn.Dropout(0.1),
            nn.Linear(third, fourth),
            nn.Linear(fourth, 1),
        )

    def forward(self, embedding: Tensor) -> Tensor:
        """Embedding [B, D] to score [B]."""
        score: Tensor = self.layers(embedding).squeeze(-1)
        return score
