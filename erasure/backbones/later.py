"""Families that are not supported yet, and what each of them needs; `docs/families.md` says more."""

from __future__ import annotations

LATER: dict[str, str] = {
    "Flux2": "FLUX.2 reads three layers of one language model, and its single blocks have fused projections",
    "Flux3": "FLUX.3 has no pipeline class of its own in diffusers",
    "QwenImage": "Qwen-Image reads a language model behind a template, with a mask, and rescales what is guided",
    "ZImage": "Z-Image reads a language model, and predicts the negative velocity",
    "Sana": "SANA reads a language model behind a long instruction, with a mask",
    "PixArt": "PixArt reads T5 with a mask, and predicts a spread beside the noise",
    "Lumina": "Lumina reads a language model, and predicts the negative velocity",
    "HiDream": "HiDream reads one layer of a language model in every block, beside two CLIPs and a T5",
    "OvisImage": "Ovis-Image is a Flux that reads a language model",
    "LongCat": "LongCat-Image is a Flux that reads a language model",
    "Bria": "Bria and FIBO are Fluxes that read T5 or a language model, without a pooled vector",
    "AuraFlow": "AuraFlow reads a language model's T5 with a mask",
    "Kolors": "Kolors is an SDXL that reads a language model",
    "Hunyuan": "Hunyuan models read several text encoders with masks",
    "CogView": "CogView reads T5 or a language model",
    "Ideogram": "Ideogram 4 has two denoisers, of which an erasure would change one",
    "Kandinsky": "Kandinsky draws from embeddings of pictures that another network makes of the prompt",
    "StableCascade": "Stable Cascade has two denoisers, one behind the other",
}  # fmt: skip
"""What is known of a family, by how the names of its classes begin."""


def known_of(name: str) -> str:
    """What is known of the family of a class that is not supported yet, as the end of a message; else empty."""
    found = next((what for start, what in LATER.items() if name.startswith(start)), "")
    return f". Not supported yet: {found} (docs/families.md says what it needs)" if found else ""
