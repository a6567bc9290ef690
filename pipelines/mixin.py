"""The erasure methods of every drop-in pipeline, named after diffusers' LoRA methods."""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from erasure import api, assets, guards, locking
from erasure.artifact import Erasure
from erasure.attach import ErasureManager
from erasure.backbones import Backbone, backbone_for
from erasure.baked import leave_trace
from erasure.concept import Concept
from erasure.errors import ArtifactError, AttachError, UnsupportedModelError
from erasure.files import at_home, inside, new_folder, read_json, write_json
from erasure.files.recognise import MODEL_FILE
from erasure.fitting import check_strength
from erasure.guards import Refusable
from erasure.interop import scopes
from erasure.learning.concepts import LearnedConcepts, loaded, unload
from erasure.learning.making import Picture, learn_concepts
from erasure.locking import AuditLog, Looks
from erasure.proof import LEAST_STRENGTH
from erasure.sae.detection import Detection, detect_concepts

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

ERASURES_FOLDER, BASE_FOLDER = "erasures", "base"
ATTACHED_FILE = f"{ERASURES_FOLDER}/attached.json"
"""File with the names and strengths of the erasures of a pipeline saved with `fuse=False`."""


def parts_left_out(folder: Path) -> dict[str, None]:
    """Find components that a saved pipeline lacks, such as SD3's T5, which stock loaders must be told.

    Args:
        folder: Folder of a pipeline; the result is empty for any other folder.

    Raises:
        ArtifactError: Its `model_index.json` is damaged.
    """
    index = folder / MODEL_FILE
    said: dict[str, object] = read_json(index, dict[str, object]) if index.is_file() else {}
    return {name: None for name, value in said.items() if value == [None, None]}


HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
"""Options of `from_pretrained` for downloads."""

Method = TypeVar("Method", bound=Callable[..., object])


def base_of(model: str | Path) -> str:
    """Give the folder of the stock pipeline's files, which is a subfolder where erasures are saved beside the base."""
    base = Path(model) / BASE_FOLDER
    return str(base) if (Path(model) / ERASURES_FOLDER).is_dir() and base.is_dir() else str(model)


def read_attached(folder: Path) -> dict[str, tuple[Erasure, float]]:
    """Read the erasures of a pipeline saved with `fuse=False`, and their strengths, by name.

    Raises:
        ArtifactError: There are no erasures, a file is missing or damaged, or a name leads out of the folder.
        AttachError: A strength is not a valid factor.
    """
    listed = folder / ATTACHED_FILE
    if not listed.is_file():
        raise ArtifactError(f"{folder} has no {ATTACHED_FILE}: it was not saved with fuse=False, or not to its end")
    strengths: dict[str, float] = read_json(listed, dict[str, float])
    if not strengths:
        raise ArtifactError(f"{listed} names no erasure: the file is damaged; save the folder again")
    return {
        name: (Erasure.read(inside(folder / ERASURES_FOLDER, name)), check_strength(strength))
        for name, strength in strengths.items()
    }


def check_kind(kind: type[DiffusionPipeline], model: str | Path, options: Mapping[str, object]) -> None:
    """Refuse the files of another family, which a drop-in class might load without some components.

    Args:
        kind: The drop-in class.
        model: A folder or a repository of the Hub.
        options: Options of `from_pretrained`.

    Raises:
        UnsupportedModelError: The files are of a class with another drop-in class.
    """
    from erasure.pipelines import PIPELINES

    try:
        config = kind.load_config(model, **{name: options[name] for name in HUB_OPTIONS if name in options})
    except (OSError, ValueError):
        return  # The stock method reports what is wrong with the files.
    named, drop_ins = config.get("_class_name", ""), PIPELINES["text-to-image"]
    fits = any(issubclass(kind, each[named]) for each in PIPELINES.values() if named in each)
    if named in drop_ins and not fits:
        raise UnsupportedModelError(
            f"{str(model)!r} is a {named}, which {kind.__name__} is not for: use {drop_ins[named].__name__}, or "
            "erasure.load_pipeline, which finds the class"
        )


def in_one_state(method: Method) -> Method:
    """Decorate a method of a pipeline: erasures are not switched while it runs."""

    @functools.wraps(method)
    def leased(self: DiffusionPipeline, *args: object, **kwargs: object) -> object:
        with ErasureManager(self).in_use():
            return method(self, *args, **kwargs)

    return cast(Method, leased)


