"""Guards that notice bypasses of erasures on the networks themselves, whatever pipeline uses them.

An erasure of text encoders acts while a prompt is encoded. Embeddings from elsewhere, pictures that are encoded by the
VAE, an IP-Adapter or a ControlNet can bring a concept in without it. Guards on the denoiser, the VAE and the
components' `save_pretrained` apply to every pipeline that shares these networks. Bypasses that only the arguments of a
call show (different words for one text encoder, a negative prompt) are checked in the call.
"""

from __future__ import annotations

from erasure.guards.calls import Way, calling, check_arguments, check_call, way_of, ways_around
from erasure.guards.encodings import admitted, is_admitted, unguarded
from erasure.guards.messages import CONTROL, REFUSABLE, Refusable, is_strict, lock_of
from erasure.guards.networks import install, share_gates
from erasure.guards.saving import check_saveable

__all__ = [
    "CONTROL",
    "REFUSABLE",
    "Refusable",
    "Way",
    "admitted",
    "calling",
    "check_arguments",
    "check_call",
    "check_saveable",
    "install",
    "is_admitted",
    "is_strict",
    "lock_of",
    "share_gates",
    "unguarded",
    "way_of",
    "ways_around",
]
