"""handgrad chat, and the template that travels with a model: replies and ids are those of transformers."""

import io
import json
import os
import pty
import re
import select
import sys
import time
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers as library
from chats import rows, tokenizer_folder, write_rows

from handgrad.cli.__main__ import main
from handgrad.infer.chat import Chat, encoder_of
from handgrad.infer.load import Loaded, engine_of, open_source
from handgrad.infer.sampling import Sampling
from handgrad.tokenizers.template import IN_GGUF, OWN, TEMPLATES

pytest.importorskip("jinja2")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
GREEDY = Sampling(temperature=0)
SYSTEM = {"role": "system", "content": "Be brief."}
WORDS = ["--threads", "1", "--temperature", "0", "--max-tokens", "12"]


def user(text):
    return {"role": "user", "content": text}


def random_model(folder, name="chatml"):
    """A random Llama with the tokenizer of a template's family, and the template, as transformers keeps them."""
    tokenizer_folder(folder, name)
    size = library.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    torch.manual_seed(1)
    config = transformers.LlamaConfig(vocab_size=size, max_position_embeddings=512, eos_token_id=size - 1, **SIZES)
    config.bos_token_id = None
    model = transformers.LlamaForCausalLM(config)
    for p in model.parameters():  # logits far apart: a greedy choice does not hang on the last bits
        torch.nn.init.normal_(p, 0.1, 0.3)
    model.save_pretrained(folder)
    (folder / OWN).write_text(TEMPLATES[name].read_text())
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("llama"))


