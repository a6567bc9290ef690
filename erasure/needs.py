"""What strategies need of a model, in words that backbones know. Lists of strategies read it, so it has no torch."""

from __future__ import annotations

from typing import Literal

Need = Literal["entry layers", "word states", "trajectories", "image prompts", "one step", "cross-attention"]
"""One thing that a strategy needs of a model:

- `entry layers`: linear layers whose input is what text encoders say, as it is.
- `word states`: a text encoder whose states the denoiser reads token by token.
- `trajectories`: a denoiser that small steps lead from noise to an image.
- `image prompts`: cross-attention that an IP-Adapter can add keys and values of pictures to.
- `cross-attention`: attention whose keys and values are made of what text encoders say, and of nothing else.
- `one step`: noise that preserves variance, so that one step from a level of choice leads to an image.
"""
