"""Chats as ids: a template writes messages as a text, the tokenizer makes ids of it, and a mask says which of them are
the assistant's: its contents, and the tokens that end its turns.

A template is a Jinja program, run in a sandbox with what transformers gives it. {% generation %} blocks say which text
is the assistant's. Without them, each turn is found in the text: it begins where the prompt of a reply would end, and
its content, tool calls included, ends where the text stops to depend on it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import Any

import numpy as np
import tokenizers

from handgrad.core.errors import HandgradError, one_line
from handgrad.core.install import install_command
from handgrad.tokenizers.base import Tokenizer
from handgrad.tokenizers.chars import CharTokenizer
from handgrad.tokenizers.file import library_must
from handgrad.tokenizers.folder import library_of
from handgrad.tokenizers.template import OwnTemplate, find_template, variables

GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
CONTROL = re.compile(r"<\|\w+\|>|<\w+_of_turn>|</?s>|<[be]os>")  # what can only be meant as one token
PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
Message = Mapping[str, Any]
Chat = tuple[str, Sequence[Message], Sequence[Any] | None, int]
"""Its place for errors, its messages, the tools it may use, and how many of the first messages are a prompt's.

An assistant's message with a "weight" of 0 is not learned, either."""
Span = tuple[int, int]  # of characters


