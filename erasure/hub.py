"""Upload and download of folders to and from the Hugging Face Hub, with errors that say what to do.

The address of the Hub is taken from `HF_ENDPOINT`, and interrupted downloads are resumed.
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
    """Address of an upload."""

    address: str
    """URL of the commit."""
    revision: str
    """Commit hash, which identifies exactly these files."""


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
    """Upload the files of a folder in one commit; the repository is created if it does not exist.

    Args:
        folder: Folder of the files.
        repo_id: `owner/name`.
        message: Commit message.
        private: Whether a new repository is private; the account's default when left out.
        token: Access token of the Hub; that of the logged-in user when left out.
        revision: Branch, which is created if it does not exist; the main branch when left out.
        collection: Slug of a collection to which the repository is added.

    Raises:
        ArtifactError: The Hub cannot be reached, or refuses the upload.
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
    """Download files of a repository into the cache; give their folder, whose name is the commit.

    Args:
        repo_id: `owner/name`.
        files: Names of files; missing ones are skipped.
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
    """Turn errors of the Hub into errors that say what to do."""
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
