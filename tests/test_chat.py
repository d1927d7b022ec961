"""Chat data: ids and masks as transformers makes them, from five templates; and what is refused, in one line."""

import json
import re

import numpy as np
import pytest
import tokenizers as library
from chats import FIRST, MESSAGES, ONE, SECOND, SPECIAL, SYSTEM, TWO, rows, tokenizer_folder, write_rows

from handgrad import data, tokenizers
from handgrad.cli.__main__ import main
from handgrad.core.errors import HandgradError
from handgrad.data.packing import Packing
from handgrad.data.prepare.messages import chat_in
from handgrad.data.shards import BEGINS, LEARNED, MARK
from handgrad.tokenizers.template import OWN, TEMPLATES

pytest.importorskip("jinja2")

TOOLS = [
    *MESSAGES[1:],
    {"role": "tool", "content": "sunny"},
    {"role": "tool", "content": "warm"},
    {"role": "assistant", "content": "Go out"},
]


def call(name, arguments):
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


CALLS = [
    MESSAGES[1],
    {"role": "assistant", "content": "", "tool_calls": [call("sky", {"of": "Köln", "days": [1, 2]}), call("now", {})]},
    *TOOLS[-3:],
    {"role": "user", "content": SECOND},
    {"role": "assistant", "content": ONE, "tool_calls": [{"name": "sum", "arguments": '{"x": 2}'}]},
]


def expected(name):
    """What each family's own template writes of MESSAGES, by hand; the assistant's text between « and »."""
    one, two, first = ONE.strip(), TWO.strip(), FIRST.strip()
    if name == "llama3":
        parts = [("system", SYSTEM), ("user", first), ("assistant", one), ("user", SECOND), ("assistant", two)]
        turns = [(f"<|start_header_id|>{role}<|end_header_id|>\n\n", f"{text}<|eot_id|>", role) for role, text in parts]
        return "<|begin_of_text|>" + "".join(
            head + (f"«{body}»" if role == "assistant" else body) for head, body, role in turns
        )
    if name in ("qwen2.5", "chatml"):
        return (
            f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{FIRST}<|im_end|>\n"
            f"<|im_start|>assistant\n«{ONE}<|im_end|>»\n<|im_start|>user\n{SECOND}<|im_end|>\n"
            f"<|im_start|>assistant\n«{TWO}<|im_end|>»\n"
        )
    if name == "gemma":
        return (
            f"<bos><start_of_turn>user\n{SYSTEM}\n\n{first}<end_of_turn>\n<start_of_turn>model\n«{one}<end_of_turn>»\n"
            f"<start_of_turn>user\n{SECOND}<end_of_turn>\n<start_of_turn>model\n«{two}<end_of_turn>»\n"
        )
    return f"<s>[INST] {SYSTEM}\n\n{FIRST}[/INST]« {one}</s>»[INST] {SECOND}[/INST]« {two}</s>»"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders with a tokenizer.json, by template."""
    return {name: tokenizer_folder(tmp_path_factory.mktemp("tokenizer"), name) for name in SPECIAL}


def encoder(folder, template=""):
    own = tokenizers.template_in_folder(folder)
    return tokenizers.ChatEncoder(tokenizers.from_file(folder / "tokenizer.json"), own, template)


def unmarked(name):
    source = TEMPLATES[name].read_text()
    source = source.replace("{%- generation %}", "{%- if true %}").replace("{% endgeneration %}", "{% endif %}")
    assert "{% generation" not in source and "generation %}" not in source
    return source


@pytest.mark.parametrize("name", SPECIAL)
def test_ids_and_masks_are_those_of_transformers(made, name, tmp_path):
    """And the masks are those of the text by hand, through the library's offsets; with and without blocks."""
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(made[name] / "tokenizer.json"))
    fast.chat_template = TEMPLATES[name].read_text()
    (tmp_path / "plain.jinja").write_text(unmarked(name))
    ours, plain = encoder(made[name], name), encoder(made[name], str(tmp_path / "plain.jinja"))
    chats = [MESSAGES, MESSAGES[1:], MESSAGES[1:3]] + ([TOOLS] if name in ("llama3", "qwen2.5", "chatml") else [])
    chats += [[*MESSAGES[1:2], REPLY | {"content": ""}]] + ([CALLS] if name == "qwen2.5" else [])
    rows = [(f"row {n}", chat, None, 0) for n, chat in enumerate(chats)]
    for chat, (ids, mask), (same, derived) in zip(chats, ours.encode(rows), plain.encode(rows), strict=True):
        want = fast.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
        assert ids.tolist() == want["input_ids"] == same.tolist()
        assert mask.tolist() == want["assistant_masks"] == derived.tolist() and 0 < mask.sum() < mask.size
    text, own = "", set()
    for place, piece in enumerate(re.split("[«»]", expected(name))):
        own |= set(range(len(text), len(text) + len(piece))) if place % 2 else set()
        text += piece
    encoded = library.Tokenizer.from_file(str(made[name] / "tokenizer.json")).encode(text, add_special_tokens=False)
    ids, mask = ours.encode(rows)[0]
    assert ids.tolist() == encoded.ids
    assert mask.tolist() == [bool(own & set(range(*offsets))) for offsets in encoded.offsets]


