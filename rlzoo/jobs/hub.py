"""The Hugging Face Hub: pushing a finished run, to a repository made before the run starts; data sets from there."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlzoo.errors import UnreachableError, UserError
from rlzoo.jobs.ranks import by_main
from rlzoo.jobs.sharing import CARD, FOLDER, hub_id

_MADE_WITH_A_REPOSITORY = {".gitattributes"}
_LOG_IN = "run `hf auth login`, or set HF_TOKEN to a token with write access"
_OPTION = "--push-to-hub"
Kind = Literal["model", "dataset"]
Files = Callable[[Path], Mapping[str, Path | bytes]]
"""The files to push by their names in the repository, given the folder of the run."""


@dataclass(frozen=True)
class Repository:
    """A repository on the Hub that is ours to fill."""

    name: str
    kind: Kind
    is_filled: bool = False
    """Whether it holds this run already."""

    @property
    def url(self) -> str:
        """Its page."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"


@dataclass
class Push:
    """What a run may say about its push."""

    is_complete: bool = True
    """Set to false if some of the work failed, which the same command retries: then nothing is pushed."""


@contextmanager
def pushed(name: str | None, kind: Kind, private: bool, folder: Path, files: Files) -> Iterator[Push]:
    """Make the repository ``name`` now, and push what the run in this context saves in ``folder``, unless it fails.

    ``files`` is called with the folder once it is complete. Without a ``name``, nothing happens. All processes must
    enter this. A repository that exists and is as private as was asked is used if it is empty; if it holds the card of
    ``folder`` already, nothing is pushed. The commands in a pushed card have the repository's name. Raises UserError
    for a malformed or taken name, without a token that may write there, and if the Hub cannot be reached; at the end,
    it says which command tries again.
    """
    repository = None if name is None else by_main(lambda: _reserved(name, kind, private, folder))
    yield (push := Push())
    if repository is None or not push.is_complete:
        return
    if repository.is_filled:
        print(f"already on the Hub: {repository.url}")
    else:
        _push(repository, folder, {**files(folder), CARD: _card(folder, repository.name)})


def local_copy(name: str, mark: str) -> Path | None:
    """The folder of a data set on the Hub that has the file ``mark``, in the cache of the Hub's client.

    It is downloaded unless its newest version is in the cache; without a connection, the version that is there is used.
    None for a name that is not NAMESPACE/NAME, and for a data set that has no such file or cannot be reached. Raises
    UserError if the rest of it cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    if "/" not in name or hub_id(name) != name:
        return None
    try:
        marked = Path(hf_hub_download(name, mark, repo_type="dataset"))
    except Exception as error:
        if _told(name, error) is None:
            raise
        return None  # the caller finds out why when it looks for anything else of that name
    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=marked.parent.name))
    except Exception as error:
        if _told(name, error) is None:
            raise
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UnreachableError(
            f"{name} cannot be downloaded from the Hub ({reason:.160}): check connection and disk, and try again"
        ) from None


def _push(repository: Repository, folder: Path, files: Mapping[str, Path | bytes]) -> None:
    from huggingface_hub import CommitOperationAdd, HfApi

    added = [
        CommitOperationAdd(name, file if isinstance(file, bytes) else str(file)) for name, file in sorted(files.items())
    ]
    try:
        with _explained(repository.name):
            HfApi().create_commit(
                repository.name, added, commit_message=f"{folder.name}, made by rlzoo", repo_type=repository.kind
            )
    except UserError as error:
        raise UserError(
            f"{folder} is complete, but not pushed: {error}; then the same command with --out {folder} pushes it"
        ) from None
    print(f"pushed to {repository.url}")


def _reserved(name: str, kind: Kind, private: bool, folder: Path) -> Repository:
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    malformed = UserError(
        f"{_OPTION} {name!r}: give NAMESPACE/NAME, your user name or an organisation and a name of letters, digits, "
        "'-', '_' and '.', as in alice/dft-gsm8k"
    )
    if not all(name.partition("/")):
        raise malformed
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{_OPTION} needs a connection, and HF_HUB_OFFLINE is set: unset it, or leave the option out")
    if get_token() is None:
        raise UserError(f"{_OPTION} needs a token for the Hub, and there is none: {_LOG_IN}")
    api = HfApi()
    with _explained(name):
        try:
            api.create_repo(name, private=private, repo_type=kind)
            return Repository(name, kind)
        except HFValidationError:
            raise malformed from None
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
        info: Any = api.repo_info(name, repo_type=kind, files_metadata=True)
    files = {file.rfilename: file.blob_id for file in info.siblings or ()}
    there = {name: blob for name, blob in files.items() if name not in _MADE_WITH_A_REPOSITORY}
    if there and not ((folder / CARD).is_file() and there.get(CARD) == _blob_id(_card(folder, name))):
        raise UserError(
            f"{_OPTION} {name!r}: that {kind} exists and holds other files: give another name, or delete it first"
        )
    if bool(info.private) != private:
        asked = "private: leave --public out" if info.private else "public: add --public"
        raise UserError(f"{_OPTION} {name!r}: that {kind} exists and is {asked}, or give another name")
    return Repository(name, kind, is_filled=bool(there))


def _card(folder: Path, name: str) -> bytes:
    """The card of a folder as it is in the repository ``name``."""
    text = (folder / CARD).read_text(encoding="utf-8")
    return re.sub(rf"\b{FOLDER}\b", lambda _: name, text).encode()


def _blob_id(content: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """In this context, what the Hub, the connection or a file refuses is raised as UserError; a fault of the program
    is raised as it is."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        told = _told(name, error)
        if told is None:
            raise
        raise UserError(told) from None


def _told(name: str, error: BaseException) -> str | None:
    """What an exception of the Hub's client means, and what to do; None for one that is neither of the Hub nor of this
    machine."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # the client's, about a file that it uploads
        return _told(name, error.__cause__)
    reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
    if isinstance(error, HfHubHTTPError):
        status, told = error.response.status_code, error.server_message or f"status {error.response.status_code}"
        if status == 401:
            return f"the Hub does not accept the token ({told:.100}): {_LOG_IN}"
        if status == 403:
            return f"the token may not write to {name} ({told:.100}): check the namespace, and that the token may write"
        return f"the Hub refuses {name} ({told:.200}): try again later"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be used ({error.strerror}): check that you may read and write it"
    if isinstance(error, PermissionError | FileNotFoundError | ValueError | RuntimeError):
        return f"the Hub refuses {name} ({reason})"  # also the header of a card, and an answer that is no JSON
    if isinstance(error, (OSError, _connection_error())):
        return f"the Hub cannot be reached ({reason}): check the connection"
    return None


def _connection_error() -> type[Exception]:
    """What the client's own library for connections raises: HTTPError of httpx or of httpx2, as it depends on one."""
    from huggingface_hub.errors import HfHubHTTPError

    found: type[Exception] = HfHubHTTPError.__bases__[0]
    return found
