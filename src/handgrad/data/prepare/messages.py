"""The layouts of a chat in a row, and the messages that each means.

{"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]}
{"prompt": "1 + 1?", "completion": "2"}      TRL's; or each a list of messages
{"conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]}      ShareGPT's
{"instruction": "Add.", "input": "1 + 1", "output": "2"}      Alpaca's
"""

from typing import Any

from handgrad.core.errors import HandgradError, did_you_mean
from handgrad.core.json_file import shown
from handgrad.data.json_lines import json_kind, json_object, whole_row
from handgrad.data.prepare.bounds import LONGEST_DOCUMENT
from handgrad.data.prepare.readers import RowParser

ROLES = ("system", "user", "assistant", "tool")
LAYOUTS = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"))
OTHERS = "or conversations, or instruction and output"
SHAREGPT = {"human": "user", "gpt": "assistant", "observation": "tool"}  # others are roles as they are
Chat = tuple[str, list[dict[str, Any]], list[Any] | None, int]  # place for errors, messages, tools, those of a prompt


def chats(on_error: str) -> RowParser:
    """A chat from every row of a file, for its reader."""
    return RowParser(chat_in, LAYOUTS, optional=("input", "tools"), on_error=on_error)


def chat_in(row: object, where: str) -> Chat:
    """Returns (where, messages, tools, how many of the first are a prompt's) of a row. HandgradError if it has none.

    >>> chat_in({"prompt": "1 + 1?", "completion": "2"}, "line 1")[1][1]
    {'role': 'assistant', 'content': '2'}
    """
    row = json_object(row, where)
    (found, num_prompt), tools = _listed(row), row.get("tools")
    if not isinstance(found, list) or not found:
        names = [name for name, value in row.items() if value is not None]
        got = f"an object with {', '.join(map(shown, names)) or 'neither'}" if found is None else "an empty list"
        got = json_kind(found) if found and not isinstance(found, list) else got
        rule = f"{where}: a row has a list of messages, or prompt and completion"
        raise HandgradError("data", rule, got, hint=OTHERS if found is None else "")
    if tools is not None and not isinstance(tools, list):
        raise HandgradError("data", f"{where}: tools are a list", json_kind(tools))
    messages = [_message(message, number, where) for number, message in enumerate(found, 1)]
    if (size := sum(len(message["content"]) for message in messages)) > LONGEST_DOCUMENT:
        rule = f"{where}: a chat must have at most {LONGEST_DOCUMENT:,} characters"
        raise HandgradError("data", rule, f"{size:,}")
    try:
        whole = whole_row({"messages": messages, "tools": tools})
    except RecursionError:
        raise HandgradError("data", f"{where}: must be JSON", "lists or objects nested too deeply") from None
    return where, whole["messages"], whole["tools"], num_prompt


def _listed(row: dict) -> tuple[Any, int]:
    """Returns (messages of a row in any layout, as they stand there, None if it is in none; those of a prompt)."""
    for name in ("messages", "conversations"):
        if row.get(name) is not None:
            return row[name], 0
    held = {name for name, value in row.items() if value is not None}  # a table of two layouts has nulls in one
    asked, answer = "prompt", "completion"
    if not {asked, answer} <= held:
        asked, answer = "instruction", "output"
    if not {asked, answer} <= held:
        return None, 0
    if asked == "prompt" and isinstance(row[asked], list) and isinstance(row[answer], list):
        return row[asked] + row[answer], len(row[asked])
    said, more = row[asked], row.get("input") if asked == "instruction" else ""
    if more is not None and more != "":
        said = f"{said}\n{more}" if isinstance(said, str) and isinstance(more, str) else [said, more]
    return [{"role": "user", "content": said}, {"role": "assistant", "content": row[answer]}], 1


def _message(message: Any, number: int, where: str) -> dict[str, Any]:
    """A message with a role and a content, without what is null in it. Raises HandgradError if it is none."""
    if isinstance(message, dict) and {"from", "value"} <= message.keys():
        rest = {key: value for key, value in message.items() if key not in ("from", "value")}
        said = message["from"]
        role = SHAREGPT.get(said, said) if isinstance(said, str) else said
        message = {"role": role, "content": message["value"], **rest}
    if isinstance(message, dict) and message.get("role") == "assistant" and message.get("tool_calls"):
        said = message.get("content")  # null or absent in OpenAI's form
        message = message | {"content": "" if said is None else said}
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise HandgradError("data", f"{where}: message {number} has a role and a content", json_kind(message))
    if message["role"] not in ROLES:
        rule, word = f"{where}: the role of message {number} is one of {', '.join(ROLES)}", str(message["role"])
        others = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
        raise HandgradError("data", rule, shown(word), hint=did_you_mean(word, ROLES, others))
    if not isinstance(message["content"], str):
        rule = f"{where}: the content of message {number} is a text"
        raise HandgradError("data", rule, json_kind(message["content"]))
    _check_weight(message.get("weight"), number, where)
    return {key: value for key, value in message.items() if value is not None}


def _check_weight(weight: Any, number: int, where: str) -> None:
    """Raises HandgradError for a weight that is none of OpenAI's. Which weights count: `ChatEncoder`."""
    if weight is None or (not isinstance(weight, bool) and weight in (0, 1)):
        return
    got = shown(weight) if json_kind(weight) == "a number" else json_kind(weight)
    raise HandgradError("data", f"{where}: the weight of message {number} is 0 or 1", got)
