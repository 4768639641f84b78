"""Steerings on the Hugging Face Hub: pushed in one commit, pulled as four files and no others.

What is pulled is untrusted. The names are ours, never the repository's, so there is no path to
leave the folder by and nothing that could be run; sizes are bounded while they stream; all files
are of one commit; and the folder appears after it was loaded once, seal and identity included.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported, but not by name
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
)

from innsteer import __version__
from innsteer.errors import FormatError, InnsteerError, InputError
from innsteer.files import MAX_JSON, fresh_folder, require_absent
from innsteer.steering import CARD, HEADER, SEAL, TENSORS, Steering

LIMITS = {HEADER: MAX_JSON, SEAL: 2**20, CARD: 2**20, TENSORS: 4 * 2**30}
"""The files of a steering and the most bytes that each may have: the list of what is pulled."""
SECONDS = constants.HF_HUB_DOWNLOAD_TIMEOUT
"""Without an answer, or another piece of one, for so long, the Hub counts as not reached."""
LOG_IN = "log in with: hf auth login; or set HF_TOKEN"
WHOLE = "nothing half done is left"


class Pulled(NamedTuple):
    """What a pull took: the commit, as 40 hex digits, and what else the repository holds."""

    commit: str
    left: tuple[str, ...]


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    replace: bool = False,
) -> str:
    """Upload a steering's folder in one commit: all of it is there, or nothing has changed.

    Args:
        folder: a saved steering; it is loaded first, so that no broken one is published.
        repo: "owner/name"; made if there is none.
        private: make it private. revision: a branch, made if there is none; default: main.
        replace: push into a repository that holds something else. Its other files stay.

    Returns:
        The commit, 40 hex digits.

    Raises:
        FormatError: the folder's seal does not hold. InputError: no such name, no right to write,
            a public repository where a private one was asked for, or one of something else.
        InnsteerError: the Hub was not reached, or broke off.
    """
    Steering.load(folder)
    _require_name(repo)
    api = _api()
    with _told(f"pushing to {repo!r}"):
        found = _found(api, repo)
        if found is None:
            api.create_repo(repo, private=private or None)
        elif private and not found.private:
            raise InputError(
                f"{repo!r} is public",
                expected="a private repository",
                remedy="choose another name, or make it private on its page first",
            )
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
            found = api.model_info(repo, revision=revision)
        names = {file.rfilename for file in (found.siblings or [])} if found else set()
        if not replace and names - {".gitattributes"} and not {HEADER, SEAL} <= names:
            raise InputError(
                f"{repo!r} holds something else: {_listed(sorted(names))}",
                expected="an empty repository, or one of a steering",
                remedy="choose another name; or replace=True (--replace) to put it beside that",
            )
        made = api.create_commit(
            repo,
            [CommitOperationAdd(name, Path(folder) / name) for name in LIMITS],
            commit_message="Push a steering with innsteer",
            revision=revision,
            # Refused by the Hub if somebody else has pushed since it was looked at.
            parent_commit=found.sha if found else None,
        )
    return made.oid


def pull(repo: str, folder: str | Path, *, revision: str | None = None) -> Pulled:
    """Download a steering into a new folder, which appears whole and checked, or not at all.

    Args:
        repo: "owner/name". folder: must not exist.
        revision: branch, tag or commit; default: main. All files are those of one commit, which is
            returned: give it here to get the same bytes again.

    Raises:
        FormatError: no steering is there, one of its files is too large, or it does not load.
        InputError: no such repository or revision, no right to read it, or the folder exists.
        InnsteerError: the Hub was not reached, or broke off.
    """
    require_absent(folder)
    _require_name(repo)
    api = _api()
    with _told(f"pulling {repo!r}"):
        info = api.model_info(repo, revision=revision, files_metadata=True, timeout=SECONDS)
        commit = _commit(info, repo, revision)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        if absent := sorted(LIMITS.keys() - sizes.keys()):
            raise FormatError(
                f"{repo!r} at {commit[:12]} has no {', '.join(absent)}",
                expected="a steering, as innsteer push uploads it",
            )
        for name, most in LIMITS.items():
            _require_size(name, sizes[name], most)
        with fresh_folder(folder) as staging:
            for name, most in LIMITS.items():
                url = hf_hub_url(repo, name, revision=commit, endpoint=api.endpoint)
                _download(url, staging / name, most)
            Steering.load(staging)
    return Pulled(commit, tuple(sorted(sizes.keys() - LIMITS.keys() - {".gitattributes"})))


def _api() -> HfApi:
    return HfApi(library_name="innsteer", library_version=__version__)


def _require_name(repo: str) -> None:
    """Refuse what is no name of a repository, before anything is asked."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo, re.ASCII):
        raise InputError(f"repository {repo!r}", expected='"owner/name"')


def _found(api: HfApi, repo: str) -> ModelInfo | None:
    """What the repository holds on its main branch; None where there is none that we may see."""
    try:
        return api.model_info(repo, timeout=SECONDS)
    except RepositoryNotFoundError:
        return None


def _commit(info: ModelInfo, repo: str, revision: str | None) -> str:
    """The commit that an answer is about, which must be the one that was asked for."""
    commit = info.sha or ""
    exact = re.fullmatch("[0-9a-f]{40}", revision or "")
    if not re.fullmatch("[0-9a-f]{40}", commit) or (exact and commit != revision):
        raise FormatError(
            f"{repo!r} answers with the commit {commit!r}", expected=revision or "40 hex digits"
        )
    return commit


def _download(url: str, path: Path, most: int) -> None:
    """One file, which is cut off where it grows beyond its bound, whatever its header said."""
    headers = build_hf_headers(library_name="innsteer", library_version=__version__)
    with http_stream_backoff("GET", url, headers=headers, timeout=SECONDS) as response:
        hf_raise_for_status(response)
        size = 0
        with path.open("wb") as file:
            for chunk in response.iter_bytes(2**16):
                size += len(chunk)
                _require_size(path.name, size, most)
                file.write(chunk)


def _require_size(name: str, size: int, most: int) -> None:
    if size > most:
        raise FormatError(f"{name} has {size} bytes or more", expected=f"<= {most}")


def _listed(names: list[str]) -> str:
    """The first of some names that strangers chose, quoted."""
    return ", ".join(map(repr, names[:4])) + (", ..." if len(names) > 4 else "")


@contextmanager
def _told(what: str) -> Iterator[None]:
    """What the Hub and its client raise, as an error that says what to do."""
    try:
        yield
    except InnsteerError:
        raise
    except OfflineModeIsEnabled as error:
        raise InputError(
            f"{what} while HF_HUB_OFFLINE is set", remedy="unset HF_HUB_OFFLINE"
        ) from error
    except GatedRepoError as error:
        raise InputError(f"{what}: it is gated", remedy="ask for access on its page") from error
    except RevisionNotFoundError as error:
        raise InputError(
            f"{what}: it has no such revision", expected="a branch, a tag or a commit"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{what}: no such repository, or it is private",
            remedy=f"check its name; {LOG_IN}",
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise InputError(f"{what}: not allowed ({status})", remedy=LOG_IN) from error
        raise InnsteerError(
            f"{what}: the Hub answers with {status} {error.server_message or ''}".rstrip(),
            remedy=f"try again later; {WHOLE}",
        ) from error
    # The transport's own errors have other names in each major version of huggingface_hub.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InnsteerError(
            f"{what} broke off: {reason[0]}", remedy=f"check the network and try again; {WHOLE}"
        ) from error
