"""How objects are removed: the settings of Attentive Eraser (Sun et al. 2025, arXiv 2412.12974) and their presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

from erasure.errors import OptionError
from erasure.interop.protocols import Settings
from erasure.pipelines.free_u import FreeU

Sampler = Literal["blended", "inversion"]
Layers = Literal["decoder", "all"]


@dataclass(frozen=True, kw_only=True)
class RemovalSettings:
    """How objects are removed. The defaults are those of the paper's code, on the pipeline's own scheduler."""

    num_inference_steps: int = 50
    """Steps of the schedule, of which the last `strength` are run."""
    strength: float = 0.8
    """Share of the steps that are run: where the surroundings begin to be denoised."""
    removal_guidance_scale: float = 9.0
    """s of SARG. 1 takes the redirected prediction as it is, and costs one branch less."""
    redirect: bool = True
    """Whether attention is redirected; without, this is inpainting with blended latents."""
    suppression_scale: float = 0.3
    """What the queries under the mask are multiplied by while similarity is suppressed."""
    suppression_share: float = 0.25
    """For this share of the executed steps (the code: 10 of 40)."""
    log_weight: float | None = None
    """Attention to what the mask covers is multiplied by the exponential of this, instead of being cut off altogether:
    AdaEraser's soft form, `log eta`."""
    layers: Layers = "decoder"
    """Self-attention that is redirected. With `decoder`, what runs ahead of it runs once for both branches."""
    mask_blur: int = 7
    """Side in pixels of the Gaussian that grows the mask, see `erasure.masks.grow`."""
    sampler: Sampler = "blended"
    """`blended` puts noised surroundings back after every step; `inversion` those of a DDIM inversion of the image,
    which is deterministic and costs a run more."""
    blend_radius: float | None = None
    """Pixels over which the source's own pixels are blended in around the mask at the end: when left out, 15 on an
    image of 512, as in the paper's figures; 0 leaves the surroundings as the VAE decodes them."""
    shared_trunk: bool | None = None
    """Run what is ahead of the decoder once; where it is possible when left out."""
    released_scheduler: bool = False
    """Sample with the DDIM scheduler of the paper's code, whose steps have no offset."""
    sample_latents: bool = False
    """Draw the image's latents from the VAE's posterior with the call's generator, ahead of the noise, as the paper's
    code does; otherwise they are the likeliest ones, which do not depend on a draw."""
    free_u: FreeU | None = None
    """FreeU as the paper's code registers it, see `erasure.pipelines.free_u`."""

    @property
    def executed(self) -> int:
        """Steps that are run, as diffusers counts them."""
        return min(int(self.num_inference_steps * self.strength), self.num_inference_steps)

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.num_inference_steps < 1 or not 0 < self.strength <= 1:
            raise OptionError(
                f"num_inference_steps is at least 1 and strength above 0, at most 1; got {self.num_inference_steps} "
                f"and {self.strength}"
            )
        for name, allowed in (("sampler", Sampler), ("layers", Layers)):
            if getattr(self, name) not in get_args(allowed):
                raise OptionError(f"{name} is one of {', '.join(get_args(allowed))}; got {getattr(self, name)!r}")


_released = RemovalSettings(released_scheduler=True, blend_radius=0.0, sample_latents=True, mask_blur=13)
PRESETS: dict[str, RemovalSettings] = {
    "default": RemovalSettings(),
    "official-sd15": dataclasses.replace(_released, free_u=FreeU(s1=0.9, s2=0.2, b1=1.5, b2=1.6)),
    "official-sd21": dataclasses.replace(_released, free_u=FreeU(s1=0.9, s2=0.2, b1=1.4, b2=1.6)),
    "official-sdxl": dataclasses.replace(_released, mask_blur=77),
}
"""Settings by name. `official-*` are those of the paper's code (Anonym0u3/AttentiveEraser at 0b7881d): of its batch
script `inference/SIP.py` with `AAS/data.py` for SD 2.1, the same with the notebook's FreeU for SD 1.5, and of `main.py`
for SDXL. The paper's text does not mention FreeU. What its callers do is not part of a preset: pictures and masks are
resized to 512 x 512 first (SDXL: 1024 x 1024), weights are in float16, the seed is 123, and the batch script writes a
second picture with the source blended in (`blend_radius=15`). The notebooks grow masks with 7 pixels in place of 13."""


def chosen(preset: str, options: Settings) -> tuple[RemovalSettings, Settings]:
    """The settings of a preset with single ones changed, and the options that are none of them.

    Raises:
        OptionError: Unknown preset, or a setting without meaning.
    """
    if preset not in PRESETS:
        raise OptionError(f"no preset {preset!r} of object removal; there are: {', '.join(PRESETS)}")
    known = {field.name for field in dataclasses.fields(RemovalSettings)}
    changed = {name: value for name, value in options.items() if name in known}
    rest = {name: value for name, value in options.items() if name not in known}
    return dataclasses.replace(PRESETS[preset], **changed), rest