class SharedModulesMixin:
    """Mixin for a stock pipeline class that shares modules with other pipelines, also in other threads.

    `from_pipe` keeps the precision of shared components. A switch of erasures waits until calls have ended, so a call
    sees one state of the erasures. Saved files name the stock class, so that every loader can read them.
    """

    def __init_subclass__(cls, **options: object) -> None:
        """Wrap the stock class's call with a lease, and keep its signature."""
        super().__init_subclass__(**options)
        stock = next((vars(kind)["__call__"] for kind in cls.__mro__ if "__call__" in vars(kind)), None)
        if stock is not None and not hasattr(stock, "_leased"):

            @functools.wraps(stock)
            def leased(self: DiffusionPipeline, *args: object, **kwargs: object) -> object:
                with ErasureManager(self).in_use():
                    named = inspect.signature(stock).bind_partial(self, *args, **kwargs).arguments
                    # Arguments are passed by name, also those that an overriding call passes on to the stock call.
                    with locking.calling(self, {**kwargs, **named}) as settled:
                        with guards.calling():
                            result = stock(self, *args, **kwargs)
                        return settled(result)

            leased._leased = True  # type: ignore[attr-defined]
            cls.__call__ = leased  # type: ignore[method-assign]

    @property
    def _backbone(self) -> Backbone:
        """Backbone of the pipeline."""
        return backbone_for(cast("DiffusionPipeline", self))

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **options: object) -> Self:
        """Make a pipeline from another one's components, without the stock method's conversion of both to float32."""
        if not {"dtype", "torch_dtype"} & set(options):
            options["dtype"] = pipeline.dtype
        with scopes.same_gradient_mode():
            return super().from_pipe(pipeline, **options)  # type: ignore[misc]

    def to_json_string(self) -> str:
        """Give the config for `model_index.json`, under the stock class's name, so that every loader finds it."""
        stock = next(kind.__name__ for kind in type(self).__mro__ if kind.__module__.startswith("diffusers."))
        config = json.loads(super().to_json_string())  # type: ignore[misc]
        config["_class_name"] = stock
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


