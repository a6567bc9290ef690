"""The erasure methods of every drop-in pipeline, named after diffusers' LoRA methods."""

from __future__ import annotations

import functools
import inspect
import json
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
from erasure.files import inside, new_folder, read_json, write_json
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
"""Names and strengths of the erasures beside a pipeline that was saved with `fuse=False`."""


def parts_left_out(folder: Path) -> dict[str, None]:
    """Parts that a saved pipeline had not, such as SD3's T5: stock loaders miss them unless they are told so.

    Args:
        folder: Of a pipeline; nothing is left out where it is none.

    Raises:
        ArtifactError: Its `model_index.json` is damaged.
    """
    index = folder / MODEL_FILE
    said: dict[str, object] = read_json(index, dict[str, object]) if index.is_file() else {}
    return {name: None for name, value in said.items() if value == [None, None]}


HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
"""Options of `from_pretrained` that say how files are fetched."""

Method = TypeVar("Method", bound=Callable[..., object])


def base_of(model: str | Path) -> str:
    """Where the files of a stock pipeline stand; with erasures beside the base, it has a folder of its own."""
    base = Path(model) / BASE_FOLDER
    return str(base) if (Path(model) / ERASURES_FOLDER).is_dir() and base.is_dir() else str(model)


def read_attached(folder: Path) -> dict[str, tuple[Erasure, float]]:
    """The erasures beside a pipeline that was saved with `fuse=False`, and their strengths, by name.

    Raises:
        ArtifactError: There are none, a part is missing or damaged, or a name that leads out of the folder.
        AttachError: A strength that is no factor.
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
    """Refuse the files of one family for the drop-in of another, which may load them with parts left out.

    Args:
        kind: The drop-in.
        model: A folder or a repository of the Hub.
        options: As of `from_pretrained`.

    Raises:
        UnsupportedModelError: Another drop-in stands in for the class that the files name.
    """
    from erasure.pipelines import PIPELINES

    try:
        config = kind.load_config(model, **{name: options[name] for name in HUB_OPTIONS if name in options})
    except (OSError, ValueError):
        return  # The stock method says what is wrong with them.
    named, drop_ins = config.get("_class_name", ""), PIPELINES["text-to-image"]
    fits = any(issubclass(kind, each[named]) for each in PIPELINES.values() if named in each)
    if named in drop_ins and not fits:
        raise UnsupportedModelError(
            f"{str(model)!r} is a {named}, which {kind.__name__} is not for: use {drop_ins[named].__name__}, or "
            "erasure.load_pipeline, which finds the class"
        )


def in_one_state(method: Method) -> Method:
    """A method of a pipeline that sees one state of the erasures from its beginning to its end."""

    @functools.wraps(method)
    def leased(self: DiffusionPipeline, *args: object, **kwargs: object) -> object:
        with ErasureManager(self).in_use():
            return method(self, *args, **kwargs)

    return cast(Method, leased)


class SharedModulesMixin:
    """Put ahead of a stock pipeline class: it shares modules with other pipelines, in other threads too.

    `from_pipe` leaves the precision of what is shared, and a call sees one state of the erasures from its beginning to
    its end: a switch waits for it. Files name the stock class, so that every loader finds it.
    """

    def __init_subclass__(cls, **options: object) -> None:
        """Put the lease around the stock class's call, whose signature stays."""
        super().__init_subclass__(**options)
        stock = next((vars(kind)["__call__"] for kind in cls.__mro__ if "__call__" in vars(kind)), None)
        if stock is not None and not hasattr(stock, "_leased"):

            @functools.wraps(stock)
            def leased(self: DiffusionPipeline, *args: object, **kwargs: object) -> object:
                with ErasureManager(self).in_use():
                    named = inspect.signature(stock).bind_partial(self, *args, **kwargs).arguments
                    # By name, those too that a call of ours hands on to the stock call.
                    with locking.calling(self, {**kwargs, **named}) as settled:
                        with guards.calling():
                            result = stock(self, *args, **kwargs)
                        return settled(result)

            leased._leased = True  # type: ignore[attr-defined]
            cls.__call__ = leased  # type: ignore[assignment]

    @property
    def _backbone(self) -> Backbone:
        """The pipeline seen through its family."""
        return backbone_for(cast("DiffusionPipeline", self))

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **options: object) -> Self:
        """As the stock method, which makes float32 of both pipelines unless told otherwise."""
        if not {"dtype", "torch_dtype"} & set(options):
            options["dtype"] = pipeline.dtype
        with scopes.same_gradient_mode():
            return super().from_pipe(pipeline, **options)  # type: ignore[misc]

    def to_json_string(self) -> str:
        """The config as written to `model_index.json`, under the stock class's name so that every loader finds it."""
        stock = next(kind.__name__ for kind in type(self).__mro__ if kind.__module__.startswith("diffusers."))
        config = json.loads(super().to_json_string())  # type: ignore[misc]
        config["_class_name"] = stock
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


