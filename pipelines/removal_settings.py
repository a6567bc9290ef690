"""Settings of Attentive Eraser (Sun et al. 2025, arXiv 2412.12974) and their presets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le

from erasure.errors import OptionError
from erasure.options import Count, CountOrZero, NotNegative, Options, Presets, ZeroToOne

Sampler = Literal["blended", "inversion"]
Layers = Literal["decoder", "all"]
Factor = Annotated[float, Ge(0), Le(10)]
"""A factor of FreeU."""
_released: dict[str, object] = {
    "released_scheduler": True, "blend_radius": 0.0, "sample_latents": True, "mask_blur": 13,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RemovalSettings(Options):
    """Settings of object removal. The defaults are those of the paper's code, with the pipeline's own scheduler.

    The preset `joint` is for Stable Diffusion 3 and Flux.

    The presets `official-*` are those of the paper's code (Anonym0u3/AttentiveEraser at 0b7881d): of its batch script
    `inference/SIP.py` with `AAS/data.py` for SD 2.1, the same with the notebook's FreeU for SD 1.5, and of `main.py`
    for SDXL. The paper's text does not mention FreeU. Presets do not include what the scripts do around the method:
    they resize pictures and masks to 512 x 512 (SDXL: 1024 x 1024), use float16 weights and seed 123, and the batch
    script writes a second picture with the source blended in (`blend_radius=15`). The notebooks grow masks by a
    Gaussian of 7 pixels instead of 13.
    """

    name: ClassVar[str] = "object removal"
    presets: ClassVar[Presets] = {
        "default": {},
        "joint": {"removal_guidance_scale": 2.0},
        "official-sd15": {**_released, "free_u": (0.9, 0.2, 1.5, 1.6)},
        "official-sd21": {**_released, "free_u": (0.9, 0.2, 1.4, 1.6)},
        "official-sdxl": {**_released, "mask_blur": 77},
    }

    num_inference_steps: Count = 50
    """Number of steps of the schedule, of which the last share `strength` is run."""
    strength: Annotated[float, Gt(0), Le(1)] = 0.8
    """Share of the steps that is run, 0 to 1, which sets the initial noise."""
    removal_guidance_scale: NotNegative = 9.0
    """Scale s of SARG. 1 takes the redirected prediction itself, and needs one branch less."""
    redirect: bool = True
    """Redirect attention; when off, this is inpainting with blended latents."""
    suppression_scale: NotNegative = 0.3
    """Factor of the queries under the mask while similarity is suppressed."""
    suppression_share: ZeroToOne = 0.25
    """Share of the executed steps, 0 to 1, with similarity suppression (the paper's code: 10 of 40)."""
    log_weight: Annotated[float, Ge(-1000), Le(0)] | None = None
    """Logarithm of the factor of attention to the masked part, instead of removing that attention: AdaEraser's soft
    form, `log eta`. Removed when left out."""
    layers: Layers = "decoder"
    """Layers whose attention is redirected. With `decoder`, the layers before it run once for both branches; in a
    transformer, which has no decoder, its later half is used."""
    mask_blur: CountOrZero = 7
    """Side in pixels of the Gaussian that grows the mask, odd or 0, see `erasure.masks.grow`."""
    sampler: Sampler = "blended"
    """How surroundings are kept: `blended` restores noised surroundings after every step; `inversion` restores
    those of a DDIM inversion of the image, which is deterministic and needs a second run."""
    blend_radius: NotNegative | None = None
    """Radius in pixels over which the source's pixels are blended in around the mask at the end. When left out: 15
    for an image of 512, as in the paper's figures. 0 keeps the VAE's decoded surroundings."""
    shadow: bool = False
    """Remove the shadows of removed things too, where they are darker versions of the background's colours; see
    `erasure.pipelines.shadows`."""
    crop: bool = False
    """Work on crops around the mask at the model's size, and paste them back, for images that are larger than that.
    Pixels away from the mask do not change; see `erasure.pipelines.crops.plan_crops`."""
    crop_context: Annotated[float, Ge(0.1), Le(10)] = 0.5
    """Surroundings of a crop on every side of the removed part, as a share of its longer extent; more where the
    model's size has room."""
    shared_trunk: bool | None = None
    """Run the layers before the decoder once for both branches; wherever possible when left out."""
    released_scheduler: bool = False
    """Sample with the DDIM scheduler of the paper's code, whose steps have no offset."""
    sample_latents: bool = False
    """Sample the image's latents from the VAE's posterior with the call's generator, before the noise, as the
    paper's code does; when off, use the posterior's mode, which is deterministic."""
    free_u: tuple[Factor, Factor, Factor, Factor] | None = None
    """Factors s1, s2, b1 and b2 of FreeU as the paper's code registers it, see `erasure.pipelines.free_u`."""

    @property
    def executed(self) -> int:
        """Number of steps that are run, as diffusers counts them."""
        return min(int(self.num_inference_steps * self.strength), self.num_inference_steps)

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        super().__post_init__()
        if self.executed < 1:
            self.refuse(
                "strength", self.strength,
                f"at least 1 / num_inference_steps ({1 / self.num_inference_steps:.3g}), so that one step is left: a "
                "model of one step needs strength=1",
            )  # fmt: skip
        if self.mask_blur and self.mask_blur % 2 == 0:
            self.refuse("mask_blur", self.mask_blur, "0, or an odd number: the middle of the Gaussian is a pixel")


PRESETS = {name: RemovalSettings.configured(name) for name in RemovalSettings.presets}
"""Settings by name of their preset, see `RemovalSettings`."""


def chosen(preset: str, options: dict[str, Any]) -> tuple[RemovalSettings, dict[str, Any]]:
    """Give the settings of a preset with single ones changed, and the options that are not settings.

    Raises:
        OptionError: The preset is unknown, or a setting is invalid.
    """
    own, rest = RemovalSettings.divide(options)
    if not isinstance(preset, str):
        raise OptionError(f"preset is {preset!r}; there are: {', '.join(PRESETS)}")
    return RemovalSettings.configured(preset, **own), rest