class ErasureMixin(SharedModulesMixin):
    """Mixin for a stock pipeline class that adds the erasure methods."""

    name_or_path: str
    """Folder or repository from which the pipeline was loaded, set by the stock class."""

    @property
    def erasure_manager(self) -> ErasureManager:
        """The manager behind the methods below."""
        pipe: DiffusionPipeline = self
        return ErasureManager(pipe)

    def erase(
        self, concepts: str | Concept | Sequence[str | Concept], strategy: str | None = None, **options: object
    ) -> Erasure:
        """Make an erasure and attach it; see `erasure.erase`."""
        return api.erase(self, concepts, strategy, **options)  # type: ignore[arg-type]

    def learn_concepts(
        self, images: Picture | Sequence[Picture], tokens: str | Sequence[str], **options: Any
    ) -> LearnedConcepts:
        """Learn new tokens for the contents of pictures; see `erasure.learn_concepts`."""
        return learn_concepts(self.erasure_manager.pipe, images, tokens, **options)

    def load_concepts(self, source: str | Path | LearnedConcepts) -> LearnedConcepts:
        """Load learned concepts from a folder or from memory, before any erasure is attached.

        Raises:
            ArtifactError: The folder is missing or damaged.
            AttachError: An erasure is attached.
            ConceptError: One of their tokens is known to the pipeline already.
            WrongBaseError: The concepts were learned with another model.
        """
        concepts = source if isinstance(source, LearnedConcepts) else LearnedConcepts.read(source)
        concepts.load_into(self.erasure_manager.pipe)
        return concepts

    def list_concepts(self) -> list[str]:
        """List the tokens of the loaded concepts."""
        return [token for concepts in loaded(self.erasure_manager.pipe) for token in concepts.tokens]

    def unload_concepts(self) -> None:
        """Remove all learned concepts; the model is then as before, bit for bit."""
        unload(self.erasure_manager.pipe)

    def load_erasure(self, source: str | Path | Erasure, name: str | None = None, **options: Any) -> Erasure:
        """Attach an erasure from a folder, a Hub repository or memory, in addition to those already attached."""
        return self.erasure_manager.load(source, name, **options)

    def save_erasure(self, folder: str | Path, name: str | None = None, *, overwrite: bool = False) -> Path:
        """Write an attached erasure to a folder; `name` may be left out when there is just one.

        Raises:
            AttachError: The name is unknown, or is missing although several erasures are attached.
            ArtifactError: The folder is not empty or cannot be written.
        """
        attached = self.erasure_manager.erasures
        if name is None and len(attached) != 1:
            raise AttachError(
                f"{len(attached)} erasures are attached ({', '.join(attached) or 'none'}): say which with name="
            )
        chosen = name if name is not None else next(iter(attached))
        if chosen not in attached:
            raise AttachError(f"no erasure named {chosen!r} is attached; attached: {', '.join(attached) or 'none'}")
        return attached[chosen].save(folder, overwrite=overwrite)

    def set_erasures(self, names: str | Sequence[str], strengths: float | Sequence[float] | None = None) -> None:
        """Put exactly these erasures in force, at the given strengths (default 1)."""
        self.erasure_manager.set_erasures(names, strengths)

    def active_erasures(self) -> list[str]:
        """Names of the erasures in force."""
        return self.erasure_manager.active_erasures()

    def list_erasures(self) -> dict[str, list[str]]:
        """Names of all attached erasures by component."""
        return self.erasure_manager.list_erasures()

    def disable_erasures(self) -> None:
        """Switch all erasures off that are not fused."""
        self.erasure_manager.disable()

    def enable_erasures(self) -> None:
        """Undo `disable_erasures`."""
        self.erasure_manager.enable()

    def delete_erasure(self, names: str | Sequence[str]) -> None:
        """Remove erasures; parameters that only they edit are then the base's, bit for bit."""
        self.erasure_manager.delete(names)

    def unload_erasures(self) -> None:
        """Remove all erasures that are not fused; the model is then the base bit for bit."""
        self.erasure_manager.unload()

    def fuse_erasure(self, names: str | Sequence[str] | None = None) -> None:
        """Make erasures part of the model, so that switching and unloading do not remove them."""
        self.erasure_manager.fuse(names)

    def unfuse_erasure(self, names: str | Sequence[str] | None = None) -> None:
        """Undo `fuse_erasure`."""
        self.erasure_manager.unfuse(names)

    @property
    def fused_erasures(self) -> list[str]:
        """Names of the fused erasures."""
        return self.erasure_manager.fused_erasures

    def verify_erasures(self, *, least_strength: float = LEAST_STRENGTH) -> int:
        """Raise `VerificationError` unless every attached erasure is in force.

        Returns the number of compared tensors; see `ErasureManager.verify`.
        """
        return self.erasure_manager.verify(least_strength=least_strength)

    def lock_erasures(
        self,
        *,
        refuse: Collection[Refusable] = (),
        prompts: bool = False,
        pictures: Looks | None = None,
        audit: AuditLog | str | Path | None = None,
        share: float = locking.SHARE,
    ) -> str:
        """Lock the pipeline for untrusted callers: it refuses calls that bypass its erasures, and switching them.

        Refused are embeddings, different texts for different text encoders, skipped blocks (`clip_skip`), prompts of
        another length, negative prompts that name an erased concept, a LoRA on edited layers, changed or replaced
        components, every switch of erasures, and pipelines of other classes that share its networks. Before every call
        the erasures are verified to be in force.

        Args:
            refuse: What is refused in addition: `image_prompts` (IP-Adapter, reference images), `pictures` (initial
                images), `controls` of a ControlNet, `noise` (`latents=`), `schedulers` (another one, or custom
                timesteps or sigmas), `loras` (every LoRA).
            prompts: Refuse prompts in which the gates of an erasure find its concept (`itd`, `spm`).
            pictures: Function that checks every generated picture; one that it flags or cannot judge is not returned.
                To use a detector, pass `functools.partial(erasure.eval.detectors.ask, detector)`.
            audit: Log of every call, or the path of one; see `erasure.locking.AuditLog`.
            share: Share of the sampling time, 0 to 1, that complete verifications may take.

        Returns:
            The key for `unlock_erasures`.

        Raises:
            AttachError: No erasure is in force, or `prompts` is set and none has gates.
            VerificationError: An erasure is not in force.
            LockedError: The pipeline is locked already, or has a LoRA that the lock refuses.
            OptionError: A name in `refuse` is unknown.
            ArtifactError: The audit log cannot be written, or its hash chain is broken.
            UnsupportedModelError: The weights are offloaded in a way that they cannot be compared.
        """
        return locking.lock(
            self.erasure_manager.pipe, refuse=refuse, prompts=prompts, pictures=pictures, audit=audit, share=share
        )

    def unlock_erasures(self, key: str) -> None:
        """Unlock the pipeline.

        Args:
            key: Key from `lock_erasures`.

        Raises:
            LockedError: The key is wrong, or the pipeline is not locked.
        """
        locking.unlock(self.erasure_manager.pipe, key)

    def detect_concepts(self, prompts: str | Sequence[str]) -> list[dict[str, Detection]]:
        """Detect the concepts of attached feature erasures in prompts; see `erasure.detect_concepts`."""
        return detect_concepts(self.erasure_manager.pipe, prompts)

    def save_erased_pipeline(self, folder: str | Path, *, fuse: bool = True) -> Path:
        """Write a whole pipeline that stays erased.

        Args:
            folder: Folder to write to, which must be empty or not exist.
            fuse: `True` writes the erasures into the weights, so that stock diffusers loads the erased model;
                `erased.json` and a model card in the folder list the erasures. `False` writes the base and the
                erasures side by side (`erasures/NAME/`), to be loaded by `load_erased_pipeline`.
        """
        folder = at_home(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ArtifactError(f"{folder} is not empty: choose another folder")
        manager = self.erasure_manager
        with manager.in_use():
            manager.verify()
            manager.check_saveable(beyond_weights=not fuse)
            if not fuse and manager.fused_erasures:
                raise AttachError(
                    f"{manager.fused_erasures[0]!r} is fused: unfuse_erasure() first, or save with fuse=True"
                )
            with new_folder(folder) as temporary:
                if fuse:
                    manager.pipe.save_pretrained(temporary)
                else:
                    # The base is not written beside model_index.json, because a stock loader would take it for the
                    # whole pipeline.
                    manager.stock().save_pretrained(temporary / BASE_FOLDER)
                    for name, erasure in manager.erasures.items():
                        erasure.save(temporary / ERASURES_FOLDER / name)
                    write_json(temporary / ATTACHED_FILE, manager.strengths)
                    assets.copy_facts(self.name_or_path, temporary / BASE_FOLDER)
                assets.copy_facts(self.name_or_path, temporary)
        return folder

    def save_pretrained(self, save_directory: str | Path, *args: object, **options: object) -> None:
        """Save as the stock method does, and refuse, before the first file, erasures that stock files cannot contain.

        `erased.json` and a model card beside the stock files list the erasures in the weights; see `erasure.baked`. A
        copy of an embedded model also gets the model's world file.

        Raises:
            AttachError: An erasure in force is more than plain weights, or a LoRA is loaded at the same time.
        """
        manager = self.erasure_manager
        with manager.in_use():
            manager.check_saveable()
            if not Path(save_directory).is_file():
                leave_trace(manager, save_directory)
            super().save_pretrained(save_directory, *args, **options)  # type: ignore[misc]
            assets.copy_facts(self.name_or_path, save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: object) -> Self:
        """Load as the stock method does; a folder of `save_erased_pipeline(fuse=False)` is loaded with its erasures.

        Raises:
            ArtifactError: A folder of that kind lacks a file.
            UnsupportedModelError: The files are of a family with another drop-in class.
        """
        pretrained_model_name_or_path = os.path.expanduser(pretrained_model_name_or_path)
        folder = Path(pretrained_model_name_or_path)
        if (folder / ERASURES_FOLDER).is_dir() or (folder / ATTACHED_FILE).is_file():
            return cls.load_erased_pipeline(folder, **options)
        check_kind(cls, pretrained_model_name_or_path, options)
        left_out = parts_left_out(folder)
        return super().from_pretrained(pretrained_model_name_or_path, **{**left_out, **options})  # type: ignore[misc]

    @classmethod
    def load_erased_pipeline(cls, folder: str | Path, **options: object) -> Self:
        """Load a folder of `save_erased_pipeline(fuse=False)`, with its erasures attached and verified.

        Args:
            folder: A local folder; nothing is downloaded from the Hub.
            **options: Options of `from_pretrained`.

        Raises:
            ArtifactError: It is another kind of folder, or a file is missing or damaged.
            WrongBaseError: An erasure was made for another model than the saved base.
        """
        folder = at_home(folder)
        attached = read_attached(folder)
        # Folders of earlier versions have the base beside the erasures.
        base = base_of(folder)
        pipe = super().from_pretrained(base, **{**parts_left_out(Path(base)), **options})  # type: ignore[misc]
        for name, (erasure, strength) in attached.items():
            pipe.erasure_manager.add(erasure, name, strength)
        pipe.verify_erasures()
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **options: object) -> Self:
        """Make a pipeline from another one's components, as the stock method does, with the components' erasures."""
        made = super().from_pipe(pipeline, **options)
        made.erasure_manager.adopt()
        locking.share(pipeline, made)
        return made
