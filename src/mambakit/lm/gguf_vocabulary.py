"""A tokenizer as llama.cpp keeps it: byte-level BPE, which it calls gpt2, from the tokenizer.json beside a model.

What its splitting can't express is left out of the file, with the reason, and llama.cpp then takes token ids alone.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambakit.errors import ArtefactError
from mambakit.training.artefacts import read_json

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama.cpp's kinds of tokens


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in the order of their ids, one for each row of the embedding."""

    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    end: int  # the token that ends a text
    begin: int
    pad: int | None
    note: str = ""  # what is lost

    @property
    def metadata(self) -> dict[str, Any]:
        """The file's entries by key."""
        entries = {
            "model": "gpt2",
            "pre": "gpt-2",  # the way it splits a text before it merges
            "tokens": self.tokens,
            "token_type": self.kinds,
            # llama.cpp refuses a file without merges, and a byte tokenizer has none. This one never applies: it
            # joins whole special tokens, and merging starts from bytes.
            "merges": self.merges or [f"{self.tokens[self.end]} {self.tokens[self.end]}"],
            "eos_token_id": self.end,
            "bos_token_id": self.begin,
            "add_bos_token": False,
            **({} if self.pad is None else {"padding_token_id": self.pad}),
        }
        return {f"tokenizer.ggml.{name}": value for name, value in entries.items()}


def vocabulary_of(folder: Path, rows: int) -> Vocabulary | str:
    """The vocabulary of the tokenizer in `folder`, padded to `rows` tokens; or why llama.cpp can't have it.

    Raises ArtefactError for a tokenizer with more tokens than rows, which is another model's.
    """
    if not (folder / "tokenizer.json").is_file():
        return f"{folder} has no tokenizer.json"
    whole = read_json(folder / "tokenizer.json")
    if reason := _inexpressible(whole):
        return f"its tokenizer {reason}"
    ids: dict[str, int] = whole["model"]["vocab"]
    added = {entry["id"]: entry for entry in whole.get("added_tokens") or []}
    tokens = {index: token for token, index in ids.items()} | {
        index: entry["content"] for index, entry in added.items()
    }
    if max(tokens, default=0) >= rows:
        raise ArtefactError(
            f"the tokenizer in {folder} has tokens up to {max(tokens)}, but the model knows {rows}: another model's?"
        )
    special = _special(folder)
    end = next((index for index, token in tokens.items() if token == special.get("eos_token")), None)
    if end is None:
        return "its tokenizer has no token that ends a text (eos_token)"
    numbers = {token: index for index, token in tokens.items()}
    return Vocabulary(
        [tokens.get(index, f"[PAD{index}]") for index in range(rows)],
        [_kind(index, tokens, added) for index in range(rows)],
        [merge if isinstance(merge, str) else " ".join(merge) for merge in whole["model"]["merges"]],
        end,
        numbers.get(special.get("bos_token") or "", end),
        numbers.get(special.get("pad_token") or ""),
        "the tokenizer's Unicode normalisation, which llama.cpp has no place for" if whole.get("normalizer") else "",
    )


def _inexpressible(whole: dict[str, Any]) -> str:
    """Why a tokenizer.json is not what llama.cpp calls gpt2; empty if it is."""
    model = whole.get("model") or {}
    if model.get("type") != "BPE":
        return f"is of the kind {model.get('type')}, not byte-level BPE"
    odd = ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "byte_fallback", "ignore_merges")
    if found := [name for name in odd if model.get(name)]:
        return f"sets {found[0]}"
    if (kind := (whole.get("normalizer") or {}).get("type", "NFC")) != "NFC":
        return f"normalises texts by {kind}"
    before = whole.get("pre_tokenizer") or {}
    if before.get("type") == "Sequence" and len(before.get("pretokenizers", [])) == 1:
        before = before["pretokenizers"][0]
    if before.get("type") != "ByteLevel" or before.get("add_prefix_space"):
        return "splits texts in another way than GPT-2's"
    if not before.get("use_regex", True) and model.get("merges"):
        return "merges across words"
    after = whole.get("post_processor") or {"type": "ByteLevel"}
    template = [piece for piece in after.get("single", []) if "SpecialToken" in piece]
    plain = after.get("type") in ("ByteLevel", "TemplateProcessing") and not template
    return "" if plain else f"adds tokens around a text ({after.get('type')})"


def _special(folder: Path) -> dict[str, str | None]:
    """The contents of the special tokens by name."""
    path = folder / "tokenizer_config.json"
    raw = read_json(path) if path.is_file() else {}
    names = ("eos_token", "bos_token", "pad_token")
    found = {name: raw.get(name) for name in names}
    return {name: token["content"] if isinstance(token, dict) else token for name, token in found.items()}


def _kind(index: int, tokens: dict[int, str], added: dict[int, dict[str, Any]]) -> int:
    if index not in tokens:
        return _UNUSED
    if index not in added:
        return _NORMAL
    return _CONTROL if added[index].get("special") else _USER_DEFINED
