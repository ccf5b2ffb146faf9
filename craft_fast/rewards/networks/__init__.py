"""The network families of the published reward models, at any size, over transformers' own classes.

Shapes: B batch, S image side in pixels, T tokens, P image tokens, D embedding.
Every family has three verbs, so that one caller serves all: ``encode_text`` once per prompt, ``score_encoded`` for
pictures against texts encoded before, ``forward`` for both. Weights are in the dtype they were read in, scores float32.
"""

from craft_fast.rewards.networks.aesthetic import AestheticReward
from craft_fast.rewards.networks.clip import ClipReward
from craft_fast.rewards.networks.head import ScoreHead
from craft_fast.rewards.networks.image_reward import ImageReward
from craft_fast.rewards.networks.mps import MpsReward

__all__ = ["AestheticReward", "ClipReward", "ImageReward", "MpsReward", "ScoreHead"]
