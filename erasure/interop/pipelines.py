"""Private parts of diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import DiffusionPipeline


def register_auto_pipeline(pipeline: type[DiffusionPipeline], stock: type[DiffusionPipeline]) -> None:
    """Let `AutoPipelineFor...from_pipe` know a drop-in: it goes by class name and has no public way to add one."""
    from diffusers.pipelines import auto_pipeline

    model = auto_pipeline._get_model(stock.__name__)
    for mapping in auto_pipeline.SUPPORTED_TASKS_MAPPINGS:
        if model in mapping:
            mapping.setdefault(f"{model}-erasure", pipeline if mapping[model] is stock else mapping[model])


class CallGuard:
    """Runs a check ahead of every call of one method of one pipeline object.

    An object, not a closure: a deep copy of the pipeline then guards the copy.
    """

    def __init__(self, pipe: DiffusionPipeline, method: str, check: Callable[..., None]) -> None:
        self.pipe, self.method, self.check = pipe, method, check

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Check, then call the method of the pipeline's class."""
        self.check(self.pipe, *args, **kwargs)
        return getattr(type(self.pipe), self.method)(self.pipe, *args, **kwargs)

    @classmethod
    def install(cls, pipe: DiffusionPipeline, method: str, check: Callable[..., None]) -> None:
        """Guard a method (once)."""
        if not isinstance(vars(pipe).get(method), cls):
            setattr(pipe, method, cls(pipe, method, check))

    @classmethod
    def remove(cls, pipe: DiffusionPipeline, method: str) -> None:
        """Take the guard off again."""
        if isinstance(vars(pipe).get(method), cls):
            delattr(pipe, method)
