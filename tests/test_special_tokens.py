"""Special tokens are tokens where it is asked for and text elsewhere; what precedes a text is what transformers puts there."""

import json
import pickle

import numpy as np
import pytest
import tokenizers as library
from tokenizers import AddedToken, models, pre_tokenizers, processors

from handgrad import data, evals, tokenizers
from handgrad.cli.__main__ import main
from handgrad.core.errors import HandgradError
from handgrad.data.prepare.workers import Job, tokenize
from handgrad.evals.tasks import encode_pair
from handgrad.infer.load import load
from handgrad.tokenizers.gguf import RULES

TEXT = data.shakespeare().read_text(encoding="utf-8")[:4000]
END = "<|endoftext|>"


def byte_level(single, pair, specials, pre="llama-bpe"):
    """A library's byte-level BPE of 290 tokens and these special ones, with this template around a text."""
    made = library.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    made.pre_tokenizer, made.decoder = RULES[pre], library.decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(
        [TEXT], library.trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    ids = [(token, made.token_to_id(token)) for token in specials]
    made.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    return made


def folder_of(path, made, **config):
    path.mkdir()
    made.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | config))
    return path


def llama3(path):
    begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    made = byte_level(f"{begin} $A", f"{begin} $A {begin} $B", [begin, end])
    return folder_of(path, made, bos_token=begin, eos_token=end)


def llama2(path):
    """Characters with a mark for spaces and bytes for the rest, as SentencePiece's."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {character: 259 + i for i, character in enumerate("▁abcdehlortw")}
    made = library.Tokenizer(models.BPE(vocab, [], fuse_unk=True, byte_fallback=True, unk_token="<unk>"))
    made.normalizer = library.normalizers.Sequence(
        [library.normalizers.Prepend("▁"), library.normalizers.Replace(" ", "▁")]
    )
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s>:1 $B:1", [("<s>", 1)])
    return folder_of(path, made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def qwen(path):
    made = byte_level("$A", "$A $B", [END], "qwen2")
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    return folder_of(path, made, eos_token=END, bos_token=None, add_bos_token=False)


def opt(path):
    """vocab.json and merges.txt, whose config asks for a beginning."""
    made = json.loads(byte_level("$A", "$A $B", [END], "gpt-2").to_str())
    path.mkdir()
    vocab = made["model"]["vocab"] | {END: 290}
    (path / "vocab.json").write_text(json.dumps(vocab))
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in made["model"]["merges"]))
    about = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "bos_token": END, "eos_token": END}
    (path / "tokenizer_config.json").write_text(json.dumps(about))
    return path


# spelled or meant -----------------------------------------------------------------------------------------------------


def test_spelled_in_every_process_and_meant_where_asked(tmp_path):
    """A copy of a tokenizer in another process forgot the library's switch, and read what it should spell."""
    ours = tokenizers.train([TEXT], 300, ["<|x|>"])
    for tokenizer, specials in ((ours, (END, "<|x|>")), (tokenizers.gpt2(), (END,))):
        assert tokenizer.specials == specials
        for copy in (
            tokenizer,
            pickle.loads(pickle.dumps(tokenizer)),
            tokenizers.load(tokenizer.save(tmp_path), tmp_path),
        ):
            text = f"a{END}b" + specials[-1]
            spelled, meant = copy.encode(text).tolist(), copy.encode(text, special=True).tolist()
            assert copy.eot not in spelled and copy.decode(spelled) == copy.decode(meant) == text
            assert meant == [*copy.encode("a"), copy.eot, *copy.encode("b"), copy.encode(specials[-1], special=True)[0]]
            assert copy.encode(text).tolist() == spelled  # whatever was asked before


