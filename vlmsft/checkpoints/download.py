"""hf://organisation/model[@revision]: the files of a model from the Hugging Face hub, in the hub's own cache.

A transfer that was cut off goes on where it stopped, files that are there already aren't fetched again, and two
processes may fetch the same model. The variables of huggingface_hub hold: HF_TOKEN, HF_HOME, HF_ENDPOINT,
HF_HUB_OFFLINE.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from vlmsft.checkpoints.aside import check_space, is_disk_full, readable_bytes
from vlmsft.errors import Problem, UserError

SCHEME = "hf://"
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
# What stands beside the weights: configs, tokenizer, processor, chat template, licence
BESIDE = (
    "*config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
    "LICENSE*",
    "USE_POLICY*",
)
_SOURCE = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>\S+))?$")


@dataclass(frozen=True)
class Source:
    """A model of the hub; revision: a branch, a tag or a commit, None for the newest."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{SCHEME}{self.repo}" + (f"@{self.revision}" if self.revision else "")


def parse_source(text: str, key: str = "source") -> Source | None:
    """The hub's model that `text` names; None where it doesn't start with hf://.

    Raises UserError for a malformed one.
    """
    if not text.startswith(SCHEME):
        return None
    match = _SOURCE.match(text)
    if match is None:
        raise UserError(Problem(key, repr(text), "hf://organisation/model or hf://organisation/model@revision"))
    return Source(match["repo"], match["revision"])


def download(source: Source, cache_dir: str | Path | None = None, key: str = "source") -> Path:
    """The local folder that holds the model's files, after fetching those that are missing.

    cache_dir: None for the hub's own (HF_HUB_CACHE, or HF_HOME/hub)
    key: the config key that gave `source`, for messages
    Raises UserError where the hub refuses (with what to accept where), can't be reached or the disk gets full.
    """
    from huggingface_hub import snapshot_download

    cache = Path(_cache(cache_dir))
    try:
        missing = _missing_bytes(source, cache)
        if missing:
            cache.mkdir(parents=True, exist_ok=True)
            check_space(cache, missing, key)
        folder = snapshot_download(
            source.repo,
            revision=source.revision,
            cache_dir=cache,
            allow_patterns=[*WEIGHTS, *BESIDE],
            endpoint=os.environ.get("HF_ENDPOINT"),
        )
    except UserError:
        raise
    except Exception as error:
        raise _explained(source, error, cache, key) from error
    return Path(folder)


def _cache(cache_dir: str | Path | None) -> str | Path:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE if cache_dir is None else cache_dir


def _missing_bytes(source: Source, cache: Path) -> int:
    """What is to be fetched; 0 where the hub doesn't answer: what is in the cache may do."""
    import requests
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        info = api.model_info(source.repo, revision=source.revision, files_metadata=True)
    except (OfflineModeIsEnabled, requests.ConnectionError, requests.Timeout):
        return 0
    patterns = (*WEIGHTS, *BESIDE)
    files = [file for file in info.siblings or [] if any(fnmatch(file.rfilename, pattern) for pattern in patterns)]
    snapshot = cache / f"models--{source.repo.replace('/', '--')}" / "snapshots" / str(info.sha)
    return sum(file.size or 0 for file in files if not (snapshot / file.rfilename).exists())


def _explained(source: Source, error: Exception, cache: Path, key: str) -> UserError:
    if is_disk_full(error):
        import shutil

        free = readable_bytes(shutil.disk_usage(cache).free)
        remedy = "Make room, or point HF_HOME elsewhere; the same command goes on where it stopped"
        return UserError(Problem(key, f"{free} free at {cache}", f"room for {source}", remedy))
    found, remedy = _reason(source, error)
    return UserError(Problem(key, f"{source}: {found}", "a model that can be fetched", remedy))


def _reason(source: Source, error: Exception) -> tuple[str, str]:
    """(what happened, what to do)."""
    import requests
    from huggingface_hub import errors, get_token

    page = f"https://huggingface.co/{source.repo}"
    token = "https://huggingface.co/settings/tokens"
    resume = "Run the same command again: it goes on where it stopped"
    status = error.response.status_code if isinstance(error, requests.HTTPError) and error.response is not None else 0
    if isinstance(error, errors.GatedRepoError):
        if get_token() is None:
            remedy = f"Open {page}, accept the licence, make a token at {token} and set HF_TOKEN to it"
            return f"a gated model, and no HF_TOKEN ({status})", remedy
        remedy = f"Open {page} with the account of your HF_TOKEN, accept the licence and wait until access is granted; "
        remedy += f"a fine-grained token must also be allowed to read gated models ({token})"
        return f"a gated model that the account of HF_TOKEN may not read ({status})", remedy
    if isinstance(error, errors.RevisionNotFoundError):
        return f"no revision {source.revision!r} (404)", f"See the branches and tags at {page}/tree/main"
    if isinstance(error, errors.RepositoryNotFoundError):
        remedy = f"Check the name at {page}. A private model needs HF_TOKEN of an account that may read it"
        return f"no such model, or a private one ({status})", remedy
    if status == 401:
        return "the hub doesn't know this HF_TOKEN (401)", f"Make a new one at {token} and set HF_TOKEN to it"
    if status == 403:
        return (
            "HF_TOKEN may not read this model (403)",
            f"Open {page} and accept the licence; check the token at {token}",
        )
    if isinstance(error, errors.OfflineModeIsEnabled) or isinstance(error.__cause__, errors.OfflineModeIsEnabled):
        return (
            "HF_HUB_OFFLINE is set, and it is not in the cache",
            "Unset it, or copy the model into HF_HOME",
        )
    if status:
        return f"the hub answered {status}", resume
    if isinstance(error, (requests.RequestException, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)):
        return f"the hub can't be reached, or the connection broke ({type(error).__name__})", resume
    if "Consistency check failed" in str(error):  # fewer bytes came than were announced
        return "the connection broke", resume
    return f"{type(error).__name__}: {error}", resume
