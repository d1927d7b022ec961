"""The flags of ranks, which are read before all others: the ranks read the others together."""

from dataclasses import fields

from handgrad.backends import why_no_cuda
from handgrad.backends.ranks.startup import RanksRequest
from handgrad.cli.flags import full_names, parse
from handgrad.core.errors import HandgradError
from handgrad.train.config import RanksConfig

GPUS = {"--gpus", "--num-gpus"}  # other names of --ranks, which say where
FLAGS = [f"--{f.name.replace('_', '-')}" for f in fields(RanksConfig)]


def requested_ranks(verb: str, argv: list[str]) -> RanksRequest:
    """The ranks that a command line requests. Raises HandgradError for what is no number."""
    words = full_names(RanksConfig, argv)
    found = []
    for i, word in enumerate(words):
        flag, equals, _ = word.partition("=")
        if flag in FLAGS:
            found += [word] if equals else words[i : i + 2]
    w = parse(RanksConfig, found, verb) if found else RanksConfig()
    if names_gpus(argv) and not any(word.partition("=")[0].endswith("backend") for word in argv) and why_no_cuda():
        hint = f"on the CPU: --ranks {w.ranks} --backend cpu"
        raise HandgradError(verb, f"--gpus trains on GPUs: {why_no_cuda().partition('. hint:')[0]}", hint=hint)
    return RanksRequest(w.ranks, w.rank, w.ranks_per_machine, w.rendezvous, [verb, *argv])


def names_gpus(argv: list[str]) -> bool:
    """Whether a flag says that the ranks are GPUs."""
    return bool(GPUS & {word.partition("=")[0].replace("_", "-") for word in argv})
