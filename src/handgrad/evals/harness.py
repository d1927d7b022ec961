"""handgrad models in the lm-evaluation-harness, under the name "handgrad":

    python -m handgrad.evals.harness run --model handgrad --model_args run=runs/x --tasks hellaswag,lambada_openai

All other arguments are the harness's own. A program that calls the harness calls `register` first.
"""

from collections.abc import Sequence
from typing import Any

from handgrad.core.errors import HandgradError
from handgrad.core.install import install_command
from handgrad.evals.load import load_scorer
from handgrad.infer.engine import Engine
from handgrad.infer.load import load_run
from handgrad.infer.sampling import Sampling, StopStrings
from handgrad.tokenizers import prompt_ids


def register() -> type:
    """Registers the model "handgrad" in the harness; returns its class. HandgradError if lm_eval is not installed.

    Its arguments are those of `handgrad eval`: run, dtype, backend and threads.
    """
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    except ImportError:
        rule = "the harness is the package lm_eval"
        raise HandgradError("eval", rule, "none installed", hint=install_command("harness")) from None

    class HandgradLM(TemplateLM):
        """One of our models behind the harness's interface. The scorer makes its own batches and ignores batch_size."""

        def __init__(self, run: str, dtype: str = "saved", backend: str = "auto", threads: int = 0, **_: Any):
            super().__init__()
            self._from = run, dtype, backend, threads
            self._model = load_scorer(*self._from)
            self._engine: Engine | None = None

        @property
        def eot_token_id(self) -> int:  # what an empty context becomes
            own = self._model.tokenizer
            if not own.begins and not own.ends:
                raise HandgradError("eval", "the harness starts texts with a token that begins or ends them", own.name)
            return (own.begins or own.ends)[0]

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            own = self._model.tokenizer
            return own.encode(string).tolist() if add_special_tokens is False else prompt_ids(own, string)

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            scores = self._model.scorer.score([pair for _, *pair in requests], greedy=True)
            return [(-float(s.losses.sum(dtype="float64")), bool(s.greedy)) for s in scores]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            T, totals = self._model.source.model.usual_seq_len, []
            for request in requests:
                ids = self.tok_encode(request.args[0], add_special_tokens=False)
                windows = get_rolling_token_windows(ids, self.eot_token_id, max_seq_len=T, context_len=1)
                scores = self._model.scorer.score([make_disjoint_window(window) for window in windows])
                totals.append(-sum(float(s.losses.sum(dtype="float64")) for s in scores))
            return totals

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            return [self._generate(*request.args) for request in requests]

        def _generate(self, context: str, settings: dict[str, Any]) -> str:
            """The continuation up to the first of settings["until"]; greedy without do_sample."""
            if self._engine is None:  # an arena of its own: few tasks write text
                self._engine, _ = load_run(*self._from)
            until = settings.get("until") or []
            ids = self.tok_encode(context) or [self.eot_token_id]
            most, tokenizer = settings.get("max_gen_toks", 256), self._model.tokenizer
            said = tokenizer.stream(self._engine.generate(ids, most, sampling(settings), tokenizer.ends))
            return "".join(StopStrings([until] if isinstance(until, str) else until).cut(said))

    return register_model("handgrad")(HandgradLM)


def sampling(settings: dict[str, Any]) -> Sampling:
    """How the harness's settings ask to sample: greedy unless they say otherwise."""
    draws = settings.get("do_sample", settings.get("temperature", 0) > 0)
    temperature = settings.get("temperature", 1.0) if draws else 0.0
    return Sampling(temperature, settings.get("top_k", 0), settings.get("top_p", 1.0))


if __name__ == "__main__":
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
