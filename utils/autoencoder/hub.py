"""What ``PUSH_TO_HUB`` asks for: a finished autoencoder as a repository of the Hugging Face Hub."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from utils.artifacts import AUTOENCODER_FILE, METRICS_FILE, SETTINGS_FILE, read_json
from utils.autoencoder.autoencoder import SparseAutoencoder
from utils.autoencoder.formats import saelens, sparsify
from utils.autoencoder.formats.folded import Facts, write_config
from utils.autoencoder.kinds import KINDS
from utils.autoencoder.model_card import CURVES, model_card
from utils.embedded import public_name
from utils.settings import FULL, InputError, Json, disk_error, hub_token, require
from utils.terminal import in_bytes

STAGED = "hub"  # in the autoencoder's folder: what is written for the hub alone
FILES = (AUTOENCODER_FILE, CURVES)


class HubSettings(Protocol):
    """The settings of train_autoencoder.py that an upload depends on."""

    push_to_hub: str | None
    dry_run: bool
    private: bool


def check(settings: HubSettings) -> None:
    """Refuse, before anything is trained, a name or a token that an upload would fail by.

    Raises:
        InputError: The name is none of a repository; or, without ``DRY_RUN``, the hub cannot be
            reached or does not know the token, or the token is of somebody else than the owner.
    """
    name = settings.push_to_hub
    if name is None:
        return
    try:
        validate_repo_id(name)
    except HFValidationError:
        name = ""
    require(
        name.count("/") == 1,
        "PUSH_TO_HUB must be the name of a repository, owner/name, of letters, digits, '-', '_' "
        f"and '.'; it is {settings.push_to_hub!r}.",
    )
    if settings.dry_run:
        return
    require(
        hub_token() is not None,
        "PUSH_TO_HUB needs a token that may write: make one at "
        f"{huggingface_hub.constants.ENDPOINT}/settings/tokens and put HF_TOKEN=... into .env.",
    )
    with uploading(name):
        account = _hub().whoami()
    owners = [account["name"], *(one["name"] for one in account.get("orgs", ()))]
    owner = name.partition("/")[0]
    require(
        owner in owners,
        f"PUSH_TO_HUB must be owned by the token's account or one of its organisations, "
        f"{', '.join(owners)}; the owner of {name} is {owner}.",
    )


def push(settings: HubSettings, autoencoder: SparseAutoencoder, facts: Facts, folder: Path) -> None:
    """List what is to be uploaded of a finished folder; without ``DRY_RUN``, upload it.

    That is, in our format, the autoencoder with its settings and metrics; the same for SAELens and,
    where sparsify has the kind, for sparsify; and a model card. What is made for it lies in the
    folder's `STAGED` afterwards. An upload that was interrupted goes on when it is repeated.

    Raises:
        InputError: The repository is public where ``PRIVATE`` is on, or cannot be written to.
    """
    name = settings.push_to_hub
    files = _stage(name, autoencoder, facts, folder)
    total = sum(path.stat().st_size for path in files.values())
    lines = [f"  {file:44} {in_bytes(path.stat().st_size)}" for file, path in files.items()]
    kept = "private" if settings.private else "public"
    print("\n".join([f"For {name} on the hub ({kept}), {in_bytes(total)} in all:", *lines]))
    if settings.dry_run:
        print(
            f"Nothing is uploaded yet. Read {folder / STAGED / 'README.md'}, then upload by the "
            "same command with --no-dry-run."
        )
        return
    with uploading(name):
        hub = _hub()
        hub.create_repo(name, private=settings.private, exist_ok=True)
        require(
            hub.repo_info(name).private or not settings.private,
            f"The repository {name} is public already. Make it private on the hub, choose another, "
            "or pass --no-private.",
        )
        operations = [
            huggingface_hub.CommitOperationAdd(path_in_repo=file, path_or_fileobj=path)
            for file, path in files.items()
        ]
        hub.create_commit(name, operations, commit_message="Upload an autoencoder")
    print(f"Uploaded to {huggingface_hub.constants.ENDPOINT}/{name}.")


def _stage(
    name: str, autoencoder: SparseAutoencoder, facts: Facts, folder: Path
) -> dict[str, Path]:
    """Write what a repository holds besides the folder's files; all of it, by path in there."""
    staged = folder / STAGED
    shutil.rmtree(staged, ignore_errors=True)
    kind = next(kind for kind, cls in KINDS.items() if cls is type(autoencoder))
    saelens.write(autoencoder, facts, staged / "saelens")
    if sparsify.refusal(kind, autoencoder.standardize_tokens) is None:
        sparsify.write(autoencoder, facts, staged)
    for file in (SETTINGS_FILE, METRICS_FILE):
        write_config(staged / file, _shown(read_json(folder / file), facts))
    made = (path for path in staged.rglob("*") if path.is_file() and not path.name.startswith("."))
    files = {path.relative_to(staged).as_posix(): path for path in sorted(made)}
    files |= {file: folder / file for file in FILES if (folder / file).exists()}
    metrics = read_json(staged / METRICS_FILE)
    card = staged / "README.md"
    card.write_text(model_card(name, kind, autoencoder, facts, metrics, list(files)), "utf-8")
    return {card.name: card} | files


def _shown(content: dict[str, Json], facts: Facts) -> dict[str, Json]:
    """A file's content without the paths of this machine."""
    imported = dict(content.get("imported") or {})
    for name in ("source", "model_name"):
        if imported.get(name):
            imported[name] = public_name(imported[name], "model_name")
    shown = {
        "model_name": facts.model_name,
        "imported": imported,
        "import_from": public_name(content.get("import_from") or "", "model_name"),
    }
    return content | {name: value for name, value in shown.items() if content.get(name)}


def _hub() -> huggingface_hub.HfApi:
    return huggingface_hub.HfApi(huggingface_hub.constants.ENDPOINT, token=hub_token())


@contextlib.contextmanager
def uploading(name: str) -> Iterator[None]:
    """Turn what the hub's client raises into an `InputError` that holds no token."""
    try:
        yield
    except InputError:
        raise
    except (HTTPError, OSError, RuntimeError) as error:  # the last for one in a thread
        if (refusal := disk_error(error)) is not None and refusal.errno in FULL:
            raise
        # "from None": the errors behind this one hold the headers of requests.
        answer = error if isinstance(error, HfHubHTTPError) else error.__cause__ or error
        raise InputError(_in_words(name, answer)) from None


def _in_words(name: str, error: Exception) -> str:
    """Why the hub did not do what was asked, and the remedy."""
    hub = huggingface_hub.constants.ENDPOINT
    if not isinstance(error, HfHubHTTPError):
        return (
            f"Cannot upload to {name}: {hub} cannot be reached or broke off "
            f"({type(error).__name__}). Run the same command again once it can be."
        )
    reason = error.server_message or next(iter(str(error).strip().splitlines()), "no reason given")
    remedy = {
        401: f"It does not know the token: make one at {hub}/settings/tokens and put HF_TOKEN=... "
        "into .env.",
        403: f"The token may not write there: give it that right at {hub}/settings/tokens.",
    }.get(error.response.status_code, "Run the same command again to go on.")
    return f"Cannot upload to {name}: {reason} {remedy}".replace(hub_token() or "\n", "...")
