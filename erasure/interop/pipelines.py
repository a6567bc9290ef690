"""Private parts of diffusers' pipelines, and a copy of a pipeline that shares its weights."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from erasure.errors import OptionError, UnsupportedModelError
from erasure.interop import adapters, hooks, paths, rounds
from erasure.interop.one_step import own_scheduler


def register_auto_pipeline(pipeline: type[DiffusionPipeline], stock: type[DiffusionPipeline]) -> None:
    """Register a drop-in for `AutoPipelineFor...from_pipe`, which has no public way to add a class."""
    from diffusers.pipelines import auto_pipeline

    model = auto_pipeline._get_model(stock.__name__)
    for mapping in auto_pipeline.SUPPORTED_TASKS_MAPPINGS:
        if model in mapping:
            mapping.setdefault(f"{model}-erasure", pipeline if mapping[model] is stock else mapping[model])


def origin(pipe: DiffusionPipeline) -> tuple[str, str | None]:
    """Get the folder or Hub id (or "") from which a pipeline was loaded, and the commit, if known."""
    return str(pipe.config.get("_name_or_path") or ""), getattr(pipe.config, "_commit_hash", None)


def execution_device(pipe: DiffusionPipeline) -> torch.device:
    """Give the device on which a pipeline computes; its weights may be offloaded."""
    return pipe._execution_device


def interrupt(pipe: DiffusionPipeline) -> None:
    """Skip the remaining steps of the current call."""
    pipe._interrupt = True


def check_steps(pipe: DiffusionPipeline, steps: int | None) -> None:
    """Refuse more denoising steps than the sampler of a pipeline can make.

    Args:
        pipe: The pipeline.
        steps: Number of steps; that of the pipeline, which is fine, when left out.

    Raises:
        OptionError: The sampler takes steps that the denoiser was trained on, and there are fewer of these.
    """
    most = pipe.scheduler.config.get("num_train_timesteps")
    if steps is None or most is None or steps <= most:
        return
    try:
        copy.deepcopy(pipe.scheduler).set_timesteps(steps)
    except ValueError as error:
        if "train" in str(error):
            raise OptionError(
                f"{steps} denoising steps; {type(pipe.scheduler).__name__} allows at most {most}: ask for fewer"
            ) from error


def check_is_pipeline(pipe: object) -> None:
    """Refuse what is no pipeline, such as one of its networks.

    Raises:
        UnsupportedModelError: It has no components.
    """
    if not isinstance(getattr(pipe, "components", None), Mapping):
        raise UnsupportedModelError(
            f"{type(pipe).__name__} is no pipeline of diffusers: pass the whole pipeline, as erasure.load_pipeline or "
            "from_pretrained gives it, and none of its parts"
        )


def components_of(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """Give the networks of a pipeline by name, without wrappers of `torch.compile`.

    Raises:
        UnsupportedModelError: It is no pipeline.
    """
    check_is_pipeline(pipe)
    parts = pipe.components.items()
    return {name: paths.uncompiled(part) for name, part in parts if isinstance(part, nn.Module)}


LOCK = "_erasure_lock"
"""Attribute of a locked pipeline with the lock that checks its calls."""


class CallGuard:
    """Runs a check before every call of one method of one object (a module or a pipeline).

    An object, not a closure: a deep copy of the owner then guards the copy. Its signature is the method's, which
    diffusers looks at when it saves.
    """

    def __init__(self, owner: object, method: str, check: Callable[..., None]) -> None:
        self.owner, self.method, self.check = owner, method, check
        self.__wrapped__ = getattr(owner, method)

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Check, then call the method that was there."""
        self.check(self.owner, *args, **kwargs)
        return self.__wrapped__(*args, **kwargs)

    @classmethod
    def install(cls, owner: object, method: str, check: Callable[..., None]) -> None:
        """Guard a method (once); nothing happens where the owner has no such method."""
        held = vars(owner).get(method)
        if isinstance(held, cls):
            if held.owner is owner:
                return
            # That of the object that this one is a shallow copy of.
            del vars(owner)[method]
        if hasattr(owner, method):
            vars(owner)[method] = cls(owner, method, check)

    @classmethod
    def remove(cls, owner: object, method: str) -> None:
        """Remove the guard."""
        if isinstance(vars(owner).get(method), cls):
            del vars(owner)[method]


def _nothing(*args: object, **kwargs: object) -> None:
    """Check nothing; a function of the module, because a lambda cannot be pickled."""