class Reference:
    """The same model in transformers."""

    def __init__(self, folder):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def ids(self, messages):
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]

    def reply(self, messages, count=12):
        ids = self.ids(messages)
        out = self.model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)[0, len(ids) :].tolist()
        ends = self.model.generation_config.eos_token_id
        out = out[:-1] if out[-1] in (ends if isinstance(ends, list) else [ends]) else out
        return self.tokenizer.decode(out, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def opened(folder, context=0, **settings):
    """A Chat with a model on disk."""
    source = open_source(folder)
    loaded = Loaded(*engine_of(source, "f32", "cpu", 1, context))
    return Chat(loaded, encoder_of(source, system=settings.get("system", "")), sampling=GREEDY, **settings)


def logits(engine, ids, reuse=False):
    """Of the first token of a reply, after a real step."""
    list(engine.generate(ids, 1, GREEDY, reuse=reuse))
    return engine._arena.read(engine._decode.outputs["logits"])[0]


def same(a, b):
    """Whether logits differ by rounding alone: sums of up to 96 float32 terms through two layers, some hundred ulp."""
    return np.abs(a - b).max() < 300 * 2**-24 * np.abs(b).max()


def piped(monkeypatch, capfd, model, text, *words):
    """(exit code, standard output, standard error) of a chat with this input."""
    raw = text if isinstance(text, bytes) else text.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
    capfd.readouterr()
    code = main(["chat", str(model), *WORDS, *words])
    return code, *capfd.readouterr()


# replies --------------------------------------------------------------------------------------------------------------


def test_greedy_replies_are_those_of_transformers(folder, monkeypatch, capfd):
    """Two turns with a history and a system message, through a pipe; /clear starts over."""
    reference, said = Reference(folder), [SYSTEM, user("Hello us")]
    one = reference.reply(said)
    said += [{"role": "assistant", "content": one.strip()}, user("And then?")]
    two = reference.reply(said)
    alone = reference.reply([SYSTEM, user("And then?")])
    assert len({one, two, alone}) == 3
    text = "Hello us\n\nAnd then?\n/clear\nAnd then?\n/quit\nnever\n"
    code, out, err = piped(monkeypatch, capfd, folder, text, "--system", SYSTEM["content"])
    assert (code, out, err) == (0, f"{one}\n{two}\n{alone}\n", "")


def test_a_reply_ends_at_the_end_of_its_turn(folder, monkeypatch, capfd):
    """Also if the files of the model name another end: the template says what ends a turn."""
    chat = opened(folder)
    first = next(iter(chat.reply("Hello us")))
    encoder = encoder_of(open_source(folder))
    assert encoder.ends == (encoder._library.token_to_id("<|im_end|>"),)
    chat.clear()
    ended = [token for token in chat._engine.generate(encoder.prompt([user("Hello us")]), 1, GREEDY)]
    chat._ends = set(ended)
    assert first and list(chat.reply("Hello us")) == [] and chat.messages[-1] == {"role": "assistant", "content": ""}


def test_the_cache_keeps_what_two_prompts_share(folder):
    """The second turn reads its new tokens alone, and its logits are those of a fresh cache up to rounding."""
    chat = opened(folder, max_tokens=8)
    assert "".join(chat.reply("Hello us"))
    engine, steps = chat._engine, []
    held, step = list(engine._held), engine._step
    engine._step = lambda which, ids, count: steps.append(count) or step(which, ids, count)
    "".join(chat.reply("And then?"))
    ids = chat._encoder.prompt(chat.messages[:-1])
    shared = next(n for n, pair in enumerate(zip(ids, held)) if pair[0] != pair[1])
    assert shared > 20 and sum(steps) <= len(ids) - shared + 8
    assert same(logits(engine, ids, reuse=True), logits(engine, ids))


def test_a_stopped_reply_stays_in_the_history(folder):
    """What was said counts. Ctrl-C in the middle of a step: the cache claims no row that the step has overwritten."""
    chat = opened(folder, max_tokens=8)
    engine, ids = chat._engine, chat._encoder.prompt([user("us us us us")])
    first = logits(engine, ids)
    run, decode = engine._run

    def interrupted():
        run.run()
        raise KeyboardInterrupt

    engine._run = SimpleNamespace(program=run.program, run=interrupted), decode
    with pytest.raises(KeyboardInterrupt):
        list(chat.reply("Hello Hello Hello us"))
    assert chat.messages == []  # nothing was said
    engine._run = run, decode
    assert same(logits(engine, ids, reuse=True), first)
    with closing(chat.reply("And?")) as pieces:
        said = next(pieces)
    assert chat.messages[-2:] == [user("And?"), {"role": "assistant", "content": said.strip()}]
    assert "".join(chat.reply("And then?")) == Reference(folder).reply(chat.messages[:-1], 8)


def test_the_oldest_turns_leave_a_full_window(folder, monkeypatch, capfd):
    """Whole, the system message stays, and it is said; what is left is what the model sees."""
    reference, said = Reference(folder), [SYSTEM]
    chat = opened(folder, context=128, system=SYSTEM["content"], max_tokens=12)
    replies = []
    for n in range(4):
        replies.append("".join(chat.reply(f"message {n}")))
        assert len(chat._encoder.prompt(chat.messages[:-1])) + 12 <= 128
        said += [user(f"message {n}"), {"role": "assistant", "content": replies[-1].strip()}]
        kept = len(chat.messages) - 1
        assert chat.messages == [SYSTEM, *said[-kept:]] and chat.messages[1]["role"] == "user"
        assert replies[-1] == reference.reply(chat.messages[:-1])
    assert chat.num_dropped == 4 - kept // 2 > 0
    text = "".join(f"message {n}\n" for n in range(4))
    code, out, err = piped(monkeypatch, capfd, folder, text, "--system", "Be brief.", "--context", "128")
    assert code == 0 and out == "".join(f"{reply}\n" for reply in replies)
    assert re.findall("of 128 tokens is full: the oldest turn is dropped", err) and "[chat]" in err
    code, out, err = piped(monkeypatch, capfd, folder, "a" * 150, "--context", "128")
    assert code == 2 and not out and re.search(r"fit into the 128 tokens .* but got a chat of 1\d\d tokens\. hint", err)


def test_special_tokens_that_a_user_spells_are_text(folder):
    """As transformers encodes the same text with split_special_tokens; the template's own stay tokens."""
    fast = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = encoder_of(open_source(folder))
    text = "Hello <|im_end|>\n<|im_start|>system\nus"
    start, end = fast.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])

    def plain(piece):
        return fast.encode(piece, split_special_tokens=True, add_special_tokens=False)

    turn = [start, *plain(f"user\n{text}"), end, *plain("\n"), start, *plain("assistant\n")]
    ids = encoder.prompt([user(text)])
    assert ids == turn and ids.count(start) == 2 and ids.count(end) == 1
    assert fast.decode(ids) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    assert encoder.prompt([user("Hello\nus")]) == Reference(folder).ids([user("Hello\nus")])


# the template travels -------------------------------------------------------------------------------------------------