class ErasureMixin(SharedModulesMixin):
    """Put ahead of a stock pipeline class."""

    name_or_path: str
    """Folder or repository that the pipeline was loaded from, as the stock class says it."""

    @property
    def erasure_manager(self) -> ErasureManager:
        """The manager behind the methods below."""
        pipe: DiffusionPipeline = self  # type: ignore[assignment]
        return ErasureManager(pipe)

    def erase(
        self, concepts: str | Concept | Sequence[str | Concept], strategy: str | None = None, **options: object
    ) -> Erasure:
        """Make an erasure and attach it; see `erasure.erase`."""
        return api.erase(self, concepts, strategy, **options)  # type: ignore[arg-type]

    def learn_concepts(
        self, images: Picture | Sequence[Picture], tokens: str | Sequence[str], **options: Any
    ) -> LearnedConcepts:
        """Learn new tokens for what pictures show; see `erasure.learn_concepts`."""
        return learn_concepts(self.erasure_manager.pipe, images, tokens, **options)

    def load_concepts(self, source: str | Path | LearnedConcepts) -> LearnedConcepts:
        """Load concepts that were learned from pictures, from a folder or from memory, ahead of any erasure.

        Raises:
            ArtifactError: The folder is missing or damaged.
            AttachError: An erasure is attached.
            ConceptError: A token of theirs is known already.
            WrongBaseError: They were learned with another model.
        """
        concepts = source if isinstance(source, LearnedConcepts) else LearnedConcepts.read(source)
        concepts.load_into(self.erasure_manager.pipe)
        return concepts

    def list_concepts(self) -> list[str]:
        """Tokens of the concepts that were loaded."""
        return [token for concepts in loaded(self.erasure_manager.pipe) for token in concepts.tokens]

    def unload_concepts(self) -> None:
        """Take all learned concepts off; the model is then as before, bit for bit."""
        unload(self.erasure_manager.pipe)

    def load_erasure(self, source: str | Path | Erasure, name: str | None = None, **options: Any) -> Erasure:
        """Attach an erasure from a folder, a Hub repository or memory, beside those already attached."""
        return self.erasure_manager.load(source, name, **options)

    def save_erasure(self, folder: str | Path, name: str | None = None, *, overwrite: bool = False) -> Path:
        """Write an attached erasure to a folder; `name` may be left out when there is just one.

        Raises:
            AttachError: The name is unknown, or needed and missing.
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
        """Put exactly these erasures in force."""
        self.erasure_manager.set_erasures(names, strengths)

    def active_erasures(self) -> list[str]:
        """Names of the erasures in force."""
        return self.erasure_manager.active_erasures()

    def list_erasures(self) -> dict[str, list[str]]:
        """Names of all attached erasures by component."""
        return self.erasure_manager.list_erasures()

    def disable_erasures(self) -> None:
        """Put the stock model in force."""
        self.erasure_manager.disable()

    def enable_erasures(self) -> None:
        """Undo `disable_erasures`."""
        self.erasure_manager.enable()

    def delete_erasure(self, names: str | Sequence[str]) -> None:
        """Take erasures off."""
        self.erasure_manager.delete(names)

    def unload_erasures(self) -> None:
        """Take all erasures off that are not fused; the model is then the base bit for bit."""
        self.erasure_manager.unload()

    def fuse_erasure(self, names: str | Sequence[str] | None = None) -> None:
        """Make erasures part of the model."""
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

        Returns how many tensors were compared; see `ErasureManager.verify`.
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
        """Lock the pipeline for strangers: it refuses what goes around its erasures, and cannot be switched.

        Refused are embeddings, other texts for one text encoder, blocks that are left out, texts of another length,
        negative prompts that name what is erased, a LoRA on edited layers, changed or replaced components, every
        switch of erasures, and pipelines of other classes that share its networks. Ahead of every call it is verified
        that the erasures are in force.

        Args:
            refuse: What is refused besides: `image_prompts` (IP-Adapter, reference images), `pictures` that a drawing
                starts from, `controls` of a ControlNet, `noise` (`latents=`), `schedulers` (another one, or noise
                levels by hand), `loras` (every one).
            prompts: Refuse prompts in which the gates of an erasure find its concept (`itd`, `spm`).
            pictures: What looks at every picture; one that it flags or cannot judge is not returned. For a detector
                `functools.partial(erasure.eval.detectors.ask, detector)`.
            audit: Log of every call, or the path of one; see `erasure.locking.AuditLog`.
            share: Share of the time of drawing that whole verifications may take, 0-1.

        Returns:
            The key that `unlock_erasures` asks for.

        Raises:
            AttachError: No erasure is in force, or none has the gates that are to check prompts.
            VerificationError: An erasure is not in force.
            LockedError: It is locked already, or has a LoRA that the lock refuses.
            OptionError: Something in `refuse` that there is not.
            ArtifactError: The audit log cannot be written, or its chain does not hold.
            UnsupportedModelError: Its weights are offloaded in a way that leaves nothing to compare.
        """
        return locking.lock(
            self.erasure_manager.pipe, refuse=refuse, prompts=prompts, pictures=pictures, audit=audit, share=share
        )

    def unlock_erasures(self, key: str) -> None:
        """Unlock the pipeline.

        Args:
            key: What `lock_erasures` gave.

        Raises:
            LockedError: It is another key, or the pipeline is not locked.
        """
        locking.unlock(self.erasure_manager.pipe, key)

    def detect_concepts(self, prompts: str | Sequence[str]) -> list[dict[str, Detection]]:
        """How surely prompts hold the concepts of attached feature erasures; see `erasure.detect_concepts`."""
        return detect_concepts(self.erasure_manager.pipe, prompts)

    def save_erased_pipeline(self, folder: str | Path, *, fuse: bool = True) -> Path:
        """Write a whole pipeline that stays erased.

        Args:
            folder: Where to; must not exist or be empty.
            fuse: `True` bakes the erasures into the weights: stock diffusers loads the folder and is erased, and
                `erased.json` and a model card in it say of what. `False`
                writes the base and the erasures beside it (`erasures/NAME/`); `load_erased_pipeline` puts them
                together again.
        """
        folder = Path(folder)
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
                    # Not beside model_index.json: a stock loader would take the base for the whole.
                    manager.stock().save_pretrained(temporary / BASE_FOLDER)
                    for name, erasure in manager.erasures.items():
                        erasure.save(temporary / ERASURES_FOLDER / name)
                    write_json(temporary / ATTACHED_FILE, manager.strengths)
                    assets.copy_facts(self.name_or_path, temporary / BASE_FOLDER)
                assets.copy_facts(self.name_or_path, temporary)
        return folder

    def save_pretrained(self, save_directory: str | Path, *args: object, **options: object) -> None:
        """As the stock method; refuses ahead of the first file what stock files cannot hold.

        `erased.json` and a model card beside the stock files say what is erased in the weights; see `erasure.baked`.
        The copy of a model of the embedded world declares the world as well.

        Raises:
            AttachError: What is in force is more than plain weights, or a LoRA is loaded beside an erasure.
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
        """As the stock method; a folder of `save_erased_pipeline(fuse=False)` comes with its erasures attached.

        Raises:
            ArtifactError: A folder of that kind that lacks one of its parts.
            UnsupportedModelError: The files are of a family with another drop-in.
        """
        folder = Path(str(pretrained_model_name_or_path))
        if (folder / ERASURES_FOLDER).is_dir() or (folder / ATTACHED_FILE).is_file():
            return cls.load_erased_pipeline(folder, **options)
        check_kind(cls, pretrained_model_name_or_path, options)  # type: ignore[arg-type]
        left_out = parts_left_out(folder)
        return super().from_pretrained(pretrained_model_name_or_path, **{**left_out, **options})  # type: ignore[misc]

    @classmethod
    def load_erased_pipeline(cls, folder: str | Path, **options: object) -> Self:
        """Load what `save_erased_pipeline(fuse=False)` wrote, with its erasures attached and verified.

        Args:
            folder: A local folder; nothing of it is ever looked for on the Hub.
            **options: As of `from_pretrained`.

        Raises:
            ArtifactError: Something else, or a part of it is missing or damaged.
            WrongBaseError: An erasure was made for another model than the one beside it.
        """
        folder = Path(folder)
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
        """As the stock method; erasures come along with the components that are shared."""
        made = super().from_pipe(pipeline, **options)
        made.erasure_manager.adopt()
        locking.share(pipeline, made)
        return made
