"""What goes around erasures, noticed where it happens: on the networks themselves, whatever pipeline uses them.

A text-side erasure acts while a prompt is encoded. Embeddings that were made elsewhere, pictures that enter through
the VAE, an IP-Adapter or a ControlNet bring a concept along without ever passing it. Guards on the denoiser, the VAE
and the components' `save_pretrained` are shared by every pipeline that shares those networks. What only the arguments
of a call show (other words for one text encoder, a negative prompt) is looked for there.
"""

from __future__ import annotations

from erasure.guards.calls import Way, calling, check_arguments, check_call, way_of, ways_around
from erasure.guards.encodings import admitted, is_admitted, unguarded
from erasure.guards.networks import install, share_gates
from erasure.guards.said import CONTROL, REFUSABLE, Refusable, is_strict, lock_of
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
