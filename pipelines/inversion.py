"""Schedulers of object removal: the one of the paper's code, and DDIM forwards and backwards for an inversion.

Also the timesteps at which a denoiser is evaluated to find things in a picture.
"""

from __future__ import annotations

from diffusers import DDIMInverseScheduler, DDIMScheduler
from torch import Tensor

from erasure.backbones import Backbone
from erasure.backbones.parametrisation import Flow
from erasure.errors import UnsupportedModelError
from erasure.interop.protocols import Denoiser, Scheduler

PREDICTIONS = ("epsilon", "v_prediction", "sample")
"""Prediction types for which DDIM can run backwards."""


class Inverter(DDIMInverseScheduler):
    """DDIM inversion inside of an inpainting loop, which noises the surroundings: here it adds no noise."""

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the samples unchanged."""
        return original_samples


def released(own: Scheduler) -> DDIMScheduler:
    """Make the scheduler of the paper's code: DDIM on Stable Diffusion's noise levels, steps without an offset."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, prediction_type=own.config.get("prediction_type", "epsilon"),
    )  # fmt: skip


def forwards(own: Scheduler) -> DDIMScheduler:
    """Make DDIM on a scheduler's noise levels, without clipping, which inversion could not undo."""
    return DDIMScheduler.from_config(
        own.config, clip_sample=False, thresholding=False, timestep_spacing=_spacing(own)
    )  # fmt: skip


def backwards(own: Scheduler) -> Inverter:
    """Make the inverse of `forwards`."""
    return Inverter.from_config(own.config, clip_sample=False, timestep_spacing=_spacing(own))


def _spacing(own: Scheduler) -> str:
    """Choose how DDIM spaces the steps; diffusers cannot go backwards over `linspace`."""
    spacing = own.config.get("timestep_spacing", "leading")
    return spacing if spacing in ("leading", "trailing") else "leading"


def noise_levels(backbone: Backbone, steps: int, share: float, what: str) -> Tensor:
    """Give the last timesteps of a schedule (DDIM's, or a flow's own sampler's), noisiest first, `(levels,)`.

    Args:
        backbone: Backbone of the model.
        steps: Number of steps of the whole schedule.
        share: Share of the steps to give, 0 to 1; at least one step.
        what: Purpose, for messages.

    Raises:
        UnsupportedModelError: See `check_levels`.
    """
    if isinstance(backbone.parametrisation, Flow):
        levels = backbone.timesteps(steps)
    else:
        own = backbone.pipe.scheduler
        check_levels(own, what)
        sampler = forwards(own)
        sampler.set_timesteps(steps)
        levels = sampler.timesteps
    return levels[-max(1, int(steps * share)) :]


def check_ddim(denoiser: Denoiser, own: Scheduler, what: str) -> None:
    """Refuse a model that DDIM does not sample.

    Args:
        denoiser: The denoiser.
        own: The pipeline's scheduler.
        what: Setting that needs DDIM, for the message.

    Raises:
        UnsupportedModelError: The scheduler has no noise levels of its own, or the UNet is distilled for a sampler.
    """
    check_levels(own, what)
    if denoiser.config.get("time_cond_proj_dim") is not None:
        raise UnsupportedModelError(
            f"{what} samples with DDIM, and a latent consistency UNet (time_cond_proj_dim="
            f"{denoiser.config.time_cond_proj_dim}) is made for the LCM sampler: leave {what} out"
        )


def check_levels(own: Scheduler, what: str) -> None:
    """Refuse a scheduler whose noise levels DDIM does not have; see `check_ddim`."""
    prediction = own.config.get("prediction_type", "epsilon")
    flows = any(own.config.get(name) for name in ("use_flow_sigmas", "shift"))
    if not hasattr(own, "alphas_cumprod") or prediction not in PREDICTIONS or flows:
        raise UnsupportedModelError(
            f"{what} goes by DDIM's noise levels, and {type(own).__name__} ({prediction}) has others; leave {what} "
            "out, or set pipe.scheduler to one of the DDPM family where the model was trained with it to predict "
            f"{', '.join(PREDICTIONS)}"
        )
