"""What a model brings for chats: its template, and the special tokens that templates know by name.

A folder holds them in tokenizer_config.json, special_tokens_map.json and chat_template.jinja, llama.cpp's file in its
metadata. Data of chats, a run on them and its exports have those of the model that the data were made for.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from handgrad.core.disk import require_file, write_text
from handgrad.core.errors import HandgradError, did_you_mean, one_line
from handgrad.core.json_file import shown
from handgrad.tokenizers.base import Tokenizer
from handgrad.tokenizers.ends import CONFIG, SPECIAL, content, read_if_there

OWN = "chat_template.jinja"  # goes before the one in tokenizer_config.json
IN_GGUF = "tokenizer.chat_template"
TEMPLATES = {path.stem: path for path in sorted(Path(__file__).with_name("templates").glob("*.jinja"))}
MOST_BYTES = 1 << 20  # of a template
ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


@dataclass(frozen=True)
class OwnTemplate:
    """A model's own template.

    place: of the model, for errors;  name, source: of the template, empty if the model has none
    tokens: the model's special tokens by the names that templates give them, such as bos_token
    ends: ids that end its turns, as far as they are known
    """

    place: str = ""
    name: str = ""
    source: str = ""
    tokens: Mapping[str, str] = field(default_factory=dict)
    ends: tuple[int, ...] = ()

    def save(self, folder: Path) -> None:
        """Writes the template and the tokens into a folder, for `template_in_folder`; nothing if there is none."""
        if not self.source:
            return
        write_text(folder / OWN, self.source)
        if self.tokens:
            write_text(folder / SPECIAL, json.dumps(dict(self.tokens), ensure_ascii=False, indent=2) + "\n")


def template_in_folder(folder: Path) -> OwnTemplate:
    """Returns what a model's folder holds. Raises HandgradError if a file is damaged."""
    about = read_if_there(folder / CONFIG)
    named = read_if_there(folder / SPECIAL) | about
    found = {key: token for key, token in named.items() if key.endswith("_token") and isinstance(token, str | dict)}
    tokens = {key: content(token, f"{folder} gives {key}") or "" for key, token in found.items()}
    if (folder / OWN).is_file():
        return OwnTemplate(str(folder), str(folder / OWN), _read(folder / OWN), tokens)
    source = about.get("chat_template")
    if isinstance(source, list):  # several by name
        source = {one.get("name"): one.get("template") for one in source if isinstance(one, dict)}.get("default")
    if not isinstance(source, str):
        return OwnTemplate(str(folder), tokens=tokens)
    return OwnTemplate(str(folder), f"in {folder / CONFIG}", source, tokens)


def template_in_gguf(metadata: Mapping[str, Any], path: Path) -> OwnTemplate:
    """Returns what the metadata of a file of llama.cpp hold. Raises HandgradError for a template that is no text."""
    source, texts = metadata.get(IN_GGUF, ""), metadata.get("tokenizer.ggml.tokens")
    if not isinstance(source, str):
        raise HandgradError("chat", f"{path} gives {IN_GGUF} as text", shown(source))
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_id") for name in ("bos_token", "eos_token")}
    known = texts if isinstance(texts, list) else []
    tokens = {name: known[id] for name, id in ids.items() if type(id) is int and 0 <= id < len(known)}
    return OwnTemplate(str(path), f"in {path}" if source else "", source, tokens)


def variables(tokenizer: Tokenizer, own: OwnTemplate) -> dict[str, str]:
    """Returns the special tokens that a template is given: the model's own, else the tokenizer's begin and end."""
    ids = {"bos_token": tokenizer.begins[:1], "eos_token": tokenizer.ends[:1]}
    usual = {name: tokenizer.decode(found) for name, found in ids.items() if found}
    return usual | dict(own.tokens)


def find_template(word: str, own: OwnTemplate) -> tuple[str, str]:
    """Returns (name, source) of the template that `word` names; of an empty one, the model's own."""
    names = ", ".join(TEMPLATES)
    if not word and not own.source:
        hint = f"--template is one of {names}, or a file, for a model that has its special tokens"
        hint += "; without one, handgrad generate continues texts"
        raise HandgradError("chat", f"{own.place} holds a chat template, in {CONFIG} or {OWN}", "none", hint=hint)
    if not word:
        return own.name, own.source
    path = TEMPLATES.get(word, Path(word))
    if word not in TEMPLATES and not path.is_file():
        hint = did_you_mean(word, list(TEMPLATES))
        raise HandgradError("chat", f"--template is one of {names}, or a file", shown(word), hint=hint)
    return word, _read(path)


def _read(path: Path) -> str:
    """Returns the template in a file."""
    if (size := require_file(path, "a chat template", "chat")) > MOST_BYTES:
        raise HandgradError("chat", f"{path} must have at most {MOST_BYTES:,} bytes", f"{size:,}")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise HandgradError("chat", f"{path} must be readable UTF-8", one_line(error)) from None
