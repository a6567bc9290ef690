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
    """Settings of object removal. The defaults are those of the paper's code, on the pipeline's own scheduler.

    The preset `joint` is for Stable Diffusion 3 and Flux.

    The presets `official-*` are those of the paper's code (Anonym0u3/AttentiveEraser at 0b7881d): of its batch script
    `inference/SIP.py` with `AAS/data.py` for SD 2.1, the same with the notebook's FreeU for SD 1.5, and of `main.py`
    for SDXL. The paper's text does not mention FreeU. What its callers do is not part of a preset: pictures and masks
    are resized to 512 x 512 first (SDXL: 1024 x 1024), weights are in float16, the seed is 123, and the batch script
    writes a second picture with the source blended in (`blend_radius=15`). Its notebooks grow masks with 7 pixels in
    place of 13.
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
    """Steps of the schedule, of which the last `strength` are run."""
    strength: Annotated[float, Gt(0), Le(1)] = 0.8
    """Share of the steps that are run: where the surroundings begin to be denoised."""
    removal_guidance_scale: NotNegative = 9.0
    """s of SARG. 1 takes the redirected prediction as it is, and costs one branch less."""
    redirect: bool = True
    """Whether attention is redirected; without, this is inpainting with blended latents."""
    suppression_scale: NotNegative = 0.3
    """Factor of the queries under the mask while similarity is suppressed."""
    suppression_share: ZeroToOne = 0.25
    """For this share of the executed steps (the code: 10 of 40)."""
    log_weight: Annotated[float, Ge(-1000), Le(0)] | None = None
    """Attention to what the mask covers is multiplied by the exponential of this, instead of being cut off altogether:
    AdaEraser's soft form, `log eta`."""
    layers: Layers = "decoder"
    """Attention that is redirected. With `decoder`, what runs ahead of it runs once for both branches; a transformer
    has none, and its later half stands in."""
    mask_blur: CountOrZero = 7
    """Side in pixels of the Gaussian that grows the mask, odd or 0, see `erasure.masks.grow`."""
    sampler: Sampler = "blended"
    """`blended` puts noised surroundings back after every step; `inversion` those of a DDIM inversion of the image,
    which is deterministic and costs a run more."""
    blend_radius: NotNegative | None = None
    """Pixels over which the source's own pixels are blended in around the mask at the end: when left out, 15 on an
    image of 512, as in the paper's figures; 0 leaves the surroundings as the VAE decodes them."""
    shadow: bool = False
    """Take the shadows of what is removed along, as far as they are the background's colours, only darker; see
    `erasure.pipelines.shadows`."""
    crop: bool = False
    """Work on the parts around the mask at the size that the model draws, and paste them back: for images that are
    larger than that. Everything away from the mask stays as it is; see `erasure.pipelines.crops.plan_crops`."""
    crop_context: Annotated[float, Ge(0.1), Le(10)] = 0.5
    """Surroundings that a crop shows on every side of what is removed, as a share of its longer extent; more where the
    model's size allows it."""
    shared_trunk: bool | None = None
    """Run what is ahead of the decoder once; where it is possible when left out."""
    released_scheduler: bool = False
    """Sample with the DDIM scheduler of the paper's code, whose steps have no offset."""
    sample_latents: bool = False
    """Draw the image's latents from the VAE's posterior with the call's generator, ahead of the noise, as the paper's
    code does; otherwise they are the likeliest ones, which do not depend on a draw."""
    free_u: tuple[Factor, Factor, Factor, Factor] | None = None
    """Factors s1, s2, b1 and b2 of FreeU as the paper's code registers it, see `erasure.pipelines.free_u`."""

    @property
    def executed(self) -> int:
        """Steps that are run, as diffusers counts them."""
        return min(int(self.num_inference_steps * self.strength), self.num_inference_steps)

    def __post_init__(self) -> None:
        """Refuse what has no meaning together."""
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
    """The settings of a preset with single ones changed, and the options that are none of them.

    Raises:
        OptionError: Unknown preset, or a setting without meaning.
    """
    own, rest = RemovalSettings.divide(options)
    if not isinstance(preset, str):
        raise OptionError(f"preset is {preset!r}; there are: {', '.join(PRESETS)}")
    return RemovalSettings.configured(preset, **own), rest
