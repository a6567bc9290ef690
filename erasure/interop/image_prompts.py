"""IP-Adapters of UNets: their files, encoding of pictures, and temporary use in a network.

diffusers loads an adapter permanently into a pipeline: every call must then pass pictures, and unloading replaces
former attention processors by default ones. Here only the cross-attention's processors are changed, temporarily, and
calls without pictures run the former processors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from erasure import files
from erasure.errors import OptionError, UnsupportedModelError, WrongBaseError
from erasure.files import TensorInfo
from erasure.interop import paths
from erasure.interop.protocols import Denoiser

ENCODER = "image_encoder"
"""Folder of the image encoder beside an adapter's file, as diffusers has it."""
PARTS = ("image_proj", "ip_adapter")
"""Prefixes of the names of an adapter's tensors."""
PROJECTION = {f"image_proj.{layer}.{part}" for layer in ("proj", "norm") for part in ("weight", "bias")}
"""Tensors that make tokens of a picture's embedding."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
BATCH = 16
"""Number of pictures that are encoded at once."""


@dataclass(frozen=True)
class ImagePrompts:
    """An IP-Adapter: its encoding of pictures, and its attention processors."""

    path: Path
    """File from which it was read."""
    processors: Mapping[str, IPAdapterAttnProcessor2_0]
    """Attention processors, by path of the cross-attention layer."""
    projection: ImageProjection
    """Projects the image encoder's embeddings to tokens `(pictures, tokens, width)`."""
    encoder: CLIPVisionModelWithProjection
    extractor: CLIPImageProcessor

    @property
    def width(self) -> int:
        """Width of the image encoder's embedding."""
        return int(self.encoder.config.projection_dim)

    @torch.no_grad()
    def embeddings(self, images: Sequence[Image.Image]) -> Tensor:
        """Encode pictures by the image encoder, `(pictures, width)` on the CPU."""
        found = []
        for first in range(0, len(images), BATCH):
            pixels = self.extractor(list(images[first : first + BATCH]), return_tensors="pt").pixel_values
            found.append(self.encoder(pixels.to(self.encoder.device, self.encoder.dtype)).image_embeds.cpu())
        return torch.cat(found)

    @torch.no_grad()
    def tokens(self, embeddings: Tensor) -> Tensor:
        """Project embeddings to tokens, `(pictures, tokens, width)`."""
        made: Tensor = self.projection(embeddings.to(self.projection.norm.weight.device))
        return made

    @contextmanager
    def listening(self, denoiser: nn.Module) -> Iterator[None]:
        """Let calls of a denoiser pass pictures inside of the block, see `showing`; restore it afterwards."""
        network = paths.uncompiled(denoiser)
        with ExitStack() as stack:
            for path, processor in self.processors.items():
                attention = cast(Attention, network.get_submodule(path))
                stack.callback(attention.set_processor, attention.processor)
                attention.set_processor(TextOrBoth(attention.processor, processor))
            yield


class TextOrBoth:
    """A cross-attention processor that uses pictures only in calls that pass them.

    It is not a module, so that the adapter's tensors are not parameters of the network.

    Args:
        text: Former processor.
        both: Processor of the adapter.
    """

    def __init__(self, text: object, both: IPAdapterAttnProcessor2_0) -> None:
        self.text, self.both = text, both

    def __call__(
        self, attn: Attention, hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple[Tensor, list[Tensor]] | None = None,
        attention_mask: Tensor | None = None, temb: Tensor | None = None, **options: object,
    ) -> Tensor:  # fmt: skip
        """Run the adapter's processor for tokens of words and of pictures, and the other for words alone."""
        chosen = self.both if isinstance(encoder_hidden_states, tuple) else self.text
        made: Tensor = chosen(  # type: ignore[operator]
            attn, hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask, temb=temb,
            **options,
        )  # fmt: skip
        return made