class ChatEncoder:
    """Makes ids and masks of chats, with one tokenizer and one template.

    tokenizer: any but one of characters
    own: what the model brings (`template_in_folder`, `template_in_gguf`)
    template: one of TEMPLATES, or a file; empty: the model's own

    name, source: of the template;  tokens: the special tokens that it is given
    ends: the special token that ends a turn of the assistant, (id,), or () if no such token does

    Raises HandgradError if there is no such template, it is damaged, or it writes special tokens that the tokenizer
    lacks.

    >>> from handgrad.tokenizers import gpt2
    >>> own = OwnTemplate(source="{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    >>> encoder = ChatEncoder(gpt2(), own)
    >>> [(ids, mask)] = encoder.encode([("a chat", PROBE, None, 0)])
    >>> ids.tolist(), mask.tolist(), encoder.ends
    ([64, 50256, 65, 50256], [0, 0, 1, 1], (50256,))
    """

    def __init__(self, tokenizer: Tokenizer, own: OwnTemplate, template: str = ""):
        if isinstance(tokenizer, CharTokenizer):
            hint = "a model of words or bytes"
            raise HandgradError("chat", "chats need a tokenizer.json, or gpt2", "one of characters", hint=hint)
        self.tokenizer = tokenizer
        self.name, self.source = find_template(template, own)
        library = library_of(tokenizer)
        self._library = tokenizers.Tokenizer.from_str(library.to_str())  # the tokenizer's takes special tokens as text
        added = {token.content: id for id, token in library.get_added_tokens_decoder().items() if token.special}
        self._special = added
        self._spelled = "|".join(map(re.escape, sorted(added, key=len, reverse=True))) or "(?!)"
        self._ending = re.compile(f" ?(?:{self._spelled})")
        self._has_blocks = GENERATION.search(self.source) is not None
        self._environment = _environment()
        self.tokens = variables(tokenizer, own)
        try:
            self._template = self._environment.from_string(self.source)
        except Exception as error:  # a TemplateSyntaxError, most often
            rule, line = f"the template {self.name} must be Jinja", getattr(error, "lineno", None)
            raise HandgradError("chat", rule, one_line(error) + (f" in line {line}" if line else "")) from None
        self._check_tokens(tokenizer.name)
        self.ends = self._find_ends()

    def encode(self, chats: Sequence[Chat]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns (ids (n,) int32, mask (n,) uint8: 1 for the assistant's that are learned) of each chat.

        A special token that a message spells becomes that token, as in transformers. Raises HandgradError, with the
        chat's place, if the template cannot write it or its turns cannot be told apart.
        """
        written = [self._write(*chat) for chat in chats]
        with library_must("the tokenizer must be able to encode the chats"):
            encoded = self._library.encode_batch([text for text, _ in written], add_special_tokens=False)
        return [(np.array(e.ids, np.int32), mask_of(e.offsets, spans)) for e, (_, spans) in zip(encoded, written)]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Returns the ids that ask for a reply to these messages.

        A special token that a message spells is plain text: no message can end its turn. Raises HandgradError if the
        template does not take the messages.
        """
        marks = _marks(messages)
        before, after = marks[0], marks[1]
        guarded = [
            {**m, "content": re.sub(self._spelled, rf"{before}\g<0>{after}", m["content"], flags=re.DOTALL)}
            for m in messages
        ]
        text = self._render("the chat", guarded, None, asks=True)
        with library_must("the tokenizer must be able to encode the chat"):
            if before not in text:
                return self._library.encode(text, add_special_tokens=False).ids
            ids, at, plain = list[int](), 0, ""
            for found in re.finditer(f"{before}(.*?){after}|(?:{self._spelled})", text, re.DOTALL):
                plain, at = plain + text[at : found.start()] + (found[1] or ""), found.end()
                if found[1] is None:
                    ids, plain = [*ids, *self._as_text(plain), self._special[found[0]]], ""
            return [*ids, *self._as_text(plain + text[at:])]

    def check_system(self, system: str) -> None:
        """Raises HandgradError unless the template writes this system message."""
        rule = f"the template {self.name} takes a system message"
        messages = [{"role": "system", "content": system}, PROBE[0]]
        try:
            text = self._render("a chat", messages, None, asks=True)
        except HandgradError as error:
            raise HandgradError("chat", rule, error.got, hint="leave out --system") from None
        if system.strip() not in text:
            raise HandgradError("chat", rule, "one that it leaves out", hint="leave out --system")

    def _as_text(self, text: str) -> list[int]:
        """Returns the ids of a text in which special tokens are plain text."""
        self._library.encode_special_tokens = True
        try:
            return self._library.encode(text, add_special_tokens=False).ids
        finally:
            self._library.encode_special_tokens = False

    def _find_ends(self) -> tuple[int, ...]:
        try:
            [(ids, mask)] = self.encode([("a chat", PROBE, None, 0)])
        except HandgradError:  # it takes no such chat, or does not say what is the assistant's
            return ()
        last = ids[mask > 0][-1:].tolist()
        return tuple(id for id in last if id in self._special.values())

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

    def _write(
        self, where: str, messages: Sequence[Message], tools: Sequence[Any] | None, num_prompt: int
    ) -> tuple[str, list[Span]]:
        """Returns the text of a chat, and which of it is the assistant's, but for its first `num_prompt` messages and
        those of weight 0."""
        if tools and "tools" not in self.source:
            raise HandgradError("chat", f"{where}: the template {self.name} has no place for tools", "a row with tools")
        marks, replies = _marks([messages, tools]), [n for n, m in enumerate(messages) if m["role"] == "assistant"]
        silent = {n for n in replies if messages[n].get("weight") == 0}
        messages = [{key: value for key, value in m.items() if key != "weight"} for m in messages]
        self._check_calls(where, messages, tools)
        if not self._has_blocks:
            text = self._render(where, messages, tools)
            turns = [n for n in replies if n >= num_prompt and n not in silent]
            return text, [self._turn(where, text, messages, tools, place, marks[0]) for place in turns]
        text, spans = "", []
        for place, piece in enumerate(re.split(f"[{marks}]", self._render(where, messages, tools, marks))):
            spans += [(len(text), len(text) + len(piece))] if place % 2 else []
            text += piece
        if silent and len(spans) != len(replies):
            rule = f"{where}: a weight of 0 takes a template that writes a block for each message of the assistant's"
            raise HandgradError("chat", rule, f"{len(spans)} for {len(replies)}", hint="another --template")
        first = self._blocks(where, messages[:num_prompt], tools, marks)
        left = {number for number, place in enumerate(replies) if place in silent}
        return text, [span for number, span in enumerate(spans) if number >= first and number not in left]

    def _blocks(self, where: str, messages: Sequence[Message], tools: Sequence[Any] | None, marks: str) -> int:
        """Returns how many blocks the template writes of a prompt."""
        if all(message["role"] != "assistant" for message in messages):  # a template may take no such messages alone
            return 0
        return self._render(where, messages, tools, marks).count(marks[0])

    def _check_calls(self, where: str, messages: Sequence[Message], tools: Sequence[Any] | None) -> None:
        """Raises HandgradError for tool calls that the template leaves out: what is left of such a turn is empty."""
        calling = [place for place, message in enumerate(messages) if message.get("tool_calls")]
        text = self._render(where, messages, tools) if calling else ""
        for place in calling:
            try:
                without = self._render(where, _replaced(messages, place, messages[place]["content"]), tools)
            except HandgradError:  # it takes no such chat without them
                continue
            if text == without:
                rule = f"{where}: the template {self.name} must write tool calls"
                raise HandgradError("chat", rule, f"those of message {place + 1} left out", hint="another --template")

    def _turn(
        self, where: str, text: str, messages: Sequence[Message], tools: Sequence[Any] | None, place: int, mark: str
    ) -> Span:
        """Returns where a turn of the assistant lies in the text of a chat: what follows its header, to its end."""
        before, found, after = self._render(where, _replaced(messages, place, mark), tools).partition(mark)
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
            return self._template.render(**self.tokens | given)
        except Exception as error:  # whatever a program of somebody else's raises
            raise HandgradError("chat", f"{where}: the template {self.name} must write it", one_line(error)) from None


def _replaced(messages: Sequence[Message], place: int, content: str) -> list[Message]:
    """Returns the messages, the one at `place` with another content, and without tool calls."""
    rest = {key: value for key, value in messages[place].items() if key != "tool_calls"}
    return [*messages[:place], rest | {"content": content}, *messages[place + 1 :]]


def _marks(*values: Any) -> str:
    """Returns two characters that none of these values holds."""
    spelled = json.dumps(values, ensure_ascii=False, default=str)  # a Parquet table may hold dates
    return "".join(islice((c for c in map(chr, range(0xE000, 0xF8FF)) if c not in spelled), 2))


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
