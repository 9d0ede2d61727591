"""A `.billm` model for lm-evaluation-harness: `lm_eval.simple_evaluate(BillmLM("model.billm"), tasks=["piqa"])`.

Needs the package `lm-eval` (`pip install 'billm-rt[eval]'`); scores are those of `billm-eval`, on any of its tasks.
"""

from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports, reportMissingModuleSource]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports, reportMissingModuleSource]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports, reportMissingModuleSource]
from tqdm import tqdm  # pyright: ignore[reportMissingImports, reportMissingModuleSource]

import billm_rt
from billm_format.errors import UsageError
from billm_rt.eval_score import BillmReader, likelihood

_DEFAULT_TOKENS = 256  # of an answer whose task sets no bound


class BillmLM(TemplateLM):  # type: ignore[misc] # the harness has no types for mypy
    """The harness's view of a model. Requests are read one by one; what two in a row begin with alike is read once."""

    def __init__(self, model: str | Path | billm_rt.Model, **options: Any) -> None:
        """Take a loaded model, or load one with the options of `billm_rt.load`."""
        super().__init__()
        self.model = model if isinstance(model, billm_rt.Model) else billm_rt.load(model, **options)
        self._reader = BillmReader(self.model)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.model.tokenizer.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands in front of a text without context."""
        bos = self.model.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at most."""
        return self._reader.max_length

    @property
    def tokenizer_name(self) -> str:
        """What the harness keys its caches by."""
        return str(self.model.file.path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the tokens of `string`; None: with a beginning-of-text token where the model wants one."""
        return self.model.tokenizer.encode(string, add_bos=add_special_tokens, special=True)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the conversation as the text that the model reads."""
        return self.model.tokenizer.render_chat(chat_history, add_generation_prompt=add_generation_prompt)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        answers = []
        for texts, context, continuation in tqdm(requests, desc="billm: log-likelihoods", disable=disable_tqdm):
            found = likelihood(self._reader, context, continuation)
            answers.append((found.total, found.greedy))
            if texts != ("", ""):
                self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, in windows of `max_length` that do not overlap."""
        totals = []
        for (text,) in tqdm(_arguments(requests), desc="billm: texts", disable=disable_tqdm):
            # As the harness's own class for transformers has it: the tokenizer's beginning-of-text token is scored too.
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            pairs = map(make_disjoint_window, windows)
            totals.append(sum(likelihood(self._reader, context, rest).total for context, rest in pairs))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the answer to each prompt, up to a stop string of the request; greedy unless it says `do_sample`."""
        answers = []
        for prompt, options in tqdm(_arguments(requests), desc="billm: answers", disable=disable_tqdm):
            answers.append(self._answer(prompt, dict(options)))
            self.cache_hook.add_partial("generate_until", (prompt, options), answers[-1])
        return answers

    def _answer(self, prompt: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        stop = [until] if isinstance(until, str) else list(until)
        wanted = int(options.get("max_gen_toks", _DEFAULT_TOKENS))
        temperature = float(options.get("temperature", 1.0)) if options.get("do_sample") else 0.0
        room = self.max_length - wanted
        if room < 1:
            raise UsageError(f"max_gen_toks {wanted} leaves no room for a prompt in a context of {self.max_length}")
        sampling = billm_rt.Sampling(temperature=temperature, top_p=float(options.get("top_p", 1.0)))
        prompt_ids = self.tok_encode(prompt)[-room:]  # a long prompt loses its beginning
        return "".join(
            chunk.text for chunk in self.model.generate(prompt_ids, max_tokens=wanted, sampling=sampling, stop=stop)
        )


def _arguments(requests: list[Instance]) -> list[Any]:
    return [request.args for request in requests]
