"""Requirements of strategies on a model. Lists of strategies read this module, so it does not import torch."""

from __future__ import annotations

from typing import Literal

Need = Literal["entry layers", "word states", "trajectories", "image prompts", "one step", "cross-attention"]
"""A requirement of a strategy on a model:

- `entry layers`: linear layers whose input is the text encoders' output itself.
- `word states`: a text encoder whose states the denoiser reads token by token.
- `trajectories`: a denoiser that is sampled in many small steps from noise to an image.
- `image prompts`: cross-attention to which an IP-Adapter can add keys and values of pictures.
- `cross-attention`: attention whose keys and values depend on the text encoders' output only.
- `one step`: variance-preserving noise, so that an image can be predicted in one step from a chosen timestep.
"""