@contextmanager
def showing(denoiser: nn.Module, tokens: Tensor) -> Iterator[None]:
    """Pass pictures' tokens, in addition to text, to every call of a denoiser inside of the block.

    Args:
        denoiser: Denoiser inside of `ImagePrompts.listening`.
        tokens: Tokens of one picture for each row of a call, `(rows, tokens, width)`.
    """

    def add(
        _denoiser: nn.Module, args: tuple[object, ...], named: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        words = named["encoder_hidden_states"]
        assert isinstance(words, Tensor)
        # One adapter with one picture.
        return args, {**named, "encoder_hidden_states": (words, [tokens.to(words)[:, None]])}

    handle = denoiser.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def refined(tokens: Tensor, words: Tensor) -> Tensor:
    r"""Replace pictures' tokens by mixtures of words' tokens: $\mathrm{softmax}(Q K^\top / \sqrt{d})\, V$.

    Q are the pictures' tokens, and both K and V those of the words (Li et al. 2025, text-guided refinement).

    Args:
        tokens: Tokens of pictures, `(pictures, tokens, width)`.
        words: Tokens of words, `(words, width)`.
    """
    queries, keys = tokens.float(), words.float()
    share = torch.softmax(queries @ keys.T / keys.shape[-1] ** 0.5, dim=-1)
    return (share @ keys).to(tokens.dtype)


# Files ---------------------------------------------------------------------------------------------------------------


def opened(path: Path, encoder: Path | None, denoiser: Denoiser) -> ImagePrompts:
    """Load an IP-Adapter for a denoiser, which stays as it is.

    Args:
        path: Its file, or a folder with one such file.
        encoder: Folder of the image encoder; `image_encoder` beside the file when left out.
        denoiser: A UNet.

    Raises:
        ArtifactError: The file is damaged.
        OptionError: There is no such file, or there are several; it holds something else, or an adapter of another
            kind; or there is no image encoder.
        UnsupportedModelError: The pipeline has an IP-Adapter of its own in force.
        WrongBaseError: The adapter was made for another network, or for another image encoder.
    """
    network = cast(Denoiser, paths.uncompiled(denoiser))
    # Its loader notes the kind of projection where only attributes of a config are looked at.
    if getattr(network, "encoder_hid_proj", None) is not None:
        raise UnsupportedModelError(
            "the pipeline has an IP-Adapter loaded, and its UNet predicts nothing without pictures for that: call "
            "pipe.unload_ip_adapter() first"
        )
    file, layers = found_file(path), cross_attention(network)
    tensors = files.read_tensors(file, check=lambda infos: check_fit(file, infos, layers))
    tower, extractor = image_encoder(file.parent / ENCODER if encoder is None else encoder)
    image_width, given = tensors["image_proj.proj.weight"].shape[1], tower.config.projection_dim
    if image_width != given:
        raise WrongBaseError(
            f"the IP-Adapter {file} reads {image_width} values of a picture, and its image encoder gives {given}: "
            "name the image encoder that it was trained with"
        )
    device, dtype = next(network.parameters()).device, network.dtype
    width = len(tensors["image_proj.norm.weight"])
    projection = ImageProjection(image_width, width, len(tensors["image_proj.proj.weight"]) // width)
    renamed = {"image_embeds": "proj", "norm": "norm"}
    projection.load_state_dict(
        {
            f"{ours}.{part}": tensors[f"image_proj.{theirs}.{part}"]
            for ours, theirs in renamed.items()
            for part in ("weight", "bias")
        }
    )
    processors = {}
    for index, (name, layer) in enumerate(layers):
        numbered = {part: tensors[f"ip_adapter.{2 * index + 1}.{part}.weight"] for part in ("to_k_ip", "to_v_ip")}
        made = IPAdapterAttnProcessor2_0(
            layer.inner_dim, width, num_tokens=(projection.num_image_text_embeds,), scale=1.0
        )
        made.load_state_dict({f"{part}.0.weight": tensor for part, tensor in numbered.items()})
        processors[name] = made.to(device, dtype).requires_grad_(False)
    for module in (projection, tower):
        module.to(device, dtype).eval().requires_grad_(False)
    return ImagePrompts(file, processors, projection, tower, extractor)


def found_file(path: Path) -> Path:
    """Find the file of an IP-Adapter: the path itself, or the only file in a folder or its subfolder `models`.

    Raises:
        OptionError: There is none, there are several, or it is a pickle.
    """
    if path.suffix in PICKLES:
        raise OptionError(f"{path} is a pickle, which is never read: name the same IP-Adapter as .safetensors")
    if path.is_file():
        return path
    held = [file for folder in (path, path / "models") for file in sorted(folder.glob("*.safetensors"))]
    if len(held) == 1:
        return held[0]
    if not path.exists():
        raise OptionError(f"{path} is no IP-Adapter: there is no such file or folder; check the path")
    what = f"several: {', '.join(file.name for file in held[:5])}" if held else "none"
    raise OptionError(f"{path} is no IP-Adapter: of files *.safetensors it holds {what}; name one")


def image_encoder(folder: Path) -> tuple[CLIPVisionModelWithProjection, CLIPImageProcessor]:
    """Load an image encoder and its processor; CLIP's own where the folder has none.

    Raises:
        OptionError: The folder holds none.
    """
    try:
        tower = CLIPVisionModelWithProjection.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        if (folder / "preprocessor_config.json").is_file():
            return tower, CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as reason:  # transformers raises both for folders that hold something else
        raise OptionError(
            f"{folder} holds no image encoder (a CLIPVisionModelWithProjection as .safetensors), without which "
            f"nothing is known of pictures: name the folder of the one that the IP-Adapter was trained with"
        ) from reason
    side = tower.config.image_size
    return tower, CLIPImageProcessor(size=side, crop_size=side)


def cross_attention(network: Denoiser) -> list[tuple[str, Attention]]:
    """List paths and layers of a UNet's cross-attention, in the order of adapters' numbers."""
    every = cast(Mapping[str, object], network.attn_processors)
    names = [name.removesuffix(".processor") for name in every if name.endswith("attn2.processor")]
    return [(name, cast(Attention, network.get_submodule(name))) for name in names]


def check_fit(file: Path, infos: Mapping[str, TensorInfo], layers: Sequence[tuple[str, Attention]]) -> None:
    """Refuse a file that is no IP-Adapter, or one for other layers.

    Raises:
        OptionError: It is something else, or of a kind that cannot be used.
        WrongBaseError: It is for another network.
    """
    if stranger := next((name for name in infos if name.partition(".")[0] not in PARTS), None):
        raise OptionError(
            f"{file} is no IP-Adapter in diffusers' format: it holds {files.shown(stranger)}, expected names that "
            f"begin with {' or '.join(f'{part}.' for part in PARTS)}"
        )
    if {name for name in infos if name.startswith(PARTS[0])} != PROJECTION or any("lora" in name for name in infos):
        raise OptionError(
            f"{file} is no IP-Adapter of the plain kind, which projects an embedding of the whole picture: those of "
            "faces and of patches get what other networks say; name a plain one"
        )
    width = layers[0][1].cross_attention_dim if layers else 0
    wanted = {
        f"ip_adapter.{2 * index + 1}.{part}_ip.weight": (layer.inner_dim, layer.cross_attention_dim)
        for index, (_, layer) in enumerate(layers)
        for part in ("to_k", "to_v")
    }
    found = {name: info.shape for name, info in infos.items() if name.startswith(PARTS[1])}
    norm, weight = (infos[f"image_proj.{name}"].shape for name in ("norm.weight", "proj.weight"))
    if norm != (width,) or len(weight) != 2 or not weight[0] or weight[0] % width or found != wanted:
        differing = next((name for name in (*wanted, *found) if found.get(name) != wanted.get(name)), None)
        what = f"{list(weight)} for tokens of width {list(norm)}, expected tokens of width {width}"
        if norm == (width,) and differing is not None:
            what = f"{differing} is {found.get(differing, 'not there')}, expected {wanted.get(differing, 'none')}"
        raise WrongBaseError(
            f"the IP-Adapter {file} was made for another model ({what}): name one for models of this family and size"
        )
