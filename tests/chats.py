"""Chats, and small tokenizers that have the special tokens of templates, which several tests share."""

import json

import numpy as np
import tokenizers as library
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

SPECIAL = {
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "qwen2.5": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "chatml": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "gemma": ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    "mistral": ("<s>", "</s>", "[INST]", "[/INST]"),
}
SYSTEM, FIRST, SECOND = "Be brief.", "Hi <b>&\n", "2 + 2?"
ONE, TWO = "  Hello  \n\n\nthere, naïve 🙂", "4\n```py\nx = {'a': 1}\n```"
MESSAGES = [
    {"role": "system", "content": SYSTEM},
    {"role": "user", "content": FIRST},
    {"role": "assistant", "content": ONE},
    {"role": "user", "content": SECOND},
    {"role": "assistant", "content": TWO},
]


def tokenizer_folder(folder, name):
    """Writes a byte-level BPE with a family's special tokens, which merges across words' ends; returns the folder."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "H"), ("e", "l"), ("l", "o"), ("el", "lo"), ("H", "ello"), ("Ċ", "Ċ"), ("ĊĊ", "Ċ"), ("u", "s")]
    vocab = {token: id for id, token in enumerate([*alphabet, *dict.fromkeys(a + b for a, b in merges)])}
    tokenizer = library.Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL[name]])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def rows(count=40, seed=0):
    rng = np.random.default_rng(seed)
    for n in range(count):
        reply = "us Hello " * int(rng.integers(1, 9))
        if n % 3:
            yield {"messages": [*MESSAGES[:2], {"role": "assistant", "content": reply}], "id": n}
        else:
            yield {"prompt": f"row {n}", "completion": reply}


def write_rows(path, lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)
