"""What answers behind a URL, and what is known of its arithmetic for Llama-3.2-Vision."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import httpx

from vlmsft.errors import Problem, UserError

BUILTIN = "vlmsft builtin"
UNKNOWN = "unknown"
PROBE_SECONDS = 15.0
VERSION_PATHS = {"vllm": ("/version", "version"), "sglang": ("/get_server_info", "version")}
"""Where a server says its version, and under which key; below the URL without /v1."""


@dataclass(frozen=True)
class Served:
    """A model behind a URL.

    model: what requests call it
    engine: "vllm", "sglang", BUILTIN, as the user named it, or UNKNOWN
    version, transformers, dtype: None where the server doesn't say
    root: the folder or hub id of its weights, where the server says it (vLLM)
    """

    model: str
    engine: str
    version: str | None = None
    transformers: str | None = None
    dtype: str | None = None
    root: str | None = None


def probe(url: str, model: str | None, api_key: str, engine: str | None) -> Served:
    """Asks the server what it is.

    url: up to and with /v1
    model: as the server calls it; None = its only one
    engine: "name" or "name version", for servers that don't say; None = find out
    Raises UserError where nothing answers, or the model isn't there.
    """
    headers = {"Authorization": f"Bearer {api_key}"}
    with httpx.Client(timeout=PROBE_SECONDS, headers=headers, follow_redirects=True) as client:
        cards = _cards(client, url)
        card = _card(cards, url, model)
        name, version = _stated(engine) if engine else _found(client, url, card)
    return Served(str(card["id"]), name, version, card.get("transformers_version"), card.get("dtype"), card.get("root"))


def _cards(client: httpx.Client, url: str) -> list[dict[str, Any]]:
    address = f"{url}/models"
    expected = "an OpenAI-compatible server"
    try:
        response = client.get(address)
    except httpx.HTTPError as error:
        found = f"nothing that answers ({type(error).__name__}: {error})"
        raise UserError(Problem(address, found, expected, "Start it, or name another URL")) from None
    if response.status_code in (401, 403):
        remedy = "models={name: {source: URL, api_key_variable: MY_KEY}} names the environment variable that holds it"
        raise UserError(Problem(address, f"status {response.status_code}", "a key that the server takes", remedy))
    try:
        cards = response.json()["data"]
        return [card for card in cards if "id" in card]
    except (ValueError, KeyError, TypeError):
        found = f"status {response.status_code} and no list of models"
        remedy = "The URL ends with /v1 for most servers"
        raise UserError(Problem(address, found, expected, remedy)) from None


def _card(cards: list[dict[str, Any]], url: str, model: str | None) -> dict[str, Any]:
    names = [str(card["id"]) for card in cards]
    if model is not None:
        # hosted services don't list all that they serve
        return next((card for card in cards if card["id"] == model), {"id": model})
    if len(cards) != 1:
        found = f"{len(cards)} models ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
        remedy = f"models={{name: {{source: {url}, model: ...}}}}"
        raise UserError(Problem(url, found, "one, or the name of the one that is meant", remedy))
    return cards[0]


def _stated(engine: str) -> tuple[str, str | None]:
    name, _, version = engine.strip().partition(" ")
    return name.lower(), version.strip() or None


def _found(client: httpx.Client, url: str, card: dict[str, Any]) -> tuple[str, str | None]:
    owner = str(card.get("owned_by", "")).lower()
    if owner == "vlmsft":
        return BUILTIN, card.get("engine_version")
    if owner not in VERSION_PATHS:
        return UNKNOWN, None
    path, key = VERSION_PATHS[owner]
    try:
        return owner, str(client.get(url.removesuffix("/v1") + path).json()[key])
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return owner, None


# --- arithmetic -------------------------------------------------------------------------------------------------------

LAST_VLLM = (0, 10, 2)
FIRST_WRONG_TRANSFORMERS = (4, 55)

_SEQUENCE_MASK = (
    "tokens in front of the first image keep their cross-attention, which training leaves out for them; "
    "how much that changes is not measured"
)


def numerics_warnings(engine: str, version: str | None) -> list[str]:
    """What makes an engine's answers of Llama-3.2-Vision differ from the trained model's. Empty for none known.

    transformers 4.55 and newer: modeling_mllama.py takes the vision tower's intermediate states from after the layers;
    vLLM 0.10.2 and SGLang 0.5.23: get_full_text_row_masked_out_mask works per sequence; SGLang has no mask for images.
    """
    if engine == BUILTIN:
        return []
    number = version_number(version)
    if engine == "vllm":
        too_new = [f"vLLM {version} has no Llama-3.2-Vision: 0.10.2 was the last"] if number > LAST_VLLM else []
        return [*too_new, _SEQUENCE_MASK]
    if engine == "sglang":
        return [_SEQUENCE_MASK, "each token sees all pictures, those that come later too"]
    if engine == "transformers":
        if number and number[:2] < FIRST_WRONG_TRANSFORMERS:
            return []
        return ["transformers 4.55 and newer hand the projector the vision tower's states of one layer too late"]
    return ["unknown engine: its arithmetic for Llama-3.2-Vision may be another; name it with engine: 'vllm 0.10.2'"]


def version_number(text: str | None) -> tuple[int, ...]:
    """(0, 10, 2) of "0.10.2+cu128"; empty where there is none."""
    match = re.match(r"\d+(?:\.\d+)*", text or "")
    return tuple(int(part) for part in match[0].split(".")) if match else ()
