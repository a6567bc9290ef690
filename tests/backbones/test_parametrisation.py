"""What denoisers predict, against closed forms in float64 and against diffusers' schedulers."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from erasure.backbones.parametrisation import PREDICTIONS, Epsilon, Flow, Parametrisation, Sample, V

T = torch.tensor([0, 250, 499, 998])
CUMULATIVE = torch.linspace(0.9995, 0.005, 1000, dtype=torch.float64)


def drawn() -> tuple[Tensor, Tensor]:
    """Clean latents and noise, `(4, 2, 3, 5)` float64."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(4, 2, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    return first, second


@pytest.mark.parametrize("kind", [Epsilon, V, Sample])
def test_noise_that_preserves_variance_is_that_of_the_closed_form(kind: type[Epsilon]) -> None:
    way, (clean, noise) = kind(CUMULATIVE), drawn()
    x_t, target = way.noised(clean, noise, T), way.target(clean, noise, T)
    for row, level in enumerate(T.tolist()):
        kept = CUMULATIVE[level].item()
        signal, spread = math.sqrt(kept), math.sqrt(1 - kept)
        x, e = clean[row], noise[row]
        wanted = {"epsilon": e, "v_prediction": signal * e - spread * x, "sample": x}[way.name]
        torch.testing.assert_close(x_t[row], signal * x + spread * e, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(target[row], wanted, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(way.clean(target, x_t, T), clean, rtol=1e-12, atol=1e-12)


def test_flow_is_a_straight_line_from_the_sample_to_the_noise() -> None:
    way, (clean, noise) = Flow(), drawn()
    t = torch.tensor([0.0, 250.5, 500.0, 1000.0], dtype=torch.float64)
    x_t, velocity = way.noised(clean, noise, t), way.target(clean, noise, t)
    for row, level in enumerate(t.tolist()):
        share = level / 1000
        torch.testing.assert_close(x_t[row], (1 - share) * clean[row] + share * noise[row], rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(velocity, noise - clean, rtol=0, atol=0)
    torch.testing.assert_close(way.clean(velocity, x_t, t), clean, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("way", [*(kind(CUMULATIVE.float()) for kind in PREDICTIONS.values()), Flow()])
def test_half_precision_comes_out_as_it_went_in(way: Parametrisation) -> None:
    clean, noise = (part.bfloat16() for part in drawn())
    # Levels of which bfloat16 knows no difference: 997 and 999 are both 1000 there.
    t = torch.tensor([1, 250, 997, 999])
    assert way.noised(clean, noise, t).dtype == way.target(clean, noise, t).dtype == torch.bfloat16
    exact = way.noised(clean.double(), noise.double(), t)
    torch.testing.assert_close(way.noised(clean, noise, t).double(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["epsilon", "v_prediction", "sample"])
def test_it_is_what_the_schedulers_of_diffusers_do(name: str) -> None:
    scheduler, (clean, noise) = DDPMScheduler(prediction_type=name), drawn()
    way = PREDICTIONS[name](scheduler.alphas_cumprod)
    clean, noise = clean.float(), noise.float()
    torch.testing.assert_close(way.noised(clean, noise, T), scheduler.add_noise(clean, noise, T))
    if name == "v_prediction":
        torch.testing.assert_close(way.target(clean, noise, T), scheduler.get_velocity(clean, noise, T))


def test_flow_is_what_its_scheduler_does() -> None:
    scheduler, (clean, noise) = FlowMatchEulerDiscreteScheduler(shift=3.0), drawn()
    clean, noise, way = clean.float(), noise.float(), Flow()
    scheduler.set_timesteps(8)
    for index, t in enumerate(scheduler.timesteps):
        x_t = scheduler.scale_noise(clean, t[None], noise)
        torch.testing.assert_close(way.noised(clean, noise, t.expand(4)), x_t, rtol=1e-5, atol=1e-5)
        # One Euler step down to nothing arrives at the clean latent.
        share = scheduler.sigmas[index]
        velocity = way.target(clean, noise, t.expand(4))
        torch.testing.assert_close(way.clean(velocity, x_t, t.expand(4)), x_t - share * velocity, rtol=1e-5, atol=1e-5)
