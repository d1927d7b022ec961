"""From flags to resolved settings and the objects built from them. Nothing below this module reads a flag."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import handgrad.data as hg_data
from handgrad import evals, tokenizers
from handgrad.backends import best_dtype, open_backend, resolve_name
from handgrad.backends.base import Backend
from handgrad.backends.ranks.comm import Alone, Comm
from handgrad.core.errors import HandgradError
from handgrad.core.plan import MIB
from handgrad.core.precision import Precision
from handgrad.infer.adapters import check_base, read_peft
from handgrad.infer.load import Source, check_same_tokens, open_source
from handgrad.io import newest
from handgrad.io.weights import Weights
from handgrad.models import Bert, Model, create, preset
from handgrad.optim import Optimizer, schedules
from handgrad.train.best import Best
from handgrad.train.checks import micro_batches
from handgrad.train.config import (
    SIZES,
    ComputeConfig,
    Config,
    ModelConfig,
    RanksConfig,
)
from handgrad.train.datasets import (
    chat_prompt,
    chats_in,
    command_for,
    is_all_chat,
    labels_of,
    paths_of,
    settle_data,
    training_data,
    validation_data,
)
from handgrad.train.execution import Execution, for_data
from handgrad.train.explain import explain
from handgrad.train.extend import branch_step
from handgrad.train.folder import saved_settings
from handgrad.train.growth import described, with_new_rows
from handgrad.train.heads import as_classifier, for_labels
from handgrad.train.journal import template_of, tokenizer_of
from handgrad.train.optimizers import optimizer_of, optimizer_settings
from handgrad.train.outliers import Guard
from handgrad.train.ranks import on_rank_0
from handgrad.train.record import flops_per_token
from handgrad.train.schedule import momentum_of, num_steps, schedule_name, schedule_of, settled_steps, steps_of
from handgrad.train.start import Start
from handgrad.train.telemetry import Telemetry
from handgrad.train.trainer import Trainer
from handgrad.train.tuning import settled, tuned


@dataclass(frozen=True)
class Run:
    """A run's resolved settings and the objects built from them.

    config           the settings, with every 0, "auto", None and empty text replaced by what it stands for
    template         of the chats among the data, else the one that the model brings
    lr               learning rate of a step
    momentum         momentum of a step, None where it is the optimizer's own
    branch           the step before the cooldown of wsd, or of momentum, whose checkpoint is kept for --extend; else 0
    best             the lowest validation loss so far
    val              validation data, or None
    prompt           token ids that every sample begins with; none: no samples
    ends             token ids that end one; none: its length does
    hellaswag        its questions; none: it is not evaluated
    flops_per_token  of forward and backward, by the model's own count
    peak_flops       FLOP/s of the hardware of all ranks in this precision, None if unknown
    done             steps already done
    facts            what the settings do not say, for the summary
    """

    config: Config
    out: Path
    tokenizer: tokenizers.Tokenizer
    template: tokenizers.OwnTemplate
    trainer: Trainer
    lr: Callable[[int], float]
    momentum: Callable[[int], float] | None
    branch: int
    best: Best
    val: hg_data.Data | None
    prompt: list[int]
    ends: set[int]
    hellaswag: list[evals.Item]
    telemetry: Telemetry | None
    flops_per_token: int
    peak_flops: float | None
    done: int
    facts: dict[str, Any]

    @property
    def steps(self) -> int:
        """The length of the run."""
        return steps_of(self.config)


def resolve(c: Config, out: Path, comm: Comm = Alone()) -> Run:
    """Finds the data, builds all objects, and resumes if asked. Raises HandgradError for whatever does not fit."""
    c, found = settle_data(c, out, comm)
    tokenizer, labels = tokenizer_of(paths_of(found)), labels_of(found)
    c = replace(c, tune=settled(c.tune, is_resumed=bool(c.run.resume) and newest(out) is not None))
    c, start, source, new_rows, brought = find_start(c, out, tokenizer, labels, paths_of(found))
    model = find_model(c, tokenizer, source, labels)
    data = training_data(c, found, model, comm.world, tokenizer)
    asked, c = c.run, complete(c, model, data, out)
    r, o, h = c.run, c.optim, c.compute
    lr = schedule_of(c)
    check_evals(c, model, any(one.val for one in found))
    hellaswag = evals.read_items("hellaswag", c.eval.hellaswag, tokenizer) if c.eval.hellaswag else []
    val = validation_data(found, c.data.mix, data, model, tokenizer)
    prompt, template = sample_prompt(c, model, tokenizer, data, val), template_of(paths_of(found), brought)
    precision = precision_of(h)
    wanted = {"val": val is not None, "sample": bool(prompt), "score": bool(hellaswag)}
    extra_programs = tuple(name for name, is_wanted in wanted.items() if is_wanted)
    execution = for_data(execution_of(h, extra_programs, r.check, Guard(o.skip_loss_z, o.skip_grad_z)), data)
    execution = tuned(execution, c.tune)
    start = with_adapter(start, c, model, execution, is_new=newest(out) is None or not r.resume)
    backend = open_backend(h.backend, h.threads, precision, comm)
    optim = optimizer_of(o)
    momentum = momentum_of(c, optim)
    try:
        trainer = Trainer(
            model, optim, data, execution=execution, precision=precision, backend=backend, start=start, out=out
        )
    except HandgradError as error:
        if error.where != "memory":
            raise
        raise with_remedies(error, model, optim, data, execution, precision, backend) from None
    trainer.keeps_journal = False  # the loop writes a log of its own
    check_readable(data, val, trainer, hellaswag)
    until = on_rank_0(comm, lambda: branch_step(saved_settings(c), c, out)) if asked.extend else None
    fresh = asked.fresh_optimizer
    done = trainer.resume(pass_over=r.resume == "auto", until=until, fresh=fresh) if r.resume else 0
    if done > steps_of(c):
        raise HandgradError("resume", f"--steps is at least the checkpoint's step {done}", r.steps)
    peak_flops = backend.peak_flops(h.dtype)
    return Run(
        config=c,
        out=out,
        tokenizer=tokenizer,
        template=template,
        trainer=trainer,
        lr=lr,
        momentum=momentum,
        branch=settled_steps(c) % steps_of(c),  # none at the end
        best=Best.of(trainer.saved, out),
        val=val,
        prompt=prompt,
        ends={*tokenizer.ends, *template.ends} if is_all_chat(data) else set(),
        hellaswag=hellaswag,
        telemetry=Telemetry(backend.pci_bus) if c.log.telemetry_every and comm.rank == 0 else None,
        flops_per_token=flops_per_token(model, trainer.program, execution.micro_batch, data.seq_len),
        peak_flops=peak_flops and peak_flops * comm.world,
        done=done,
        facts=facts_of(trainer, new_rows),
    )


def facts_of(trainer: Trainer, new_rows: str) -> dict[str, Any]:
    """What the settings do not say of a run. new_rows: what tokens the model has gained, if any"""
    p, world = trainer.program, trainer.ranks.world
    facts: dict[str, Any] = {"params": p.num_params - p.num_padding, "trainable": p.num_trainable}
    facts |= {"arena": f"{trainer.plan.nbytes / MIB:.1f} MiB", "dtype": trainer.precision.dtype}
    name = "chat" if is_all_chat(trainer.data) else "chat beside texts"
    facts |= {name: "; ".join(str(one.packing) for one in chats_in(trainer.data))} if trainer.data.packing else {}
    labels = getattr(trainer.model, "labels", ())
    facts |= {"labels": len(labels)} if labels else {}
    facts |= {"hardware": (f"{world} ranks, each on " if world > 1 else "") + trainer.backend.hardware}
    return facts | ({"new_rows": new_rows} if new_rows else {})


def with_adapter(start: Start, c: Config, model: Model, execution: Execution, is_new: bool) -> Start:
    """What a run starts from, with the tensors of the adapter that --lora-init names."""
    if not is_new or not c.tune.lora_init or execution.lora is None:
        return start
    folder, weights = Path(c.tune.lora_init), start.init
    tensors = read_peft(folder, execution.lora, model)
    check_base(folder, execution.lora, model, weights.read if isinstance(weights, Weights) else None, c.model.init)
    return replace(start, adapter=tensors)


def check_evals(c: Config, model: Model, has_val: bool) -> None:
    """Raises HandgradError for settings of validation without data, and of HellaSwag for a model that it is not for."""
    if not has_val and (c.checkpoint.keep_best or c.eval.patience):
        raise HandgradError("eval", "--keep-best and --patience need validation data", "none", hint="--val GLOB")
    if not model.continues_text and c.eval.hellaswag:
        raise HandgradError("eval", "HellaSwag is for models that continue texts", f"a {model.family}")


def find_start(
    c: Config, out: Path, tokenizer: tokenizers.Tokenizer, labels: tuple[str, ...], shards: list[Path]
) -> tuple[Config, Start, Model | None, str, tokenizers.OwnTemplate]:
    """(the settings, what the run starts from, the model on disk if there is one, which rows are new in it, if any,
    what it brings for chats).

    A model on disk sets the sizes; a checkpoint sets everything. With labels, a model on disk gets a head for them.
    Tokens that the data's tokenizer adds get new rows.
    """
    m, last = c.model, newest(out) if c.run.resume else None
    drawn = m.init in ("random", "llmc")
    if last is not None:
        saved = saved_settings(c)
        if saved is not None and saved.model.init != m.init:
            rule = f"a resumed run has its weights, from --init {saved.model.init}"
            raise HandgradError("resume", rule, m.init, hint="a new run: --init without --resume")
    if drawn and last is None:
        return c, Start(c.run.seed, m.init), None, "", tokenizers.OwnTemplate()
    source = open_source(m.init if last is None else str(last))
    try:
        added = check_same_tokens(source, tokenizer)
    except HandgradError as error:
        hint = command_for(shards, c.data.train, m.init if last is None else str(out))
        raise HandgradError(error.where, error.rule, error.got, hint=hint) from None
    if labels and last is None:
        source = for_labels(source, labels, c.run.seed)
    if getattr(source.model, "labels", ()) != labels:
        known = ", ".join(getattr(source.model, "labels", ())) or "no labels"
        rule = f"the texts have the labels of {source.path}, {known}"
        hint = "" if labels else "start from a model without labels"
        raise HandgradError("model", rule, ", ".join(labels) or "none", hint=hint)
    template = template_with_ends(source)
    if drawn:
        return c, Start(c.run.seed), None, "", template
    model, weights = with_new_rows(source, added) if added else (source.model, source.weights)
    if isinstance(model, Bert):
        check_special(model, tokenizer)
    brought = {"family": model.family} | settings_of(model)
    brought.pop("dropout", None)  # a choice of the run
    for name in ("family", "preset", "depth", *SIZES, "vocab_size", "tie_embeddings"):
        if getattr(m, name) not in (getattr(ModelConfig, name), brought.get(name)):
            rule = f"--{name.replace('_', '-')} is left to the model that --init names"
            raise HandgradError("model", rule, getattr(m, name))
    start = Start(c.run.seed, weights) if last is None else Start(c.run.seed)
    return replace(c, model=replace(m, **brought)), start, model, described(tokenizer, added), template


def template_with_ends(source: Source) -> tokenizers.OwnTemplate:
    """What a model on disk brings for chats; what ends its texts ends its turns."""
    template = source.template()
    return replace(template, ends=source.tokenizer().ends) if template.source else template


def check_special(model: Bert, tokenizer: tokenizers.Tokenizer) -> None:
    """Raises HandgradError unless a BERT on disk has the tokens of the data and its special ones."""
    count, special = tokenizer.vocab_size, ", ".join(Bert.special_tokens)
    is_own = tokenizers.special_ids(tokenizer, Bert.special_tokens) is not None
    if is_own and model.vocab_size < count:
        raise HandgradError("model", f"a BERT to start from has the {count} tokens of the data", model.vocab_size)
    if not is_own and model.vocab_size != count + len(Bert.special_tokens):
        rule = f"a BERT to start from has {special} after the data's {count}"
        hint = "make the data with its own tokenizer: handgrad data RECIPE --tokenizer FOLDER"
        raise HandgradError("model", rule, f"a vocabulary of {model.vocab_size}", hint=hint)


def find_model(c: Config, tokenizer: tokenizers.Tokenizer, source: Model | None, labels: tuple[str, ...] = ()) -> Model:
    """The model that the settings ask for, or the one on disk with the run's dropout, on data of this tokenizer."""
    m, vocab_size = c.model, tokenizer.vocab_size
    if 0 < m.vocab_size < vocab_size:
        raise HandgradError("model", f"--vocab-size is at least the data's {vocab_size}", m.vocab_size)
    if source is not None:  # fields that are no settings stay, too
        drops = {"dropout": m.dropout} if m.dropout or hasattr(source, "dropout") else {}
        return create(source.family, asdict(source) | drops)
    changes = {name: getattr(m, name) for name in SIZES if getattr(m, name)}
    for name in ("dropout", "tie_embeddings"):
        if getattr(m, name) != getattr(ModelConfig, name):
            changes[name] = getattr(m, name)
    name = f"d{m.depth}" if m.depth else m.preset
    chosen = preset(name, m.family)
    is_own = isinstance(chosen, Bert) and tokenizers.special_ids(tokenizer, chosen.special_tokens)
    special = () if is_own else chosen.special_tokens
    own = vocab_size + len(special)
    if 0 < m.vocab_size < own:
        rule = f"--vocab-size is at least {own}: the data's {vocab_size} and {len(special)} special tokens"
        raise HandgradError("model", rule, m.vocab_size)
    model = preset(name, m.family, vocab_size=m.vocab_size or own, **changes)
    return as_classifier(model, labels) if labels else model


