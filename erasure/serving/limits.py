"""What one request, and all of them together, may ask of a service."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Le

from erasure.options import Count, NotNegative, Options, Positive

# No import of torch here: the command line makes flags of these.


@dataclass(frozen=True, kw_only=True)
class Limits(Options):
    """Limits above which requests are refused, and the size of a batch."""

    name: ClassVar[str] = "limits of the service"

    max_side: Annotated[int, Ge(8), Le(16_384)] = 1024
    """Most pixels on a side of a picture."""
    max_steps: Count = 100
    """Most denoising steps."""
    max_prompt: Count = 2000
    """Most characters of a prompt, and of a negative prompt."""
    max_count: Count = 4
    """Most pictures of one request."""
    max_body: Annotated[int, Ge(256)] = 65_536
    """Most bytes of a request; longer ones are refused before they are read."""
    max_queue: Count = 64
    """Most pictures that wait; further requests are told to come again (429)."""
    batch_size: Count = 4
    """Most pictures that are drawn at once."""
    wait: NotNegative = 0.02
    """Seconds that the first picture of a batch waits for others to be drawn with."""
    timeout: Positive = 600.0
    """Seconds after which a request that was not answered is given up (504)."""
