"""What reading ahead on a guess (`--lookup`) brings on a real model: tokens per second with and without, same tokens.

    PYTHONPATH=.:format python bench/lookup.py FILE.billm [--lookup 4 8] [--max-tokens 128] [--threads N] [--json]

The prompt is a passage of a text and the request to repeat it, the case that guessing is for, or without a template the
passage and its beginning once more. Answers are greedy; with and without take turns, and medians are given.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import billm_rt
from billm_format.command import add_common_options, emit_json, run_command
from billm_rt import GenerationStats, Sampling, texts


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], prog="lookup")
    parser.add_argument("model", type=Path, metavar="FILE.billm")
    parser.add_argument("--data", default="wikitext2", help="text that the passage is from (default: %(default)s)")
    parser.add_argument("--lookup", type=int, nargs="+", default=[2, 4, 8], metavar="K", help="(default: 2 4 8)")
    parser.add_argument("--max-tokens", "-n", type=int, default=128, help="of an answer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("-t", "--threads", type=int, help="threads (default: one per core)")
    add_common_options(parser)
    return parser


def prompts(model: billm_rt.Model, text: str) -> dict[str, list[int]]:
    """Return the prompts by name, as tokens."""
    tokenizer = model.tokenizer
    passage = tokenizer.decode(tokenizer.encode(text)[:200]).strip()
    ask = [{"role": "user", "content": f"Repeat this text word for word:\n\n{passage}"}]
    return {
        "continue": tokenizer.encode(passage),
        "repeat": tokenizer.encode(f"{passage}\n\n{passage[:100]}"),
        "asked": tokenizer.apply_chat_template(ask, add_generation_prompt=True),
    }


def answer(model: billm_rt.Model, prompt: list[int], max_tokens: int, lookup: int) -> tuple[list[int], GenerationStats]:
    """Return the tokens of the greedy answer and what it cost."""
    chunks = list(model.generate(prompt, max_tokens=max_tokens, sampling=Sampling(temperature=0), lookup=lookup))
    stats = chunks[-1].stats
    if stats is None:
        raise RuntimeError("the last chunk of a stream carries its figures")
    return [chunk.token_id for chunk in chunks if chunk.token_id is not None], stats


def measure(model: billm_rt.Model, prompt: list[int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for every lookup, the first (0) being what the others are compared with."""
    lookups = [0, *args.lookup]
    runs: dict[int, list[float]] = {lookup: [] for lookup in lookups}
    tokens, stats = {}, {}
    for _ in range(args.rounds):
        for lookup in lookups:
            tokens[lookup], stats[lookup] = answer(model, prompt, args.max_tokens, lookup)
            runs[lookup].append((len(tokens[lookup]) - 1) / stats[lookup].generation_seconds)
    plain = statistics.median(runs[0])
    return [
        {
            "lookup": lookup,
            "tokens": len(tokens[lookup]),
            "tokens_per_s": round(statistics.median(runs[lookup]), 1),
            "times_as_fast": round(statistics.median(runs[lookup]) / plain, 2),
            "proposed": stats[lookup].proposed_tokens,
            "accepted": stats[lookup].accepted_tokens,
            "same_tokens": tokens[lookup] == tokens[0],
        }
        for lookup in lookups
    ]


def benchmark(args: argparse.Namespace) -> int:
    """Measure every prompt and print the rows; 1 if an answer came out different."""
    report: dict[str, list[dict[str, Any]]] = {}
    with billm_rt.load(args.model, threads=args.threads) as model:
        for name, prompt in prompts(model, texts.load(args.data, "test").joined[:5000]).items():
            report[name] = measure(model, prompt, args)
            for row in report[name] if not args.json else ():
                print(f"{name:10}", "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        if args.json:
            emit_json("billm-lookup", 1, {"isa": model.isa, "prompts": report})
    return int(not all(row["same_tokens"] for rows in report.values() for row in rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command(build_parser(), benchmark, argv)


if __name__ == "__main__":
    raise SystemExit(main())