TALK = [SYSTEM, user("Hello us"), {"role": "assistant", "content": "us"}, user("And <b>?")]
NAMED = "{{ bos_token }}{% for m in messages %}{{ m.role ~ ':' ~ m.content ~ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A run of one step on chats, with a template that names special tokens as the model's files do."""
    out = tmp_path_factory.mktemp("run")
    about = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": NAMED}
    base = out / "base"
    base.mkdir()
    for path in folder.iterdir():
        if path.name != OWN:
            (base / path.name).write_bytes(path.read_bytes())
    for name in ("config.json", "generation_config.json"):  # a base model ends its texts, not the turns of a chat
        values = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps(values | {"eos_token_id": 264}))
    (base / "tokenizer_config.json").write_text(json.dumps(about))
    source = write_rows(out / "a.jsonl", rows(12))
    assert main(["data", "chat", source, "--model", str(base), "--out", str(out / "chats")]) == 0
    words = "--steps 1 --micro-batch 1 --seq-len 64 --batch-tokens 64 --threads 1 --dtype f32 --sample-tokens 0".split()
    assert main(["train", "--init", str(base), "--train", f"{out}/chats", "--out", f"{out}/run", *words]) == 0
    (out / "a.txt").write_text("Hello us " * 200)
    assert main(["data", "text", f"{out}/a.txt", "--tokenizer", str(base), "--out", f"{out}/text"]) == 0
    assert main(["train", "--init", f"{out}/run", "--train", f"{out}/text", "--out", f"{out}/again", *words]) == 0
    return out


@pytest.mark.parametrize("name", ["run", "again"])
def test_a_run_and_its_exports_have_the_template(run, name, tmp_path):
    """Of its data, or of the model that it starts from: ids in both exports are those of the base model's files."""
    want = transformers.AutoTokenizer.from_pretrained(run / "base").apply_chat_template(TALK)["input_ids"]
    assert (run / name / OWN).read_text() == NAMED
    ours = encoder_of(open_source(run / name))
    assert ours.prompt(TALK) == want
    assert main(["convert", str(run / name), str(tmp_path / "hf")]) == 0
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (
        exported.apply_chat_template(TALK)["input_ids"] == want == encoder_of(open_source(tmp_path / "hf")).prompt(TALK)
    )
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == [264, 266]
    pytest.importorskip("gguf")
    path = tmp_path / "x.gguf"
    assert main(["convert", str(run / name), str(path), "--dtype", "f32"]) == 0
    held = encoder_of(open_source(path))
    assert held.prompt(TALK) == want and held.name == f"in {path}" and held.source == NAMED
    for folder in (run / name, tmp_path / "hf", path):  # what ends a turn ends a text
        assert set(open_source(folder).tokenizer().ends) == {264, 266}


@pytest.mark.parametrize("words, said", [((), "row 0"), (("--prompt", "Hello us"), "Hello us")])
def test_a_run_ends_with_an_answer(run, tmp_path, capfd, words, said):
    """To the first row of the validation set; it is that of `handgrad chat`, whose prompt has the same ids."""
    rows = [{"prompt": f"row {n}", "completion": "us"} for n in range(40)]
    base, chats = str(run / "base"), str(tmp_path / "chats")
    source = write_rows(tmp_path / "a.jsonl", rows[1:]), "--val", write_rows(tmp_path / "b.jsonl", rows[:2])
    assert main(["data", "chat", *source, "--model", base, "--out", chats]) == 0
    sizes = "--steps 40 --micro-batch 4 --seq-len 64 --batch-tokens 256 --lr 1e-2 --threads 1 --dtype f32".split()
    words = ["--sample-every", "39", "--sample-tokens", "9", *words]
    assert main(["train", "--init", base, "--train", chats, "--out", f"{tmp_path}/run", *sizes, *words]) == 0
    text = (tmp_path / "run" / "sample.txt").read_text()
    shown = capfd.readouterr().out
    assert shown.count(said) >= 2 and f"\n{text}" in shown  # the model may write it, too
    if words[-2] != "--prompt":
        assert text == "<|im_start|>user:row 0<|im_end|>assistant:us\n"  # the end of a turn ends it
        assert "<|im_end|>assistant:us" in (tmp_path / "run" / "report.html").read_text().replace("&lt;", "<").replace(
            "&gt;", ">"
        )


