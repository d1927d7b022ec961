"""Chats as ids: a template writes messages as a text, the tokenizer makes ids of it, and a mask says which of them are
the assistant's: its contents, and the tokens that end its turns.

A template is a Jinja program, run in a sandbox with what transformers gives it. {% generation %} blocks say which text
is the assistant's. Without them, each turn is found in the text: it begins where the prompt of a reply would end, and
its content ends where the text stops to depend on it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from handgrad.core.disk import require_file
from handgrad.core.errors import HandgradError, did_you_mean, one_line
from handgrad.core.install import install_command
from handgrad.core.json_file import shown
from handgrad.tokenizers.base import Tokenizer
from handgrad.tokenizers.chars import CharTokenizer
from handgrad.tokenizers.ends import CONFIG, SPECIAL, content, read_if_there
from handgrad.tokenizers.file import library_must
from handgrad.tokenizers.folder import library_of

OWN = "chat_template.jinja"  # a model's own, if tokenizer_config.json does not hold it
TEMPLATES = {path.stem: path for path in sorted(Path(__file__).with_name("templates").glob("*.jinja"))}
MOST_BYTES = 1 << 20  # of a template
GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
CONTROL = re.compile(r"<\|\w+\|>|<\w+_of_turn>|</?s>|<[be]os>")  # what can only be meant as one token
PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
Message = Mapping[str, Any]
Chat = tuple[str, Sequence[Message], Sequence[Any] | None]  # its place for errors, its messages, the tools it may use
Span = tuple[int, int]  # of characters


class ChatEncoder:
    """Makes ids and masks of chats, with one tokenizer and one template.

    tokenizer: any but one of characters
    folder: the model's, whose files give its template and the special tokens that templates name
    template: one of TEMPLATES, or a file; empty: the model's own

    name, source: of the template

    Raises HandgradError if there is no such template, it is damaged, or it writes special tokens that the tokenizer
    lacks.

    >>> import tempfile
    >>> from handgrad.tokenizers import gpt2
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, OWN).write_text("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    ...     encoder = ChatEncoder(gpt2(), Path(folder))
    >>> [(ids, mask)] = encoder.encode([("a chat", PROBE, None)])
    >>> ids.tolist(), mask.tolist()
    ([64, 50256, 65, 50256], [0, 0, 1, 1])
    """

    def __init__(self, tokenizer: Tokenizer, folder: Path, template: str = ""):
        if isinstance(tokenizer, CharTokenizer):
            hint = "a model of words or bytes"
            raise HandgradError("chat", "chats need a tokenizer.json, or gpt2", "one of characters", hint=hint)
        self.name, self.source = find_template(template, folder)
        own = library_of(tokenizer)
        self._library = tokenizers.Tokenizer.from_str(own.to_str())  # the tokenizer's takes special tokens as text
        special = [token.content for token in own.get_added_tokens_decoder().values() if token.special]
        endings = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
        self._ending = re.compile(f" ?(?:{endings})" if special else "(?!)")
        self._has_blocks = GENERATION.search(self.source) is not None
        self._environment = _environment()
        self._variables = {} if tokenizer.eot is None else {"eos_token": own.id_to_token(tokenizer.eot)}
        self._variables |= special_tokens(folder)
        try:
            self._template = self._environment.from_string(self.source)
        except Exception as error:  # a TemplateSyntaxError, most often
            rule, line = f"the template {self.name} must be Jinja", getattr(error, "lineno", None)
            raise HandgradError("chat", rule, one_line(error) + (f" in line {line}" if line else "")) from None
        self._check_tokens(tokenizer.name)

    def encode(self, chats: Sequence[Chat]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns (ids (n,) int32, mask (n,) uint8: 1 for the assistant's) of each chat.

        A special token that a message spells becomes that token, as in transformers. Raises HandgradError, with the
        chat's place, if the template cannot write it or its turns cannot be told apart.
        """
        written = [self._write(*chat) for chat in chats]
        with library_must("the tokenizer must be able to encode the chats"):
            encoded = self._library.encode_batch([text for text, _ in written], add_special_tokens=False)
        return [(np.array(e.ids, np.int32), mask_of(e.offsets, spans)) for e, (_, spans) in zip(encoded, written)]

    def _check_tokens(self, name: str) -> None:
        try:
            text = self._render("a chat", PROBE, None)
        except HandgradError:
            return  # a chat that it takes will show
        found = dict.fromkeys(CONTROL.findall(text))
        missing = [token for token in found if len(self._library.encode(token, add_special_tokens=False).ids) != 1]
        if missing:
            rule = f"the template {self.name} writes special tokens that {name} has"
            raise HandgradError("chat", rule, f"no {', '.join(missing)}", hint="another --template, or another model")

    def _write(self, where: str, messages: Sequence[Message], tools: Sequence[Any] | None) -> tuple[str, list[Span]]:
        """Returns the text of a chat, and which of it is the assistant's."""
        if tools and "tools" not in self.source:
            raise HandgradError("chat", f"{where}: the template {self.name} has no place for tools", "a row with tools")
        spelled = json.dumps([messages, tools], ensure_ascii=False)
        marks = "".join(islice((c for c in map(chr, range(0xE000, 0xF8FF)) if c not in spelled), 2))
        if not self._has_blocks:
            text = self._render(where, messages, tools)
            turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
            return text, [self._turn(where, text, messages, tools, place, marks[0]) for place in turns]
        text, spans = "", []
        for place, piece in enumerate(re.split(f"[{marks}]", self._render(where, messages, tools, marks))):
            spans += [(len(text), len(text) + len(piece))] if place % 2 else []
            text += piece
        return text, spans

    def _turn(
        self, where: str, text: str, messages: Sequence[Message], tools: Sequence[Any] | None, place: int, mark: str
    ) -> Span:
        """Returns where a turn of the assistant lies in the text of a chat: what follows its header, to its end."""
        changed = [*messages[:place], {**messages[place], "content": mark}, *messages[place + 1 :]]
        before, found, after = self._render(where, changed, tools).partition(mark)
        content = len(before) if text.startswith(before) else -1
        begin, end = self._reply(messages[:place], tools, text, content), len(text) - len(after)
        if not found or not text.endswith(after) or not 0 <= begin <= end:
            rule = f"{where}: the assistant's text must be found in what the template {self.name} writes"
            hint = "put it into {% generation %} {% endgeneration %}"
            raise HandgradError("chat", rule, f"message {place + 1} is not there as it is", hint=hint)
        ending = self._ending.match(text, end)
        return begin, ending.end() if ending else end

    def _reply(self, messages: Sequence[Message], tools: Sequence[Any] | None, text: str, content: int) -> int:
        """Returns where the text replies to these messages: after what asks for it, else where the content begins.

        content: where that is, -1 if it is not known
        """
        try:
            asked, plain = (self._render("", messages, tools, asks=asks) for asks in (True, False))
        except HandgradError:  # it takes no chat that ends there
            return content
        has_no_header = len(asked) <= content and not text[len(asked) : content].strip()
        return len(asked) if text.startswith(asked) and (asked != plain or has_no_header) else content

    def _render(
        self, where: str, messages: Sequence[Message], tools: Sequence[Any] | None, marks: str = "", asks: bool = False
    ) -> str:
        """Returns what the template writes. marks: two characters, for the ends of blocks;  asks: for a reply"""
        self._environment.marks = marks
        given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": asks}
        try:
            return self._template.render(**self._variables | given)
        except Exception as error:  # whatever a program of somebody else's raises
            raise HandgradError("chat", f"{where}: the template {self.name} must write it", one_line(error)) from None


def find_template(word: str, folder: Path) -> tuple[str, str]:
    """Returns (name, source) of the template that `word` names; of an empty one, the model's own, in its folder."""
    path = TEMPLATES.get(word, Path(word))
    names = ", ".join(TEMPLATES)
    if not word:
        path, found = folder / OWN, read_if_there(folder / CONFIG).get("chat_template")
        if isinstance(found, list):  # several by name
            named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
            found = named.get("default")
        if not path.is_file() and isinstance(found, str):
            return f"in {folder / CONFIG}", found
        if not path.is_file():
            rule = f"{folder} holds a chat template, in {CONFIG} or {OWN}"
            raise HandgradError("chat", rule, "none", hint=f"--template is one of {names}, or a file")
    elif word not in TEMPLATES and not path.is_file():
        hint = did_you_mean(word, list(TEMPLATES))
        raise HandgradError("chat", f"--template is one of {names}, or a file", shown(word), hint=hint)
    if (size := require_file(path, "a chat template", "chat")) > MOST_BYTES:
        raise HandgradError("chat", f"{path} must have at most {MOST_BYTES:,} bytes", f"{size:,}")
    try:
        return word or str(path), path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise HandgradError("chat", f"{path} must be readable UTF-8", one_line(error)) from None


def special_tokens(folder: Path) -> dict[str, str]:
    """Returns the special tokens that a model's folder names: bos_token and its like."""
    named = read_if_there(folder / SPECIAL) | read_if_there(folder / CONFIG)
    found = {key: token for key, token in named.items() if key.endswith("_token") and isinstance(token, str | dict)}
    return {key: content(token, f"{folder} gives {key}") or "" for key, token in found.items()}


def mask_of(offsets: Sequence[Span], spans: Sequence[Span]) -> np.ndarray:
    """Returns which tokens lie in spans of the text, (n,) uint8: those that share characters, and those between them.

    offsets: the characters of each token, none if the library leaves white space out

    >>> mask_of([(0, 2), (2, 2), (2, 5), (5, 6)], [(1, 4)]).tolist()
    [1, 1, 1, 0]
    """
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    mask = np.zeros(len(starts), np.uint8)
    for begin, end in spans:
        inside = np.flatnonzero((starts < end) & (ends > begin) & (ends > starts))
        if inside.size:
            mask[inside[0] : inside[-1] + 1] = 1
    return mask


def _environment() -> Any:
    """Returns the sandbox of templates, with the {% generation %} block. HandgradError if jinja2 is not installed."""
    try:
        from jinja2 import TemplateError, ext, nodes, sandbox
    except ImportError:
        hint = install_command("chat")
        raise HandgradError("chat", "chat templates are run by jinja2", "no such package", hint=hint) from None

    class Generation(ext.Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Any) -> str:
            marks: Any = self.environment.marks  # type: ignore[attr-defined]
            return marks[:1] + caller() + marks[1:]

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    made.filters["tojson"] = to_json
    made.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return made