def test_a_data_set_reads_special_tokens_where_asked(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": f"x{END}y"}) + "\n")
    gpt2, words = tokenizers.gpt2(), f"data jsonl {tmp_path}/a.jsonl --val-tokens 0 --workers 1 --out {tmp_path}"
    assert main(f"{words}/plain".split()) == 0
    ids = data.open_shard(tmp_path / "plain/train_000000.bin").read().tolist()
    assert ids == [50256, *gpt2.encode(f"x{END}y")] and "special_tokens" not in data.read_meta(tmp_path / "plain")
    assert main(f"{words}/special --special-tokens".split()) == 0
    ids = data.open_shard(tmp_path / "special/train_000000.bin").read().tolist()
    assert ids == [50256, *gpt2.encode("x"), 50256, *gpt2.encode("y")]
    assert data.read_meta(tmp_path / "special")["special_tokens"] is True
    with pytest.raises(HandgradError, match="--special-tokens is for a tokenizer with special tokens, but got chars"):
        data.prepare("text", tmp_path / "c", tokenizers.chars("xy<>|endoftxy\n"), files=[], special_tokens=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one step with the tokenizer of `llama3`."""
    folder = tmp_path_factory.mktemp("special")
    (folder / "text.txt").write_text(TEXT)
    llama3(folder / "t")
    assert main(f"data text {folder}/text.txt --tokenizer {folder}/t --out {folder}/d --workers 1".split()) == 0
    sizes = "--family llama --num-layers 1 --num-heads 1 --hidden-size 16 --seq-len 16 --micro-batch 2 --steps 1"
    flags = f"--sample-tokens 4 --prompt the --backend cpu --threads 1 --out {folder}/r"
    assert main(f"train --train {folder}/d {sizes} {flags}".split()) == 0
    return folder


def test_prompts_of_special_tokens(run, capsys, monkeypatch):
    loaded = load(run / "r", backend="cpu", threads=1)
    seen, generate = [], loaded.engine.generate

    def spy(ids, *rest):
        seen.append(list(ids))
        return generate(ids, *rest)

    monkeypatch.setattr(loaded.engine, "generate", spy)
    begin, end = loaded.tokenizer.begins[0], loaded.tokenizer.eot
    text = loaded.tokenizer.encode("to be").tolist()
    for prompt, special, ids in [
        ("to be", False, [begin, *text]),
        ("<|end_of_text|>", True, [begin, end]),  # the end alone
        ("<|begin_of_text|>to be", True, [begin, *text]),  # once
        ("<|end_of_text|>", False, [begin, *loaded.tokenizer.encode("<|end_of_text|>").tolist()]),
        (None, False, [begin, *loaded.tokenizer.encode("\n").tolist()]),
    ]:
        loaded.generate(prompt, max_tokens=1, temperature=0, special_tokens=special)
        assert seen.pop() == ids, prompt
    words = ["generate", str(run / "r"), "--max-tokens", "3", "--temperature", "0", "--backend", "cpu", "--prompt"]
    capsys.readouterr()
    assert main([*words, "<|end_of_text|>", "--special-tokens"]) == 0
    assert capsys.readouterr().out.startswith("<|end_of_text|>")


def test_documents_begin_as_texts_do(run):
    """The end of the text before, as in llm.c's shards, and then the tokenizer's own beginning; one token if they agree."""
    found = tokenizers.from_folder(run / "t")
    begin, end = found.begins[0], found.eot
    assert data.open_shard(run / "d/train_000000.bin").read(0, 2).tolist() == [end, begin]
    texts = lambda: ["ab", "c"]  # noqa: E731
    [(_, ids)] = tokenize([(0, Job(texts, ()))], found, 1)
    assert ids.ids.tolist() == [end, begin, *found.encode("ab"), end, begin, *found.encode("c")]


def test_same_beginning_as_the_end_is_put_once(tmp_path):
    found = tokenizers.from_folder(opt(tmp_path / "t"))
    assert found.begins == found.ends == (290,)
    [(_, ids)] = tokenize([(0, Job(lambda: ["ab"], ()))], found, 1)
    assert ids.ids.tolist() == [290, *found.encode("ab")]


# what precedes a text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama3, llama2, qwen, opt])
def test_prompts_are_those_of_transformers(tmp_path, make):
    transformers = pytest.importorskip("transformers")
    folder = make(tmp_path / "t")
    ours, theirs = tokenizers.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("hello world", "a", " b  c\n", "the old dear"):
        assert tokenizers.prompt_ids(ours, text) == theirs.encode(text), text
        context, rest = encode_pair(ours, "hello", " world")
        assert [*context, *rest] == theirs.encode("hello world")
    assert bool(ours.begins) is (make is not qwen)
    tokenizers.to_folder(ours, (tmp_path / "out").mkdir() or tmp_path / "out")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.encode("hello world") == theirs.encode("hello world")
    assert again.bos_token_id == (ours.begins or ours.ends)[0] and again.eos_token_id == ours.eot
    assert tokenizers.load(ours.save(tmp_path), tmp_path).begins == ours.begins


def test_a_frame_on_both_sides_is_left_to_the_objective(tmp_path):
    made = byte_level("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ["[CLS]", "[SEP]"])
    ours = tokenizers.from_folder(folder_of(tmp_path / "t", made))
    assert ours.begins == () and tokenizers.prompt_ids(ours, "ab") == ours.encode("ab").tolist()
    made = byte_level("$A </s>", "$A </s> $B </s>", ["</s>"])
    assert tokenizers.from_folder(folder_of(tmp_path / "t5", made)).begins == ()


def test_a_beginning_outside_the_vocabulary_is_refused(tmp_path):
    folder = llama3(tmp_path / "t")
    about = json.loads((folder / "tokenizer.json").read_text())
    about["post_processor"]["special_tokens"]["<|begin_of_text|>"]["ids"] = [4000]
    (folder / "tokenizer.json").write_text(json.dumps(about))
    with pytest.raises(HandgradError, match="puts tokens of its vocabulary before a text, but got the ids"):
        tokenizers.from_folder(folder)


def test_a_gguf_says_whether_a_text_has_a_beginning(tmp_path):
    begins, plain = tokenizers.from_folder(llama3(tmp_path / "t")), tokenizers.from_folder(qwen(tmp_path / "q"))
    for ours, adds in ((begins, True), (plain, False)):
        about = tokenizers.to_gguf(ours, 300)
        assert about["tokenizer.ggml.add_bos_token"] is adds
        assert about["tokenizer.ggml.bos_token_id"] == (ours.begins or ours.ends)[0]
        read = tokenizers.from_gguf(about, "x.gguf")
        assert read.begins == ours.begins
        assert tokenizers.prompt_ids(read, "to be") == tokenizers.prompt_ids(ours, "to be")
    about = tokenizers.to_gguf(begins, 300)
    del about["tokenizer.ggml.add_bos_token"]  # then it is llama.cpp's default for this rule
    assert tokenizers.from_gguf(about, "x.gguf").begins == begins.begins


def test_questions_begin_as_texts_do(tmp_path):
    found = tokenizers.from_folder(llama3(tmp_path / "t"))
    row = {"ctx": "to be", "endings": ["a", "b", "c", "d"], "label": 1}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    path, _ = data.prepare_questions("hellaswag", tmp_path / "h", found, tmp_path / "q.jsonl")
    want = [*found.begins, *found.encode("to be").tolist()]
    for file in (path, tmp_path / "q.jsonl"):
        (item,) = evals.read_items("hellaswag", file, found)
        assert [list(context) for context, _ in item.pairs] == [want] * 4, file
        assert list(item.pairs[0][1]) == found.encode(" a").tolist()
    context, rest = encode_pair(found, "", "to be")
    assert list(context) == list(found.begins) and np.array_equal(rest, found.encode("to be"))