class EncodedTogether(CallGuard):
    """Guard of a pipeline's `encode_prompt` that lets its text encoders share open gates.

    See `erasure.interop.rounds`.
    """

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Encode, again where one encoder found what another was not told."""
        return rounds.together(lambda: self.__wrapped__(*args, **kwargs))

    @classmethod
    def set(cls, pipe: DiffusionPipeline, wanted: bool) -> None:
        """Put it on a pipeline, or take it off."""
        if wanted:
            cls.install(pipe, "encode_prompt", _nothing)
        else:
            cls.remove(pipe, "encode_prompt")


def without_free_u(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Switch FreeU off on a pipeline, and return the pipeline."""
    if any(paths.has_free_u(component) for component in components_of(pipe).values()):
        pipe.disable_freeu()
    return pipe


def without_safety_checker(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Give the pipeline without safety checker, as another object on the same networks where it has one."""
    if getattr(pipe, "safety_checker", None) is None:
        return pipe
    other = twin(pipe, {}, (), prefix=None, without_adapters=False, components=())
    other.safety_checker = None
    return other


def cloned(components: Mapping[str, nn.Module], left_out: Iterable[object] = ()) -> dict[str, nn.Module]:
    """Copy modules; parameters and buffers share the originals' memory.

    Writing into a shared tensor would reach the original: give an edited parameter a tensor of its own first.

    Args:
        components: The modules by name.
        left_out: Objects inside of them that the copies keep instead of copying them, because they hold tensors.
    """
    memo: dict[int, object] = {id(thing): thing for thing in left_out}
    for component in components.values():
        # Every module has a dozen empty tables of hooks, which take most of the time of a deep copy.
        for part in component.modules():
            memo |= {id(held): type(held)() for held in vars(part).values() if type(held) is OrderedDict and not held}
        for tensor in component.buffers():
            memo[id(tensor)] = tensor.detach() if type(tensor) is Tensor else tensor
        for p in component.parameters():
            memo[id(p)] = nn.Parameter(p.detach(), p.requires_grad) if paths.is_plain(p) else p
    copies = {name: copy.deepcopy(component, memo) for name, component in components.items()}
    for component in copies.values():
        hooks.relink(component)
    return copies


def twin(
    pipe: DiffusionPipeline,
    originals: Mapping[str, Mapping[str, Tensor]],
    left_out: Iterable[object],
    *,
    prefix: str | None,
    without_adapters: bool,
    components: Collection[str] | None = None,
) -> DiffusionPipeline:
    """Make another pipeline object on the same weights, with other values of some parameters and without some hooks.

    Step caches are left out too, so that no result comes from an earlier pass.

    Drawing with it or training it does not affect the original pipeline. It needs memory for the parameters that
    differ.

    Args:
        pipe: The pipeline, which must not be offloaded.
        originals: Values by component and canonical path, for parameters that must differ.
        left_out: Objects that hold tensors and are not copied with the modules.
        prefix: Hooks with this prefix, and attributes of modules with it behind an underscore, are left out; nothing
            is for `None`.
        without_adapters: Leave the user's LoRA adapters out too.
        components: Names of those that are made anew, where the others are not used; all when left out.
    """
    parts = {name: part for name, part in components_of(pipe).items() if components is None or name in components}
    every = [
        hook
        for component in parts.values()
        for part in component.modules()
        for name, hook in getattr(getattr(part, "_diffusers_hook", None), "hooks", {}).items()
        if prefix is not None and name.startswith(prefix)
    ]
    copies = cloned(parts, [*left_out, *every])
    for name, component in copies.items():
        hooks.remove_caches(component)
        if prefix is not None:
            hooks.remove_hooks(component, prefix)
            for attribute in [key for key in vars(component) if key.startswith(f"_{prefix}")]:
                del vars(component)[attribute]
        for method in [key for key, value in vars(component).items() if isinstance(value, CallGuard)]:
            del vars(component)[method]
        if without_adapters:
            adapters.unwrap(component)
        for path, value in originals.get(name, {}).items():
            owner, parameter = path.rsplit(".", 1)
            live = paths.parameter(component, path)
            paths.layer(component, owner)._parameters[parameter] = nn.Parameter(
                value.to(live.device, live.dtype, copy=True), live.requires_grad
            )
    other = copy.copy(pipe)
    own = {key: value for key, value in vars(pipe).items() if not isinstance(value, CallGuard)}
    own.pop(LOCK, None)
    other.__dict__ = own
    for name, component in copies.items():
        setattr(other, name, component)
    if getattr(pipe, "scheduler", None) is not None:
        # A generator's sampler belongs to the erasure that is left out.
        other.scheduler = copy.deepcopy(pipe.scheduler if prefix is None else own_scheduler(pipe))
    EncodedTogether.set(other, prefix is None and isinstance(vars(pipe).get("encode_prompt"), EncodedTogether))
    return other