@pytest.mark.parametrize("name", SPECIAL)
def test_replies_of_a_prompt_are_not_learned(made, name, tmp_path):
    """The mask is that of transformers, but for what its prompt of the first messages holds, as in TRL."""
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(made[name] / "tokenizer.json"))
    fast.chat_template = TEMPLATES[name].read_text()
    (tmp_path / "plain.jinja").write_text(unmarked(name))
    want = fast.apply_chat_template(MESSAGES, return_assistant_tokens_mask=True, return_dict=True)
    for template in (name, str(tmp_path / "plain.jinja")):
        for count in (1, 2, 3, 4):
            [(ids, mask)] = encoder(made[name], template).encode([("a row", MESSAGES, None, count)])
            prompt = fast.apply_chat_template(MESSAGES[:count], add_generation_prompt=count % 2 == 0)["input_ids"]
            learned = [0] * len(prompt) + want["assistant_masks"][len(prompt) :]
            assert ids.tolist() == want["input_ids"] and mask.tolist() == learned and 0 < sum(learned)


@pytest.mark.parametrize("name", SPECIAL)
def test_a_weight_of_0_leaves_a_message_out_of_the_loss(made, name, tmp_path):
    """Ids are those without weights; the mask is that of a prompt up to there, and that of the chat that ends before."""
    (tmp_path / "plain.jinja").write_text(unmarked(name))

    def weighted(*weights):
        return [m if w is None else m | {"weight": w} for m, w in zip(MESSAGES, weights, strict=True)]

    for template in (name, str(tmp_path / "plain.jinja")):
        ours = encoder(made[name], template)
        chats = [weighted(0, None, 0, None, 1), weighted(None, 1, 1, None, 0.0), weighted(None, None, 1, None, 1)]
        rows = [("", chat, None, 0) for chat in chats] + [("", MESSAGES, None, 3), ("", MESSAGES, None, 0)]
        first, second, both, prompted, plain = ours.encode(rows)
        [(start, learned)] = ours.encode([("", MESSAGES[:3], None, 0)])
        assert all(ids.tolist() == plain[0].tolist() for ids, _ in (first, second, both))
        assert first[1].tolist() == prompted[1].tolist() and both[1].tolist() == plain[1].tolist()
        learned = np.append(learned, np.zeros(len(plain[0]) - len(start), learned.dtype))
        assert second[1].tolist() == learned.tolist()
        assert 0 < first[1].sum() < plain[1].sum() and (first[1] + second[1]).tolist() == plain[1].tolist()


