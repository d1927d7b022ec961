"""The flags of ranks, which are read before all others: the ranks read the others together."""

from dataclasses import fields

from handgrad.backends.ranks.world import Asked
from handgrad.cli.flags import full_names, parse
from handgrad.train.config import WorldConfig

FLAGS = [f"--{f.name.replace('_', '-')}" for f in fields(WorldConfig)]


def asked(verb: str, argv: list[str]) -> Asked:
    """The ranks that a command line asks for. Raises HandgradError for what is no number."""
    words = full_names(WorldConfig, argv)
    found = []
    for word, after in zip(words, [*words[1:], ""]):
        flag, equals, _ = word.partition("=")
        if flag in FLAGS:
            found += [word] if equals or not after else [word, after]
    w = parse(WorldConfig, found, verb) if found else WorldConfig()
    return Asked(w.ranks, w.rank, w.ranks_per_machine, w.rendezvous, [verb, *argv])
