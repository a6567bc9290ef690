"""Threads that share a tokeniser get the ids that they asked for."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest

from erasure.interop.tokenizers import take_turns


class Nosy:
    """A backend during whose encoding another thread asks for other padding."""

    def __init__(self, backend: Any, other: threading.Thread) -> None:
        self.backend, self.other = backend, other

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def encode_batch(self, *args: Any, **kwargs: Any) -> Any:
        if self.other.ident is None:
            self.other.start()
            self.other.join(0.2)
        return self.backend.encode_batch(*args, **kwargs)


@pytest.mark.parametrize("how", ["itself", "copy", "pickle"])
def test_padding_is_that_of_the_call(how: str, tiny_pipe: Any) -> None:
    take_turns(tiny_pipe)
    tokenizer = tiny_pipe.tokenizer
    if how != "itself":
        tokenizer = copy.deepcopy(tokenizer) if how == "copy" else pickle.loads(pickle.dumps(tokenizer))
    backend, lengths = tokenizer._tokenizer, []
    other = threading.Thread(target=lambda: lengths.append(len(tokenizer("a cat").input_ids)))
    tokenizer._tokenizer = Nosy(backend, other)
    assert len(tokenizer("a dog", padding="max_length", max_length=77).input_ids) == 77
    other.join()
    assert lengths == [4]


def test_it_is_saved_and_read_as_before(tiny_pipe: Any, tmp_path: Any) -> None:
    wanted = tiny_pipe.tokenizer("a cat").input_ids
    take_turns(tiny_pipe)
    tiny_pipe.tokenizer.save_pretrained(tmp_path)
    assert type(tiny_pipe.tokenizer).from_pretrained(tmp_path)("a cat").input_ids == wanted
