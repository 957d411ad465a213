"""Sharing a pipeline folder on the Hugging Face Hub.

The client finds the token by itself (`hf auth login`, HF_TOKEN): it is no setting, and never in our hands.
"""

import contextlib
import json
import shlex
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, set_client_factory
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import _http

from jit_accel.base.console import redacted, say, warn
from jit_accel.base.errors import UserError, message_of
from jit_accel.config.run_groups import HubConfig
from jit_accel.model.card import refresh_card, without_places

LOGIN_TIMEOUT_S = 10.0
# Without a byte in either direction; by default the client waits for ever.
SILENCE_TIMEOUT_S = 120.0
# The parts of a pipeline folder; what else may lie about in it is not shared.
SHARED_FOLDERS = (".", "transformer", "scheduler")
SHARED_SUFFIXES = (".json", ".safetensors", ".md", ".png", ".webp", ".gif", ".svg", ".csv", ".py")
UNFINISHED = (".", "tmp_")  # how hidden files begin, and those that a stopped process left
EVALUATIONS = "evaluation*.json"
REASONS = {
    401: "the Hub refuses the token: log in again (hf auth login), or set HF_TOKEN to a valid one.",
    403: "the token may not write to {repo_id}: log in with one that may (hf auth login), or change --hub_model_id.",
    404: "the token may not write to {repo_id}, or make it: check --hub_model_id, or log in with one that may.",
    413: "the Hub finds it too large.",
    429: "the Hub asks to wait (429): try again later.",
}


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Let requests of the Hub's client give up after this long without an answer."""
    make_client = _http._GLOBAL_CLIENT_FACTORY  # there is no public way to ask for it

    def make_patient_client():
        client = make_client()
        client.timeout = seconds
        return client

    set_client_factory(make_patient_client)  # not the session's timeout: it makes new ones after broken connections
    try:
        yield
    finally:
        set_client_factory(make_client)


def check_login(repo_id: str) -> None:
    """Raise `UserError` where nobody is logged in, or the token is refused or may not write there.

    Takes no longer than `LOGIN_TIMEOUT_S`; a Hub that does not answer is only warned of: it may by then.
    """
    try:
        with patience(LOGIN_TIMEOUT_S):
            account = HfApi().whoami()
    except LocalTokenNotFoundError:
        rule = "nobody is logged in to the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN to a token that may "
        raise UserError(f"{rule}write.", about="push_to_hub") from None
    except Exception as error:  # of the client, of the network, of JSON
        if status_of(error) in (401, 403) or isinstance(error, OfflineModeIsEnabled):
            raise UserError(reason_of(error, repo_id), about="push_to_hub") from None
        warn(f"--push_to_hub: the login cannot be checked now ({reason_of(error, repo_id)})")
        return
    if ((account.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise UserError("the token may only read: log in with one that may write (hf auth login).", about="push_to_hub")
    owners = (account, *(account.get("orgs") or ()))
    writable = [str(owner["name"]) for owner in owners if owner.get("name")]
    if writable and repo_id.partition("/")[0].lower() not in [name.lower() for name in writable]:
        rule = f"the login may write to {', '.join(writable)} only: change the owner, or log in as another "
        raise UserError(f"{rule}(hf auth login).", about="hub_model_id", value=repo_id)


def push_folder(folder: Path, repo_id: str, private: bool = False) -> str:
    """Upload a pipeline folder in one commit, after its card was brought up to date. Returns its address.

    Raises `UserError` where the Hub does not take it; the folder is as it was, but for the card.
    """
    try:
        refresh_card(folder, repo_id)
    except Exception as error:  # of YAML and of whatever people wrote into it; a card is worth no push
        warn(f"{folder / 'README.md'}: left as it is, because it cannot be brought up to date ({error}).")
    api = HfApi()
    try:
        with patience(SILENCE_TIMEOUT_S):
            api.create_repo(repo_id, private=private or None, exist_ok=True)  # None: as the owner has it by default
            if private and not api.model_info(repo_id).private:  # one that existed stays as it was
                rule = f"{repo_id} exists and is public: make it private in its settings on the Hub, or give another "
                raise UserError(f"{rule}--hub_model_id.", about="hub_private")
            operations = [CommitOperationAdd(name, content) for name, content in shared_files(folder).items()]
            api.create_commit(repo_id, operations, commit_message="Upload pipeline")
    except UserError:
        raise
    except Exception as error:  # of the client, of the network, of the disk
        raise UserError(f"{folder} was not pushed: {reason_of(error, repo_id)}", about="push_to_hub") from None
    return f"{api.endpoint}/{repo_id}"


def shared_files(folder: Path) -> dict[str, Path | bytes]:
    """Return what is pushed of a pipeline folder, by path inside it. Its other folders are not looked into."""
    found = {}
    for file in (file for name in SHARED_FOLDERS for file in (folder / name).glob("*") if file.is_file()):
        if file.suffix in SHARED_SUFFIXES and not file.name.startswith(UNFINISHED):
            content = file
            if file.match(EVALUATIONS):
                with contextlib.suppress(ValueError):  # of a file that is not JSON
                    bare = without_places(json.loads(file.read_text(encoding="utf-8")))
                    content = json.dumps(bare, indent=1, ensure_ascii=False).encode()
            found[file.relative_to(folder).as_posix()] = content
    return dict(sorted(found.items()))


def share(folder: Path, hub: HubConfig) -> None:
    """Push at the end of a training, which never fails for it: what stood in the way is a warning."""
    again = f"python -m jit_accel.convert --input {shlex.quote(str(folder))} --push_to_hub"
    again += f" --hub_model_id {hub.hub_model_id}{' --hub_private' * hub.hub_private}"
    safe = f"The pipeline is safe in {folder}; push it again with:\n  {again}"
    try:
        say(f"Pushed:     {push_folder(folder, hub.hub_model_id, private=hub.hub_private)}")
    except UserError as error:
        warn(f"{message_of(error)} {safe}")
    except KeyboardInterrupt:
        warn(f"the upload was interrupted. {safe}")
        raise


def status_of(error: Exception) -> int | None:
    """Return the HTTP status that an error of the Hub's client reports."""
    return getattr(getattr(error, "response", None), "status_code", None)


def reason_of(error: Exception, repo_id: str) -> str:
    """Return what went wrong, in a sentence with a remedy."""
    status, kind = status_of(error), type(error).__name__
    if status in REASONS:
        return REASONS[status].format(repo_id=repo_id)
    if status is not None and status >= 500:
        return f"the Hub has trouble ({status}): try again later."
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, which forbids it: unset it, or leave the flag out."
    if "Timeout" in kind:
        return "the Hub does not answer: try again later, or see whether the network reaches it."
    if "Connect" in kind or isinstance(error, ConnectionError):
        return f"{constants.ENDPOINT} cannot be reached: see whether the network (HF_ENDPOINT, proxy) is right."
    detail = (str(error).strip().splitlines() or [kind])[0]
    return redacted(f"{kind}: {detail}.")
