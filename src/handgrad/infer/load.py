"""Opens a model on disk by path or name, whoever wrote it, and makes an engine and a tokenizer from it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from handgrad import tokenizers
from handgrad.backends import open_backend
from handgrad.backends.base import Arena, Backend
from handgrad.core.dtypes import DTYPES
from handgrad.core.errors import HandgradError
from handgrad.core.json_file import MOST_OF_TOKENIZER, read_object
from handgrad.core.program import Program
from handgrad.infer import averages
from handgrad.infer.adapters import merged
from handgrad.infer.engine import Engine, record
from handgrad.infer.marks import Marked
from handgrad.infer.sampling import Sampling, StopStrings
from handgrad.io import checkpoint, gguf, hf, llmc
from handgrad.io.format import Format
from handgrad.io.gguf_file import is_gguf, open_file
from handgrad.io.weights import Weights
from handgrad.models import (
    GPT2,
    EncoderDecoder,
    Model,
    build_from_file,
    declare,
    family_of_architecture,
    family_of_model_type,
    from_dict,
    shapes,
)
from handgrad.models.lora import Lora, from_saved
from handgrad.models.presets import HUGGING_FACE

TOKENIZER = "tokenizer-spec.json"  # in the run folder, for tokenizers.load
ON_DISK = {"bf16": "bfloat16", "f32": "float32"}
HEADLESS = {"mlm": False, "nsp": False, "pooler": True, "labels": ()}  # of a Bert
MAX_TOKENS = 256  # of a continuation, unless it is given
KINDS = "a run folder, one of its checkpoints, a .bin of llm.c, a .gguf, a Hugging Face folder or hf:NAME"


@dataclass(frozen=True)
class Source:
    """A model on disk.

    kind: "handgrad", "llmc", "gguf" or "hf";  path: the checkpoint, file or folder;  model: its family and sizes
    weights: its tensors;  tokenizer: a function that reads its tokenizer; HandgradError if there is none
    ends: ids that end a text, for a model whose tokenizer is missing
    template: a function that reads what the model brings for chats
    lora: adapters that a run has trained, which are merged into `weights`;  tensors: reads those of the adapters
    """

    kind: str
    path: Path
    model: Model
    weights: Weights
    tokenizer: Callable[[], tokenizers.Tokenizer]
    ends: tuple[int, ...] = ()
    lora: Lora | None = None
    tensors: Callable[[str], np.ndarray] | None = None
    template: Callable[[], tokenizers.OwnTemplate] = tokenizers.OwnTemplate


def open_source(source: str | Path, ema: bool = False) -> Source:
    """The model at a path, or at hf:NAME. Reads and checks headers, not tensors.

    A folder that llm.c trains in stands for its newest complete model. ema: with the average of the weights that a run
    with --ema keeps. Raises HandgradError if there is no model, or no average.
    """
    path = hf.download(str(source)[3:]) if str(source).startswith("hf:") else Path(source)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except OSError as error:  # a name that is too long, a folder that is closed
        raise HandgradError("model", f"a model is {KINDS}", error.strerror) from None
    if ema and not (is_folder and (checkpoint.is_checkpoint(path) or checkpoint.newest(path))):
        raise HandgradError("model", "--ema is for runs of handgrad train --ema", f"'{path}'")
    if is_file:
        return _gguf(path) if is_gguf(path) else _llmc(path)
    if not is_folder:
        on_hub = f"hf:{path} is a model of the Hugging Face hub"
        hint = on_hub if str(path) in HUGGING_FACE else "handgrad train makes one"
        if path.name == checkpoint.BEST and checkpoint.newest(path.parent):
            hint = "a run with --keep-best has one, from its first validation on"
        raise HandgradError("model", f"a model is {KINDS}", f"no '{path}'", hint=hint)
    folder = path if checkpoint.is_checkpoint(path) else checkpoint.newest(path)
    if folder is not None:
        return _run(folder.parent / folder.resolve().name, ema)
    if hf.is_folder(path):
        return _hugging_face(path)
    done = sorted(int(p.name[5:]) for p in path.glob("DONE_*") if p.name[5:].isdigit())
    if done:
        return _llmc(path / f"model_{done[-1]:08d}.bin")
    is_adapter = (path / "adapter_config.json").is_file()
    hint = "it is an adapter, for handgrad train --init MODEL --lora-init FOLDER" if is_adapter else ""
    raise HandgradError("model", f"a model is {KINDS}", f"'{path}', which holds no complete checkpoint", hint=hint)


def load_run(
    path: str | Path, dtype: str = "saved", backend: str = "cpu", threads: int = 0, context: int = 0, ema: bool = False
) -> tuple[Engine, tokenizers.Tokenizer]:
    """(engine, tokenizer) of the model that `open_source` opens.

    dtype: "f32", "bf16", or "saved" for the one it was trained in
    context: tokens that the model sees at most; 0: the model's longest, and 2048 at most for a Llama
    ema: the average of its weights

    Raises HandgradError if something is missing, or the model reads fewer tokens.
    """
    return engine_of(open_source(path, ema), dtype, backend, threads, context)


def engine_of(
    source: Source, dtype: str = "saved", backend: str = "auto", threads: int = 0, context: int = 0
) -> tuple[Engine, tokenizers.Tokenizer]:
    """As `load_run`, of a model that is open."""
    if not isinstance(source.model, EncoderDecoder):
        check_continues(source, "generate")
    if not 0 <= context <= source.model.max_seq_len:
        rule = f"context lies in 1 .. {source.model.max_seq_len}, the tokens that the model reads"
        raise HandgradError("generate", rule, context)
    tokenizer = source.tokenizer()
    if isinstance(source.model, EncoderDecoder):
        tokenizer = Marked(tokenizer, source.model.marks, source.model.end_id)
    kind = source.weights.dtype if dtype == "saved" else dtype
    engine_backend = open_backend(backend, threads)
    programs = record(source.model, DTYPES[kind], context)
    arena = in_arena(source, kind, engine_backend, programs)
    return Engine(source.model, programs, arena, engine_backend, tokenizer.drawable(), context), tokenizer


def in_arena(source: Source, dtype: str, backend: Backend, programs: Sequence[Program]) -> Arena:
    """An arena for these programs of a model, with its weights in this dtype. The programs need not use all of them."""
    whole = declare(source.model, DTYPES[dtype])
    arena = backend.alloc(backend.plan(whole, *programs))
    for name, info in whole.params.items():
        arena.write_part("param", info.tensor, source.weights.tensor(name, rows=info.tensor.shape[0]))
    return arena


@dataclass(frozen=True, repr=False)
class Loaded:
    """A model that is ready to continue a text, or to write about it (an encoder-decoder). `stream` and `generate`
    share one cache: finish one before the next."""

    engine: Engine
    tokenizer: tokenizers.Tokenizer

    @property
    def model(self) -> Model:
        """The family and its sizes."""
        return self.engine.model

    def generate(
        self,
        prompt: str | None = None,
        max_tokens: int = MAX_TOKENS,
        temperature: float = Sampling.temperature,
        top_k: int = Sampling.top_k,
        top_p: float = Sampling.top_p,
        seed: int = Sampling.seed,
        stop: Sequence[str] = (),
        special_tokens: bool = False,
    ) -> str:
        """Returns the continuation of a prompt, without the prompt; the same as `stream`, joined."""
        return "".join(self.stream(prompt, max_tokens, temperature, top_k, top_p, seed, stop, special_tokens))

    def stream(
        self,
        prompt: str | None = None,
        max_tokens: int = MAX_TOKENS,
        temperature: float = Sampling.temperature,
        top_k: int = Sampling.top_k,
        top_p: float = Sampling.top_p,
        seed: int = Sampling.seed,
        stop: Sequence[str] = (),
        special_tokens: bool = False,
    ) -> Iterator[str]:
        """Yields the continuation of a prompt as it is made.

        prompt: text to continue; None: a line break, or the end-of-text token if the tokenizer cannot spell one. An
        encoder-decoder needs one, its source: it ends by itself, and marks such as <extra_id_0> stand for gaps.
        max_tokens: at most;  temperature, top_k, top_p, seed: see `Sampling`;  stop: end before any of these strings
        special_tokens: a special token spelled out in the prompt is that token; else it is plain text

        What the tokenizer puts before every text, as Llama's does, precedes the prompt.

        It ends at a token that ends texts. Raises HandgradError, at once, for a value out of range and for a prompt
        that is empty or that the tokenizer cannot spell.
        """
        sampling = Sampling(temperature, top_k, top_p, seed)
        stops = StopStrings([stop] if isinstance(stop, str) else stop)
        if max_tokens < 1:
            raise HandgradError("generate", "max_tokens is at least 1", max_tokens)
        if prompt == "":
            raise HandgradError("generate", "a prompt holds at least one character", "an empty one")
        tokenizer = self.tokenizer
        tokenizers.check_special(tokenizer, special_tokens)
        if prompt is None and not self.model.continues_text:
            raise HandgradError("generate", f"a {self.model.family} needs a prompt, which it writes about")
        if prompt is None:
            ids = tokenizers.neutral_prompt(tokenizer)
        else:
            ids = tokenizers.prompt_ids(tokenizer, prompt, special_tokens)
        if not ids:
            raise HandgradError("generate", f"a prompt is spelled with tokens of {tokenizer.name}", repr(prompt))
        tokens = self.engine.generate(ids, max_tokens, sampling, tokenizer.ends)
        return stops.cut(tokenizer.stream(tokens))

    def __repr__(self) -> str:
        return f"Loaded({self.model}, tokenizer {self.tokenizer.name} of {self.tokenizer.vocab_size:,} tokens)"


def load(
    path: str | Path, dtype: str = "saved", backend: str = "auto", threads: int = 0, context: int = 0, ema: bool = False
) -> Loaded:
    """The model that `open_source` opens, ready to continue text.

    path: a run folder, one of its checkpoints, a .bin of llm.c, a .gguf, a Hugging Face folder, or hf:NAME
    dtype, backend, threads, context, ema and errors as in `load_run`
    """
    return Loaded(*load_run(path, dtype, backend, threads, context, ema))


def check_continues(source: Source, where: str) -> None:
    """Raises HandgradError(where) for a model that does not predict the next token."""
    if not source.model.continues_text:
        writes = isinstance(source.model, EncoderDecoder)
        hint = (
            "handgrad generate writes about a prompt" if writes else "handgrad embed and handgrad classify read texts"
        )
        raise HandgradError(where, f"a {source.model.family} continues no texts", str(source.path), hint=hint)


def check_same_tokens(source: Source, tokenizer: tokenizers.Tokenizer) -> range:
    """Returns the ids of the tokens that this tokenizer adds to the model's own; none if the model has no tokenizer.

    Raises HandgradError if another token differs.
    """
    try:
        own = source.tokenizer()
    except HandgradError:
        return range(0)
    for id in range(min(own.vocab_size, tokenizer.vocab_size)):
        mine, theirs = own.bytes_of(id), tokenizer.bytes_of(id)
        if mine != theirs:
            rule = f"data for {source.path} are made with its tokenizer {own.name}, to which {id} is {mine!r}"
            sizes = f"of {tokenizer.vocab_size:,} tokens, not the model's of {own.vocab_size:,}"
            raise HandgradError("model", rule, f"{theirs!r} of the data's {tokenizer.name} {sizes}")
    added = range(own.vocab_size, tokenizer.vocab_size)
    if not tokenizers.added_ids(tokenizer) >= set(added):
        rule = f"data for {source.path} are made with its tokenizer of {own.vocab_size:,} tokens, or one that adds some"
        raise HandgradError("model", rule, f"{tokenizer.vocab_size:,} of {tokenizer.name}")
    return added


# handgrad's own -------------------------------------------------------------------------------------------------------


def _run(folder: Path, ema: bool) -> Source:
    """The model in a checkpoint of ours, or its average; the ref backend stores float64."""
    saved = checkpoint.load_meta(folder, {"model": dict, "dtype": str})
    model = from_dict(saved, "model", f"{folder}/run.json")
    if saved["dtype"] not in ON_DISK:
        rule = f"{folder}/run.json gives a dtype of {', '.join(ON_DISK)}"
        raise HandgradError("model", rule, repr(saved["dtype"]))
    stored = "float64" if saved.get("stored") == "float64" else ON_DISK[saved["dtype"]]
    lora = from_saved(saved.get("lora"), f"{folder}/run.json")
    program = declare(model, adapters=lora.adapters(model) if lora else {})
    expected = {name: (info.tensor.shape, stored) for name, info in program.params.items()}
    read: averages.Read = checkpoint.load(folder, expected).__getitem__
    if ema:
        read = averages.ema(folder, program, read, saved)
    elif saved.get("interpolation") is not None:
        read = averages.schedule_free(folder, program, read, saved)
    ends = tokenizers.id_list(saved.get("ends"), f"{folder}/run.json gives ends")
    weights = Weights(asdict(model), saved["dtype"], shapes(declare(model)), read)
    if lora is not None:
        weights = merged(weights, lora, model, read)
    tokenizer = partial(_tokenizer_of_run, folder.resolve().parent)
    template = partial(tokenizers.template_in_folder, folder.resolve().parent)
    return Source("handgrad", folder, model, weights, tokenizer, ends, lora, read, template)


def _tokenizer_of_run(run: Path) -> tokenizers.Tokenizer:
    path = run / TOKENIZER
    if not path.exists():
        hint = "checkpoints are read inside their run folder"
        raise HandgradError("model", f"{path} says how text becomes tokens", "no such file", hint=hint)
    return tokenizers.load(read_object(path, "model", MOST_OF_TOKENIZER), run)


# others' --------------------------------------------------------------------------------------------------------------


def _llmc(path: Path) -> Source:
    weights = llmc.read_model(path)
    model = build_from_file(GPT2, weights.fields, "llmc", path)
    weights = replace(weights, shapes=shapes(declare(model)))  # tensors in the order of use, as from any other source
    template = partial(tokenizers.OwnTemplate, str(path))
    return Source("llmc", path, model, weights, lambda: _tokenizer_of_file(path, model), template=template)


def _gguf(path: Path) -> Source:
    file = open_file(path)
    family = family_of_architecture(file.architecture, path)
    form = Format(**family.hugging_face)
    model = build_from_file(family, gguf.read_fields(file, form), "gguf", path)
    weights = gguf.read(file, form, asdict(model), shapes(declare(model)))
    ends = tokenizers.ends_in_gguf(file.metadata, model.vocab_size, path)
    tokenizer = partial(tokenizers.from_gguf, file.metadata, path)
    template = partial(tokenizers.template_in_gguf, file.metadata, path)
    return Source("gguf", path, model, weights, tokenizer, ends, template=template)


def _hugging_face(path: Path) -> Source:
    family = family_of_model_type(hf.model_type(path), path / hf.CONFIG)
    form = Format(**family.hugging_face)
    model = build_from_file(family, hf.read_fields(path, form), "hf", path / hf.CONFIG)
    weights = hf.read(path, form, asdict(model), shapes(declare(model)))
    ends = tokenizers.model_ends(path, range(model.vocab_size)) or ()
    template = partial(tokenizers.template_in_folder, path)
    return Source("hf", path, model, weights, lambda: _tokenizer_of_folder(path, model), ends, template=template)


def with_pooler(source: Source) -> Source:
    """A BERT as its body and pooler, if a Hugging Face folder holds a pooler that the model's class leaves out."""
    form = Format(**source.model.hugging_face)
    if source.kind != "hf" or asdict(source.model)["pooler"] or not hf.holds(source.path, form, "pooler.weight"):
        return source
    model = build_from_file(type(source.model), asdict(source.model) | HEADLESS, "hf", source.path)
    return replace(source, model=model, weights=hf.read(source.path, form, asdict(model), shapes(declare(model))))


def _tokenizer_of_file(path: Path, model: Model) -> tokenizers.Tokenizer:
    """The tokenizer in <model>_tokenizer.bin or gpt2_tokenizer.bin beside a .bin."""
    files = [path.with_name(f"{path.stem}_tokenizer.bin"), path.with_name("gpt2_tokenizer.bin")]
    for file in files:
        if file.is_file():
            return tokenizers.from_tokens(*llmc.read_tokenizer(file))
    return _by_size(model, files[0])


def _tokenizer_of_folder(folder: Path, model: Model) -> tokenizers.Tokenizer:
    return tokenizers.from_folder(folder) or _by_size(model, folder / "tokenizer.json")


def _by_size(model: Model, missing: Path) -> tokenizers.Tokenizer:
    """GPT-2's tokenizer, for a model without one that has as many tokens."""
    if model.vocab_size != tokenizers.gpt2().vocab_size:
        got = f"no such file, and {model.vocab_size} tokens are not GPT-2's"
        raise HandgradError("model", f"{missing} says how text becomes tokens", got)
    return tokenizers.gpt2()