def test_weights_and_templates(made, tmp_path):
    """A template never sees a weight; one that joins messages in a block cannot leave one of them out."""
    (tmp_path / "json.jinja").write_text(
        "{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}"
    )
    joined = "{% generation %}{% for m in messages[1:] %}{{ m.content }}{% endfor %}{% endgeneration %}"
    (tmp_path / "joined.jinja").write_text(joined)
    chats = [[REPLY | {"weight": w}, REPLY] for w in (0, 1)]
    [(ids, mask), (same, _)] = encoder(made["chatml"], str(tmp_path / "json.jinja")).encode(
        [("a row", chat, None, 0) for chat in chats]
    )
    assert ids.tolist() == same.tolist() and mask.tolist() == [0] * (len(ids) // 2) + [1] * (len(ids) // 2)
    with pytest.raises(HandgradError, match="a row: a weight of 0 takes a template .*, but got 1 for 2"):
        encoder(made["chatml"], str(tmp_path / "joined.jinja")).encode([("a row", [USER, *chats[0]], None, 0)])


def test_tool_calls_are_learned(made, tmp_path):
    """As Qwen2.5 writes them. Its own template has no blocks, and no line for a content that is empty."""
    source = """{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' + m.content if m.content }}
    {%- for call in m.tool_calls %}{% set call = call.function or call %}
{{ '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
    {{- call.arguments if call.arguments is string else call.arguments | tojson }}{{ '}\n</tool_call>' }}
    {%- endfor %}{{ '<|im_end|>\n' }}{% endfor %}
    {%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
    (tmp_path / "own.jinja").write_text(source)
    sky = '<tool_call>\n{"name": "sky", "arguments": {"of": "Köln", "days": [1, 2]}}\n</tool_call>\n'
    now = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|im_end|>'
    added = f'{ONE}\n<tool_call>\n{{"name": "sum", "arguments": {{"x": 2}}}}\n</tool_call><|im_end|>'
    for template in ("qwen2.5", str(tmp_path / "own.jinja")):
        ours = encoder(made["qwen2.5"], template)
        [(ids, mask)] = ours.encode([("a row", CALLS, None, 0)])
        runs = np.split(ids, np.flatnonzero(np.diff(mask)) + 1)[1::2]
        assert [ours.tokenizer.decode(run) for run in runs] == [sky + now, "Go out<|im_end|>", added]
    bare = [USER, REPLY | {"content": "", "tool_calls": [{"name": "now"}, call("now", "")]}]
    ours = encoder(made["qwen2.5"], "qwen2.5")
    [(ids, mask)] = ours.encode([("a row", bare, None, 0)])
    assert ours.tokenizer.decode(ids[mask > 0]) == now.replace("<|im_end|>", "\n") + now  # arguments are an object


def test_a_models_own_template_and_its_special_tokens(made, tmp_path):
    """tokenizer_config.json, a list of templates in it, and chat_template.jinja, which goes before."""
    folder = tmp_path
    (folder / "tokenizer.json").write_bytes((made["chatml"] / "tokenizer.json").read_bytes())
    source = "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    about = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>", "add_bos_token": True}
    start, end = (encoder(made["chatml"], "chatml")._library.token_to_id(t) for t in about_texts(about))
    for template in (source, [{"name": "tools", "template": "x"}, {"name": "default", "template": source}]):
        (folder / "tokenizer_config.json").write_text(json.dumps(about | {"chat_template": template}))
        [(ids, mask)] = encoder(folder).encode([("a row", [dict(m, content="us") for m in MESSAGES[1:3]], None, 0)])
        us = ids[1]
        assert ids.tolist() == [start, us, end, us, end] and mask.tolist() == [0, 0, 0, 1, 1]
    (folder / OWN).write_text(
        "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}A: {{ m.content }}{% endfor %}"
    )
    [(ids, mask)] = encoder(folder).encode([("a row", MESSAGES[1:3], None, 0)])
    assert tokenizers.from_file(folder / "tokenizer.json").decode(ids[mask > 0]) == ONE  # the header is not its own


def about_texts(about):
    return about["bos_token"]["content"], about["eos_token"]


def test_a_template_that_changes_earlier_turns(made, tmp_path):
    """As Qwen3's: the last reply has a block of thoughts that earlier ones lack, and the prompt does not give it."""
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}{{ '(thinks) ' }}{% endif %}{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    (tmp_path / "t.jinja").write_text(source)
    [(ids, mask)] = encoder(made["chatml"], str(tmp_path / "t.jinja")).encode([("a row", MESSAGES, None, 0)])
    text = tokenizers.from_file(made["chatml"] / "tokenizer.json")
    runs = np.split(ids, np.flatnonzero(np.diff(mask)) + 1)[1::2]
    assert [text.decode(run) for run in runs] == [f"{ONE}<|im_end|>", f"(thinks) {TWO}<|im_end|>"]


def test_marks_in_a_message_are_text(made):
    """The characters that stand for the ends of blocks are others where a message has them."""
    chat = [{"role": "user", "content": "\ue000\ue001"}, {"role": "assistant", "content": "\ue002 a"}]
    [(ids, mask)] = encoder(made["chatml"], "chatml").encode([("a row", chat, None, 0)])
    assert tokenizers.from_file(made["chatml"] / "tokenizer.json").decode(ids[mask > 0]) == "\ue002 a<|im_end|>"


# shards ---------------------------------------------------------------------------------------------------------------


def chat(folder, source, *words, template="chatml", out="chat"):
    return main(
        [
            "data",
            "chat",
            source,
            "--model",
            f"{folder}/tokenizer.json",
            "--template",
            template,
            "--out",
            str(out),
            *words,
        ]
    )


def test_shards_and_marks_hold_every_row_once(made, tmp_path, capsys):
    source, out = write_rows(tmp_path / "a.jsonl", rows()), tmp_path / "out"
    assert chat(made["chatml"], source, "--shard-tokens", "700", "--val-fraction", "0.1", out=out) == 0
    said, meta = capsys.readouterr().out, json.loads((out / "meta.json").read_text())
    want = encoder(made["chatml"], "chatml").encode(
        [(str(n), chat_in(row, "")[1], None, 0) for n, row in enumerate(rows())]
    )
    held = {"train": [n for n in range(40) if n % 10], "val": [n for n in range(40) if n % 10 == 0]}
    for split, numbers in held.items():
        shards = sorted(out.glob(f"{split}_*.bin"))
        assert [path.name for path in shards] == meta[split]["shards"] and (split == "val" or len(shards) > 2)
        ids = np.concatenate([data.open_shard(path).read() for path in shards])
        marks = np.concatenate([data.open_shard(path.with_suffix(".mask")).read() for path in shards])
        assert ids.tolist() == np.concatenate([want[n][0] for n in numbers]).tolist()
        begins = np.cumsum([0, *(want[n][0].size for n in numbers)])[:-1]
        masks = np.concatenate([want[n][1] for n in numbers])
        masks[begins] |= BEGINS
        assert marks.dtype == MARK and marks.tolist() == masks.tolist()
        assert all(data.open_shard(path.with_suffix(".mask")).read()[0] & BEGINS for path in shards)  # whole rows
        learned = int((masks & LEARNED).sum())
        assert meta[split] | {"shards": []} == {
            "tokens": ids.size,
            "assistant": learned,
            "rows": len(numbers),
            "shards": [],
        }
        assert f"{len(numbers)} rows, {ids.size:,} tokens, {learned:,} of them the assistant's" in said
    longest, about = max(ids.size for ids, _ in want), {"ends": [266], "tokens": {"eos_token": "<|endoftext|>"}}
    assert meta["chat"] == {"template": "chatml", "longest": longest} | about
    assert (out / "chat_template.jinja").read_text() == TEMPLATES["chatml"].read_text()
    assert (
        main(["data", "check", str(out)]) == 0
        and len(list(out.iterdir())) == int(re.search(r"(\d+) files", capsys.readouterr().out)[1]) + 1
    )


@pytest.mark.parametrize(("letters", "window"), [(10, 128), (200, 256), (300, 512)])
def test_the_window_that_is_suggested_holds_the_longest_row(made, tmp_path, capsys, letters, window):
    source = write_rows(
        tmp_path / "a.jsonl", [{"prompt": "1", "completion": "2"}, {"prompt": "1", "completion": "z" * letters}]
    )
    assert chat(made["chatml"], source, out=tmp_path / "out") == 0
    assert f" --seq-len {window} --micro-batch 4 --batch-tokens {4 * window} --lr 1e-4" in capsys.readouterr().out


def test_a_folder_holds_one_data_set(made, tmp_path, capsys):
    """What a killed run left is not taken over, and a text that replaces chats leaves no marks."""
    source, out = write_rows(tmp_path / "a.jsonl", rows(9)), tmp_path / "out"
    (out / ".preparing").mkdir(parents=True)
    for name in ("train_000007.bin", "train_000007.mask", "other.json", "progress.json"):
        (out / ".preparing" / name).write_text("left")
    assert chat(made["chatml"], source, out=out) == 0
    shards = {f"{split}_000000.{end}" for split in ("train", "val") for end in ("bin", "mask")}
    about = {"SHA256SUMS", "meta.json", "tokenizer.json"}
    assert {path.name for path in out.iterdir()} == shards | about | {OWN}
    assert chat(made["chatml"], source, template="qwen2.5", out=out) == 2
    assert (
        "tokens of another, or by another tokenizer. hint: use another --out, or --replace" in capsys.readouterr().err
    )
    (tmp_path / "a.txt").write_text("Hello us " * 99)
    words = ["--tokenizer", f"{made['chatml']}/tokenizer.json", "--out", str(out), "--replace"]
    assert main(["data", "text", str(tmp_path / "a.txt"), *words]) == 0
    assert not list(out.glob("*.mask")) and "chat" not in json.loads((out / "meta.json").read_text())
    assert main(["data", "check", str(out)]) == 0


USER = {"role": "user", "content": "a"}
REPLY = {"role": "assistant", "content": "b"}
BAD = {
    "no rows": ([""], "a.jsonl must hold rows, but got 0 in 1 file"),
    "one row": ([{"messages": [USER, REPLY]}], "val_fraction 0.05 must leave rows for train, but got 1 in all"),
    "not JSON": (["{"], "line 2: must be JSON"),
    "no chat": (
        [{"text": "a"}],
        "line 2: a row has a list of messages, or prompt and completion, but got an object with text",
    ),
    "no messages": ([{"messages": []}], "line 2: a row has a list of messages, .* but got an empty list"),
    "role": (
        [{"messages": [USER, REPLY | {"role": "bot"}]}],
        "line 2: the role of message 2 is one of .*, but got bot. hint: did you mean assistant",
    ),
    "no content": ([{"messages": [{"role": "user"}]}], "line 2: message 1 has a role and a content"),
    "content": ([{"messages": [USER | {"content": None}]}], "line 2: the content of message 1 is a text, but got null"),
    "no reply": ([{"messages": [USER]}], "line 2: a row must have a token of the assistant's, but got none of"),
    "prompt": ([{"prompt": "a", "completion": ["b"]}], "line 2: the content of message 2 is a text, but got a list"),
    "weight": (
        [{"messages": [USER, REPLY | {"weight": 2}]}],
        "line 2: the weight of message 2 is 0 or 1, but got 2\\. hint",
    ),
    "weight in words": (
        [{"messages": [USER, REPLY | {"weight": "0"}]}],
        "line 2: the weight .* 0 or 1, but got a text",
    ),
    "weight is no number": (
        [{"messages": [USER, REPLY | {"weight": False}]}],
        "line 2: the weight .*, but got true or false",
    ),
    "nothing but weights of 0": (
        [{"messages": [USER, REPLY | {"weight": 0}]}],
        "line 2: a row must have a token of the assistant's, but got none of .*, or weights of 0",
    ),
    "tools": (
        [{"messages": [USER, REPLY], "tools": [{"name": "f"}]}],
        "line 2: the template chatml has no place for tools",
    ),
}


def everything(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("lines, error", BAD.values(), ids=BAD)
def test_bad_rows_are_one_line_and_change_nothing(made, tmp_path, capsys, lines, error):
    """Also after good rows, of which shards are already written."""
    good, out = write_rows(tmp_path / "good.jsonl", rows(9)), tmp_path / "out"
    assert chat(made["chatml"], good, out=out) == 0
    before, first = everything(out), {"messages": [USER, REPLY]}
    lines = lines if "must" in error and "line" not in error else [first, *lines]
    bad = write_rows(tmp_path / "a.jsonl", lines)
    capsys.readouterr()
    assert chat(made["chatml"], bad, "--replace", "--shard-tokens", "1", out=out) == 2
    said = capsys.readouterr().err
    assert re.search(error, said) and said.count("\n") == 1
    assert everything(out) == before
    new = tmp_path / "new"
    assert chat(made["chatml"], bad, "--shard-tokens", "1", out=new) == 2 and not new.exists()


TEMPLATE_ERRORS = {
    "syntax": ("{% for m in %}", "the template .* must be Jinja, but got .* in line 1"),
    "undefined": (
        "{{ messages[0].nothing.more }}",
        "line 1: the template .* must write it, but got .*has no attribute",
    ),
    "refuses": ("{{ raise_exception('no such chat') }}", "line 1: the template .* must write it, but got no such chat"),
    "sandbox": ("{{ messages.append(1) }}", "line 1: the template .* must write it, but got .*is unsafe"),
    "loses": ("{{ messages[0].content }}", "line 1: the assistant's text must be found in what the template"),
    "changes": (
        "{{ messages[1].content | upper }}{{ messages[1].content | length }}",
        "message 2 is not there as it is",
    ),
    "tokens": (
        "{{ messages[0].content }}<|eot_id|>{{ messages[1].content }}",
        "writes special tokens that tokenizer.json has, but got no <.eot_id.>",
    ),
}


@pytest.mark.parametrize("source, error", TEMPLATE_ERRORS.values(), ids=TEMPLATE_ERRORS)
def test_broken_templates(made, tmp_path, capsys, source, error):
    (tmp_path / "t.jinja").write_text(source)
    good = write_rows(tmp_path / "a.jsonl", rows(9))
    assert chat(made["chatml"], good, template=str(tmp_path / "t.jinja"), out=tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert re.search(error, said) and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_what_the_command_line_lacks(made, tmp_path, capsys):
    good, model = write_rows(tmp_path / "a.jsonl", rows(9)), f"{made['chatml']}/tokenizer.json"
    for words, error in (
        ([good], r"chat comes from at least one file, for a model, but got no --model"),
        (["--model", model], r"chat comes from at least one file, for a model, but got none"),
        ([good, "--model", model], r"holds a chat template, .* but got none. hint: --template is one of chatml, gemma"),
        ([good, "--model", model, "--template", "chatm"], r"but got chatm. hint: did you mean chatml"),
        ([good, "--model", "gpt2", "--template", "chatml"], r"that gpt2 has, but got no <.im_start.>, <.im_end.>"),
        (
            [good, "--model", str(made["gemma"] / "tokenizer.json"), "--template", "llama3"],
            r"but got no <.begin_of_text.>",
        ),
    ):
        assert main(["data", "chat", *words, "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert re.search(error, said) and said.count("\n") == 1, said


def test_jinja2_that_is_missing(made, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(HandgradError, match=r"chat templates are run by jinja2.*pip install.*chat"):
        encoder(made["chatml"], "chatml")


# marks and windows ----------------------------------------------------------------------------------------------------


def write_chats(folder, sizes, dtype="<u2", name="train_0", learned=None):
    """A shard of rows of these sizes, ids counting up from 1; by default all but the first id of a row is learned."""
    total = sum(sizes)
    marks = np.ones(total, MARK) if learned is None else np.array(learned, MARK)
    begins = np.cumsum([0, *sizes])[:-1]
    marks[begins] = BEGINS
    data.write_shard(folder / f"{name}.bin", [np.arange(1, total + 1)], np.dtype(dtype))
    data.write_shard(folder / f"{name}.mask", [marks], MARK)
    return marks


def opened(folder, seq_len, batch_tokens=None, **settings):
    return data.tokens(folder / "train_*.bin", seq_len, batch_tokens or seq_len, objective=data.Chat(), **settings)


def test_damaged_marks(tmp_path):
    path, ids = tmp_path / "train_0.mask", tmp_path / "train_0.bin"

    def refused(error, write):
        write_chats(tmp_path, [5, 7])
        write()
        with pytest.raises(HandgradError, match=error):
            opened(tmp_path, 8)

    refused(r"train_0.bin must have its marks beside it, train_0.mask, but got missing", path.unlink)
    refused(r"train_0.mask must have \d+ bytes", lambda: path.write_bytes(path.read_bytes()[:-1]))
    refused(r"must hold 12 marks, one per id, but got 11 of uint8", lambda: data.write_shard(path, [[2] * 11], MARK))
    refused(r"must hold 12 marks, .* but got 12 of uint16", lambda: path.write_bytes(ids.read_bytes()))
    refused(
        r"must hold marks of 0 to 3, .* but got 1 at most, the first 1",
        lambda: data.write_shard(path, [[1] * 12], MARK),
    )
    refused(r"must hold marks of 0 to 3, .* but got 9 at most", lambda: data.write_shard(path, [[2, *[9] * 11]], MARK))
    write_chats(tmp_path, [5, 7])
    with pytest.raises(HandgradError, match=r"names token shards, but got .*train_0.mask, which holds marks"):
        data.tokens(path, 4, 4)
    assert data.tokens(ids, 4, 4).windows  # to others the shard is one of llm.c's


@pytest.mark.parametrize("seq_len", [1, 6, 20])
def test_windows_hold_whole_rows(tmp_path, seq_len):
    """By definition, from the shards: each row lies in one window, as far as it fits, and predicts only itself."""
    rng = np.random.default_rng(seq_len)
    sizes = [rng.integers(2, 12, 30).tolist(), rng.integers(2, 30, 25).tolist()]
    learned = [rng.integers(0, 2, sum(s)) for s in sizes]
    texts = {}
    for n, (s, marks, dtype) in enumerate(zip(sizes, learned, ("<u2", "<u4"))):
        marks = write_chats(tmp_path, s, dtype, f"train_{n}", marks)
        for begin, end in zip(np.cumsum([0, *s]), np.cumsum(s)):
            taken = marks[begin:end][: seq_len + 1] == LEARNED
            if taken.any() or end - begin <= seq_len + 1:
                texts[n, begin + 1] = taken
    tokens = opened(tmp_path, seq_len, 2 * seq_len, shuffle=False)
    assert f"{55:,} rows in {tokens.windows:,} windows" in str(tokens.packing)
    found = []
    for step, batch in enumerate(tokens.sweep(1)):
        ids, targets, first, positions = (batch[name][0] for name in ("ids", "targets", "first", "positions"))
        begins = np.flatnonzero(positions == 0)
        assert (first == np.repeat(begins, np.diff(begins, append=seq_len))).all()
        assert (positions == np.arange(seq_len) - first).all()
        index = 0 if step < tokens.packing.ends[0] else 1
        for begin, end in zip(begins, [*begins[1:], seq_len]):
            if ids[begin] == 0:  # padding
                assert (ids[begin:] == 0).all() and (targets[begin:] == -1).all()
                continue
            taken = texts[index, ids[begin]]
            size = len(taken) - (end == seq_len and len(taken) > end - begin)  # the last id is a target alone
            assert end - begin == size and (ids[begin:end] == ids[begin] + np.arange(size)).all()
            want = np.where(np.append(taken[1:], False)[:size], ids[begin:end] + 1, -1)
            assert (targets[begin:end] == want).all()
            found.append((index, ids[begin]))
    assert sorted(found) == sorted(texts)
    assert tokens.packing.dropped == 55 - len(texts)


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_batches_depend_on_step_and_seed_alone(tmp_path, packing):
    write_chats(tmp_path, np.random.default_rng(0).integers(2, 9, 200).tolist())
    tokens, again = (opened(tmp_path, 16, 128, seed=3, packing=packing) for _ in range(2))
    assert (tokens.windows == 200) == (packing == "none")
    for step in (0, 40):
        whole = tokens.batch(step)
        parts = [again.batch(step, rank, 2, micro_batch=2, micro_step=k) for k in range(2) for rank in range(2)]
        for name, array in whole.items():
            assert (array == np.concatenate([part[name] for part in parts])).all() and array.dtype == np.int32
    assert not (opened(tmp_path, 16, 128, seed=4, packing=packing).batch(0)["ids"] == tokens.batch(0)["ids"]).all()
    epoch = opened(tmp_path, 16, 16 * tokens.windows, seed=3, packing=packing).batch(1)["ids"]
    assert sorted(map(tuple, epoch)) == sorted(tuple(b["ids"][0]) for b in tokens.sweep(1))


def test_packing_leaves_little_room(tmp_path):
    """Rows of lengths as chats have them: the fill that packing.py promises. One row a window would fill a third."""
    sizes = np.clip(np.random.default_rng(0).lognormal(5.5, 0.8, 20_000), 8, 1024).astype(int)
    write_chats(tmp_path, sizes.tolist(), "<u4")
    packing = Packing([data.open_shard(tmp_path / "train_0.bin")], 1025)
    assert 0.98 < packing.filled <= 1 and packing.cut == packing.dropped == 0
    assert sum(sizes) == round(packing.filled * packing.ends[-1] * 1025)


def test_rows_longer_than_a_window(tmp_path):
    learned = [0] * 5 + [1] * 15 + [0] * 10 + [1] * 10 + [1] * 4
    write_chats(tmp_path, [20, 20, 4], learned=learned)
    text = str(opened(tmp_path, 9, overfit=True).packing)
    assert text.startswith("3 rows in 2 windows") and "; 2 longer than 10 tokens and cut, 1 of them left out" in text
    write_chats(tmp_path, [20], learned=[0] * 12 + [1] * 8)
    with pytest.raises(HandgradError, match=r"one of 1 rows must have a token of the assistant's among its first 9"):
        opened(tmp_path, 8)
