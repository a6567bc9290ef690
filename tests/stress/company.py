"""The machine with what diffusers does to a pipeline in between: adapters, casts, offloading, copies, saving."""

from __future__ import annotations

import copy
import pickle
import re
import shutil
import warnings
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import strategies as st

import erasure
from erasure import ErasureManager
from erasure.errors import AttachError, ErasureError
from erasure.pipelines import StableDiffusionErasurePipeline

from .looks import hook_names
from .machine import Erasing, names, step
from .model import draw, encode, tensors_of


def is_plain(machine: Erasing) -> bool:
    """Whether the pipeline is as it was loaded but for erasures."""
    return len(machine.casts) == 1 and not (
        machine.adapters or machine.merged or machine.rounded or machine.qkv or machine.ip or machine.offloaded
        or machine.learned or machine.sliced or machine.freeu
    )  # fmt: skip


FUSED = re.compile(r"\.to_(qkv|kv|added_qkv)\.")


class InCompany(Erasing):
    """Erasures, and diffusers' own calls."""

    # Proof and making ---------------------------------------------------------------------------------------------

    @step()
    def detect(self) -> None:
        known = [e for e in self.model.attached.values() if e.kind == "itd"]
        if not known:
            with pytest.raises(AttachError):
                self.pipe.detect_concepts("a cat")
            return
        assert len(self.pipe.detect_concepts(["a cat", ""])) == 2

    @step(is_plain)
    def make_another(self) -> None:
        """What is in force does not matter to an erasure that is made."""
        if any(entry.fused for entry in self.model.attached.values()):
            with pytest.raises(ErasureError):
                erasure.erase(self.pipe, "dog", "uce", vocabulary=0, saved_as="lora", attach=False, progress=False)
            return
        made = erasure.erase(self.pipe, "dog", "uce", vocabulary=0, saved_as="lora", attach=False, progress=False)
        wanted = self.kit.erasures["uce"].edits.low_rank
        assert all(
            torch.equal(a, b) for key in wanted for a, b in zip(wanted[key], made.edits.low_rank[key], strict=True)
        )

    # Calls in flight ----------------------------------------------------------------------------------------------

    @step(lambda m: m.casts[-1] == torch.float32 and m.model.attached)
    def switch_in_a_callback(self) -> None:
        calls, refused = self.switches(), []

        def callback(pipe: Any, index: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
            for name in sorted(calls):
                with pytest.raises(ErasureError) as caught:
                    calls[name][0]()
                refused.append(caught.type)
            return {}

        draw(self.pipe, callback_on_step_end=callback, **self.settings())
        assert len(refused) == len(calls)
        assert self.qkv or set(refused) == {AttachError}

    @step(lambda m: m.model.attached and not m.qkv)
    def switch_in_use(self) -> None:
        calls = self.switches()
        with self.manager.in_use():
            for name in sorted(calls):
                with pytest.raises(AttachError):
                    calls[name][0]()

    # Copies -------------------------------------------------------------------------------------------------------

    @step(lambda m: not m.offloaded)
    def from_pipe(self) -> None:
        self.pipe = StableDiffusionErasurePipeline.from_pipe(self.pipe)
        self.pipe.set_progress_bar_config(disable=True)

    @step(lambda m: not m.offloaded)
    def rebuilt(self) -> None:
        self.pipe = StableDiffusionErasurePipeline(**self.pipe.components, requires_safety_checker=False)
        self.pipe.set_progress_bar_config(disable=True)

    @step(lambda m: not m.offloaded)
    def shallow_copy(self) -> None:
        self.pipe = copy.copy(self.pipe)
        self.pipe.scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)

    @step(lambda m: not m.offloaded, changed=st.booleans())
    def deep_copy(self, changed: bool) -> None:
        """The copy goes on; what happens to the other does not matter to it."""
        other, self.pipe = self.pipe, copy.deepcopy(self.pipe)
        if changed and not (self.qkv or self.merged):
            manager = ErasureManager(other)
            manager.unfuse()
            manager.unload()

    @step(lambda m: not (m.offloaded or m.has_been_pickled))
    def pickled(self) -> None:
        """Either refused or the same; once for a pipeline, because it takes as long as ten other steps."""
        self.has_been_pickled = True
        try:
            content = pickle.dumps(self.pipe)
        except (ErasureError, TypeError, AttributeError, pickle.PicklingError):
            return
        self.pipe = pickle.loads(content)

    # The model ----------------------------------------------------------------------------------------------------

    @step(
        lambda m: len(m.casts) < 4 and not (m.adapters or m.merged or m.rounded or m.offloaded or m.qkv),
        dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    )
    def cast(self, dtype: torch.dtype) -> None:
        if dtype == self.casts[-1]:
            return
        self.pipe.to(dtype)
        self.casts.append(dtype)

    @step(lambda m: len(m.casts) == 1)
    def move(self) -> None:
        if not self.offloaded:
            self.pipe.to("cpu")

    @step()
    def offload(self) -> None:
        if self.offloaded:
            self.pipe.remove_all_hooks()
        else:
            self.pipe.enable_model_cpu_offload(device="cpu")
        self.offloaded = not self.offloaded

    @step()
    def free_u(self) -> None:
        if self.freeu:
            self.pipe.disable_freeu()
        else:
            self.pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
        self.freeu = not self.freeu

    @step(lambda m: not (m.ip or m.qkv))
    def slice_attention(self) -> None:
        if self.sliced:
            self.pipe.disable_attention_slicing()
        else:
            self.pipe.enable_attention_slicing(1)
        self.sliced = not self.sliced

    @step(lambda m: not (m.ip or m.sliced or m.adapters or m.offloaded or len(m.casts) > 1))
    def fuse_projections(self) -> None:
        if self.qkv:
            self.pipe.unet.unfuse_qkv_projections()  # the pipeline's own only knows what this very object fused
        else:
            self.pipe.fuse_qkv_projections(vae=False)
        self.qkv = not self.qkv

    @step(lambda m: not (m.sliced or m.qkv or m.offloaded or len(m.casts) > 1))
    def ip_adapter(self) -> None:
        if self.ip:
            self.pipe.unload_ip_adapter()
        else:
            type(self).add_ip(self.pipe)
        self.ip = not self.ip

    @step(lambda m: not (m.learned or m.offloaded or len(m.casts) > 1 or m.adapters))
    def textual_inversion(self) -> None:
        vectors = torch.full((2, 32), 0.1)
        self.pipe.load_textual_inversion(vectors, token="<thing>")
        self.learned = True

    # A user's LoRA ------------------------------------------------------------------------------------------------

    def weigh(self) -> None:
        self.pipe.set_adapters(list(self.adapters), list(self.adapters.values()))

    @step(
        lambda m: len(m.casts) == 1 and not (m.merged or m.qkv or m.offloaded or m.learned),
        name=st.sampled_from(("mine", "yours")), scale=st.sampled_from((1.0, 0.5)),
    )  # fmt: skip
    def load_lora(self, name: str, scale: float) -> None:
        if name not in self.adapters:
            self.pipe.load_lora_weights(self.loras[name][0], adapter_name=name)
        self.adapters[name] = scale
        self.weigh()

    @step(lambda m: m.adapters and not m.merged, name=names, scale=st.sampled_from((0.3, 1.0)))
    def set_adapters(self, name: str, scale: float) -> None:
        self.adapters[sorted(self.adapters)[NAMES_INDEX[name] % len(self.adapters)]] = scale
        self.weigh()

    @step(lambda m: m.adapters and not m.merged)
    def fuse_lora(self) -> None:
        self.pipe.fuse_lora()
        for name, scale in self.adapters.items():
            for key, delta in self.loras[name][1].items():
                self.merged[key] = self.merged.get(key, 0.0) + scale * delta

    @step(lambda m: m.merged)
    def unfuse_lora(self) -> None:
        self.pipe.unfuse_lora()
        self.merged = {}

    @step(lambda m: m.adapters and not m.merged and not m.offloaded)
    def unload_lora(self) -> None:
        self.pipe.unload_lora_weights()
        self.adapters = {}

    @step(lambda m: len(m.adapters) > 1 and not m.merged and not m.offloaded, name=st.sampled_from(("mine", "yours")))
    def delete_adapters(self, name: str) -> None:
        self.pipe.delete_adapters(name)
        del self.adapters[name]
        self.weigh()

    # Saving -------------------------------------------------------------------------------------------------------

    @step(
        lambda m: (
            len(m.casts) == 1
            and not (m.ip or m.learned or m.merged or m.qkv or m.offloaded)
            and (m.model.attached or not m.adapters)
        )
    )
    def save_pretrained(self) -> None:
        """Written whole or refused; what becomes of a LoRA without any erasure is diffusers' own matter."""
        folder = self.folders / "saved"
        try:
            self.pipe.save_pretrained(folder)
        except ErasureError:
            assert self.model.beyond_weights() or self.adapters, "plain weights can be saved"
            assert not folder.exists(), "a refusal wrote files"
            return
        try:
            assert not self.model.beyond_weights(), "hooks were left out without a word"
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                again = tensors_of(StableDiffusionPipeline.from_pretrained(folder))
            assert not [key for key, tensor in again.items() if tensor.is_meta], "weights were lost on the way"
            # diffusers leaves projections that were fused once on the module, and no loader reads them.
            mine = {key: value for key, value in tensors_of(self.pipe).items() if not FUSED.search(key)}
            assert all(torch.equal(tensor, again[key]) for key, tensor in mine.items())
        finally:
            shutil.rmtree(folder)

    @step(lambda m: is_plain(m) and m.model.verifies(), fuse=st.booleans())
    def save_erased(self, fuse: bool) -> None:
        """Saved and loaded; the loaded one goes on where it holds the erasures as files."""
        folder, fused = self.folders / "erased", [n for n, e in self.model.attached.items() if e.fused]
        before = encode(self.pipe)
        try:
            if (fuse and self.model.beyond_weights()) or (not fuse and fused):
                with pytest.raises(AttachError):
                    self.pipe.save_erased_pipeline(folder, fuse=fuse)
                assert not folder.exists(), "a refusal wrote files"
                return
            self.pipe.save_erased_pipeline(folder, fuse=fuse)
            if fuse:
                again = StableDiffusionPipeline.from_pretrained(folder)
                assert all(torch.equal(t, tensors_of(again)[key]) for key, t in tensors_of(self.pipe).items())
                return
            again = StableDiffusionErasurePipeline.load_erased_pipeline(folder)
            again.set_progress_bar_config(disable=True)
            assert torch.equal(encode(again), before)
            self.pipe = again
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def teardown(self) -> None:
        """After any sequence, everything taken off gives the base bit for bit."""
        if self.qkv:
            self.fuse_projections_off()
        if self.merged:
            self.unfuse_lora()
            self.weights_are_right()
        self.pipe.unfuse_erasure()
        self.pipe.unload_erasures()
        self.model.attached, self.model.enabled = {}, True
        self.weights_are_right()
        self.lists_are_right()
        assert not [hook for hook in hook_names(self.pipe) if "erasure" in hook]

    def fuse_projections_off(self) -> None:
        """Take fused projections apart again."""
        self.pipe.unet.unfuse_qkv_projections()
        self.qkv = False


NAMES_INDEX = {name: index for index, name in enumerate("abcd")}
