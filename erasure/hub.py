"""Folders on the Hugging Face Hub: up and down, with errors that say what to do.

What is on the Hub is found at the address in `HF_ENDPOINT`, and downloads go on where they were cut off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from erasure.errors import ArtifactError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

LOGIN = "log in with: hf auth login, or pass another token"


class Uploaded(NamedTuple):
    """Where something was put."""

    address: str
    """Of the commit, as a browser finds it."""
    revision: str
    """The commit: it names exactly these files for ever."""


def upload(
    folder: Path,
    repo_id: str,
    *,
    message: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    collection: str | None = None,
) -> Uploaded:
    """Put the files of a folder into a repository, in one commit; the repository is made if it is not there.

    Args:
        folder: The files.
        repo_id: `owner/name`.
        message: What the commit is called.
        private: Whether a repository that is made is for its owner alone; as the owner's settings say when left out.
        token: Of the Hub; the one that the user is logged in with when left out.
        revision: Branch, made if it is not there; the main one when left out.
        collection: Slug of a collection that the repository is put into as well.

    Raises:
        ArtifactError: The Hub cannot be reached, or does not take it.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api, files = HfApi(token=token), sorted(path for path in folder.rglob("*") if path.is_file())
    added = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
    with _clear_errors(repo_id, "take"):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(repo_id, added, commit_message=message, revision=revision)
        if collection is not None:
            api.add_collection_item(collection, item_id=repo_id, item_type="model", exists_ok=True)
    return Uploaded(str(commit.commit_url), str(commit.oid))


def download(repo_id: str, files: Sequence[str], *, revision: str | None = None, token: str | None = None) -> Path:
    """A folder of the cache with some files of a repository; its name is the commit that they are of.

    Args:
        repo_id: `owner/name`.
        files: Names of the files, those that there are.
        revision: Branch, tag or commit; the main branch when left out.
        token: See `upload`.

    Raises:
        ArtifactError: The Hub cannot be reached, or has no such repository or revision for this user.
    """
    from huggingface_hub import snapshot_download

    with _clear_errors(repo_id, "give", revision):
        return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=list(files)))


@contextmanager
def _clear_errors(repo_id: str, does: str, revision: str | None = None) -> Iterator[None]:
    """Say what the Hub complains of in words that help."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except HFValidationError as error:
        raise ArtifactError(f"{repo_id!r} is neither a folder nor the name of a Hub repository") from error
    except RevisionNotFoundError as error:
        raise ArtifactError(
            f"the Hub has {repo_id!r}, but no revision {revision!r} of it: name a branch, a tag or a whole commit"
        ) from error
    except HfHubHTTPError as error:
        raise ArtifactError(_said(error, repo_id, does)) from error
    except LocalEntryNotFoundError as error:
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise ArtifactError(_said(cause, repo_id, does)) from error
        raise ArtifactError(_unreached(repo_id, does, error)) from error
    except OSError as error:
        raise ArtifactError(_unreached(repo_id, does, error)) from error


def _said(error: HfHubHTTPError, repo_id: str, does: str) -> str:
    status, reason = error.response.status_code, str(error).strip().splitlines()[0]
    why = {
        401: f"the token is missing, wrong or expired, or there is no such repository: {LOGIN}",
        403: f"this user may not do that: {LOGIN} with the rights",
        404: "there is no such repository, or it is private: check its name, or log in with: hf auth login",
        429: "it was asked too often: try again later",
    }.get(status, f"it says {reason!r}")
    return f"{repo_id!r}: the Hub does not {does} it ({status}): {why}"


def _unreached(repo_id: str, does: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    what = f"{repo_id!r} is no folder here, and" if does == "give" else f"{repo_id!r}:"
    return f"{what} the Hub does not {does} it: {reason}"