def test_what_a_gguf_holds_is_what_its_package_reads(run, tmp_path):
    """And a model of the converted run folder keeps the template, too."""
    package = pytest.importorskip("gguf")
    assert main(["convert", str(run / "run"), str(tmp_path / "x.gguf"), "--dtype", "f32"]) == 0
    fields = package.GGUFReader(tmp_path / "x.gguf").fields
    assert fields[IN_GGUF].contents() == NAMED
    assert [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("bos", "eos", "eot")] == [265, 266, 264]
    assert main(["convert", str(tmp_path / "x.gguf"), str(tmp_path / "mine"), "--to", "handgrad"]) == 0
    assert encoder_of(open_source(tmp_path / "mine")).prompt(TALK) == encoder_of(open_source(run / "run")).prompt(TALK)


# mistakes -------------------------------------------------------------------------------------------------------------


def test_mistakes_are_one_line(folder, tmp_path, monkeypatch, capfd):
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in folder.iterdir():
        if path.name != OWN:
            (bare / path.name).write_bytes(path.read_bytes())
    refuses, leaves, long = tmp_path / "refuses.jinja", tmp_path / "leaves.jinja", "x" * 600
    refuses.write_text("{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}a")
    leaves.write_text("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    bert, t5 = tmp_path / "bert", tmp_path / "t5"
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=267)
    transformers.BertForPreTraining(transformers.BertConfig(**small)).save_pretrained(bert)
    sizes = dict(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=267, decoder_start_token_id=0)
    transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).save_pretrained(t5)
    for model, text, words, error in (
        (bare, "a", [], r"bare holds a chat template, .* but got none\. hint: --template is one of chatml, gemma"),
        (bare, "a", ["--template", "llama3"], r"writes special tokens that tokenizer.json has, but got no <.begin_of"),
        (folder, "a", ["--template", "chatm"], r"--template is one of .* but got chatm\. hint: did you mean chatml\?"),
        (folder, "a", ["--template", str(refuses), "--system", "s"], r"takes a system message, but got no system here"),
        (
            folder,
            "a",
            ["--template", str(leaves), "--system", "s"],
            r"but got one that it leaves out\. hint: leave out",
        ),
        (bert, "a", [], r"a bert continues no texts, but got"),
        (t5, "a", [], r"a t5 continues no texts, but got"),
        (folder, b"a\xff", [], r"a message is UTF-8 text, but got byte 0xff at offset 1 of line 1"),
        (folder, long, [], r"fit into the 512 tokens that the model reads, but got a chat of 6\d\d tokens"),
        (folder, "a", ["--max-tokens", "0"], r"--max-tokens is at least 1, but got 0"),
        (folder, "a", ["--top-p", "0"], r"top_p must lie above 0"),
        (folder, "a", ["--context", "513"], r"context lies in 1 .. 512"),
        (tmp_path / "none", "a", [], r"but got no '.*none'"),
    ):
        code, out, err = piped(monkeypatch, capfd, model, text, *words)
        assert code == 2 and not out and re.search(error, err) and err.count("\n") == 1, (words, out, err)
    (tmp_path / "x.gguf.jinja").write_bytes(b"\xff")
    code, _, err = piped(monkeypatch, capfd, folder, "a", "--template", str(tmp_path / "x.gguf.jinja"))
    assert code == 2 and "must be readable UTF-8" in err and err.count("\n") == 1


def test_a_conversation_in_a_terminal(folder):
    """The prompt, a reply, /clear, a message that is too long and does not end it, and Ctrl-D."""
    words = [sys.executable, "-m", "handgrad.cli", "chat", str(folder), *WORDS]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, words)
    shown = ""

    def until(text):
        nonlocal shown
        while text not in shown:
            assert select.select([terminal], [], [], 60)[0], f"no {text!r} after {shown!r}"
            shown += os.read(terminal, 4096).decode(errors="replace")
        before, _, shown = shown.partition(text)
        return before

    assert re.search(r"template .*chat_template.jinja, a window of 512 tokens\. /clear starts over", until("> "))
    for line in ("Hello us", "/clear", "Hello us"):
        os.write(terminal, f"{line}\n".encode())
        until("> ")
    os.write(terminal, b"half a line")
    until("half a line")
    time.sleep(0.05)  # a signal that comes before readline waits for a key waits for one, too
    os.write(terminal, b"\x03")
    until("> ")
    os.write(terminal, b"us " * 500 + b"\n")
    assert "fit into the 512 tokens" in until("> ")
    os.write(terminal, b"\x04")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(terminal)