def settings_of(model: Model) -> dict[str, Any]:
    """The fields of a model that are settings too."""
    return {name: value for name, value in asdict(model).items() if hasattr(ModelConfig, name)}


def complete(c: Config, model: Model, data: hg_data.Data, out: Path) -> Config:
    """The settings with every 0, "auto", None and empty text replaced by what it stands for."""
    steps, kind = num_steps(c, data), schedule_name(c.optim)
    o = replace(c.optim, schedule=kind)
    own = {name: v for name, v in schedules.own_settings(kind).items() if getattr(o, name) is None}
    warmup = min(100, steps // 10) if o.warmup is None else schedules.length("warmup", o.warmup, steps)
    rise = schedules.length("momentum-warmup", o.momentum_warmup, steps)
    run = replace(c.run, out=str(out), steps=steps, tokens="", epochs=0.0, extend=False, fresh_optimizer=False)
    found: dict[str, Any] = {"backend": resolve_name(c.compute.backend)}
    found["dtype"] = best_dtype(found["backend"]) if c.compute.dtype == "auto" else c.compute.dtype
    bounds = "positions" in data.objective.inputs  # of chats always, so that eval bounds texts beside them, too
    return replace(
        c,
        model=replace(c.model, family=model.family, **settings_of(model)),
        data=replace(c.data, seq_len=data.seq_len, batch_tokens=data.batch_tokens, documents=bounds),
        optim=replace(o, **optimizer_settings(optimizer_of(o)) | {"warmup": warmup, "momentum_warmup": rise} | own),
        run=run,
        compute=replace(c.compute, **found),
        ranks=RanksConfig(),
    )


def precision_of(h: ComputeConfig) -> Precision:
    """The element types of these settings."""
    dtype = best_dtype(h.backend) if h.dtype == "auto" else h.dtype
    return Precision(dtype, h.grad_dtype, h.master_weights, h.deterministic)


def execution_of(
    h: ComputeConfig, extra_programs: tuple[str, ...], check: str = "off", guard: Guard = Guard()
) -> Execution:
    """How the steps of these settings are executed."""
    return Execution(
        micro_batch=h.micro_batch,
        recompute=h.recompute,
        head_bytes=h.head_mib * MIB,
        extra_programs=extra_programs,
        backend=h.backend,
        threads=h.threads,
        check=check,
        guard=guard,
        zero=h.zero,
    )


def sample_prompt(
    c: Config, model: Model, tokenizer: tokenizers.Tokenizer, data: hg_data.Data, val: hg_data.Data | None
) -> list[int]:
    """The tokens that every sample begins with; none for a run without samples."""
    if not c.eval.sample_tokens or not model.continues_text:
        return []
    asked = [] if c.eval.prompt else chat_prompt(data, val)
    return asked or prompt_ids(tokenizer, c.eval.prompt)


def prompt_ids(tokenizer: tokenizers.Tokenizer, prompt: str) -> list[int]:
    """The tokens of the prompt of samples; of an empty one, those that say least."""
    if not prompt:
        return tokenizers.neutral_prompt(tokenizer)
    found: object = repr(prompt)
    try:
        ids = tokenizers.prompt_ids(tokenizer, prompt)
    except HandgradError as error:
        ids, found = [], error.got or found  # the character
    if not ids:
        rule, hint = "--prompt is spelled with the data's characters", "another, or --sample-tokens 0"
        raise HandgradError("run", rule, found, hint=hint)
    return ids


def check_readable(data: hg_data.Data, val: hg_data.Data | None, trainer: Trainer, hellaswag: list[evals.Item]) -> None:
    """Reads the first batches and all questions. Raises HandgradError for tokens that the model does not know."""
    data.batch(0, micro_batch=1, names=trainer.program.inputs)  # tokens of another vocabulary show here, most often
    if val is not None:
        next(val.sweep(1))
    if trainer.scorer is not None:
        trainer.scorer.texts([pair for item in hellaswag for pair in item.pairs])


def with_remedies(
    error: HandgradError,
    model: Model,
    optim: Optimizer,
    data: hg_data.Data,
    execution: Execution,
    precision: Precision,
    backend: Backend,
) -> HandgradError:
    """The error of an arena that does not fit, with what each remedy would save."""
    count = micro_batches(data, execution.micro_batch, backend.comm.world)
    kinds: dict[str, Any] = {"execution": execution, "precision": precision}
    page = explain(model, data.seq_len, backend=backend, accumulation=count, optim=optim, **kinds)
    saves = [(page.plan.nbytes - nbytes, name) for name, nbytes, _ in page.remedies]
    prices = "; ".join(
        f"{name} saves {saved / 2**30:.1f} GiB" for saved, name in sorted(saves, reverse=True) if saved > 0
    )
    hint = f"{error.hint}; {prices}" if prices else error.hint
    return HandgradError(error.where, error.rule, error.got, hint=hint)
