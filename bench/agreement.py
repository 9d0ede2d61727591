"""Whether two ways of running a file agree: the greedy text, token by token, and the perplexity of a text.

    PYTHONPATH=.:format python bench/agreement.py FILE.billm [--ways cpu cuda] [--tokens 64] [--json]

A way is a device ("cpu", "cuda", "cuda:N") or "exact", the float32 path on the CPU. The first way writes the text; both
read it one token at a time. Where they would go on with different tokens, the gap tells why: how much larger the logit
of its own choice is, for either way, than that of the other's choice.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import billm_rt
from billm_format.command import add_common_options, emit_json, run_command
from billm_format.errors import UsageError
from billm_rt import options, ppl, texts

_QUESTION = "Give me one tip for sleeping well."


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], prog="agreement")
    parser.add_argument("model", type=Path, metavar="FILE.billm")
    parser.add_argument("--ways", nargs=2, default=["cpu", "cuda"], metavar="WAY", help="(default: cpu cuda)")
    parser.add_argument("--tokens", type=options.positive, default=64, metavar="N", help="of the text (default: 64)")
    parser.add_argument("--data", default="wikitext2", help="text for the perplexity (default: %(default)s)")
    parser.add_argument("--seqlen", type=options.positive, default=512, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--windows", type=options.positive, default=8, metavar="N", help="(default: %(default)s)")
    add_common_options(parser)
    return parser


def load(path: Path, way: str) -> billm_rt.Model:
    """Load the file in one of the ways."""
    exact = way == "exact"
    return billm_rt.load(path, "cpu" if exact else way, exact=exact)


def compare(first: billm_rt.Model, second: billm_rt.Model, count: int) -> dict[str, Any]:
    """Return how far both agree along `count` tokens that `first` chooses, the likeliest each time.

    `logit_error` is the largest difference of a token's logits, relative to the largest of them in size.
    """
    prompt = _prompt(first)
    caches = [model.new_cache() for model in (first, second)]
    tokens, differences, error = prompt, [], 0.0
    for place in range(count):
        ours, theirs = (model.forward(tokens, cache)[0] for model, cache in zip((first, second), caches, strict=True))
        choice, other = int(ours.argmax()), int(theirs.argmax())
        error = max(error, float(np.abs(ours - theirs).max() / np.abs(ours).max()))
        if choice != other:
            gaps = float(ours[choice] - ours[other]), float(theirs[other] - theirs[choice])
            differences.append({"token": place, "gaps": gaps})
        tokens = [choice]
    return {"tokens": count, "differences": differences, "logit_error": error}


def _prompt(model: billm_rt.Model) -> list[int]:
    ask = [{"role": "user", "content": _QUESTION}]
    return list(model.tokenizer.apply_chat_template(ask, add_generation_prompt=True))


def perplexity(model: billm_rt.Model, parts: list[ppl.Ids]) -> float:
    """Return the perplexity of the windows, all tokens but the first of each scored."""
    scorer, _ = ppl.model_scorer(model)
    return ppl.measure(parts, scorer, "paper").perplexity


def run(args: argparse.Namespace) -> None:
    """Compare and print."""
    text = texts.load(args.data, "test")
    with load(args.model, args.ways[0]) as first, load(args.model, args.ways[1]) as second:
        if first.ctx < max(args.seqlen, len(_prompt(first)) + args.tokens):
            raise UsageError(f"the model's context is {first.ctx:,} tokens: give a smaller --seqlen and --tokens")
        report = {"ways": args.ways, **compare(first, second, args.tokens)}
        ids = np.array(first.tokenizer.encode(text.joined, special=True), np.int64)
        parts = ppl.cut(ids, args.seqlen, args.windows, "paper", None)
        found = [perplexity(model, parts) for model in (first, second)]
    report |= {"data": text.name, "perplexities": found, "ratio": found[1] / found[0]}
    if args.json:
        emit_json("billm-agreement", 1, report)
    else:
        _show(report)


def _show(report: dict[str, Any]) -> None:
    one, other = report["ways"]
    print(f"greedy text of {one}, read by {one} and {other}: largest error of logits {report['logit_error']:.2e}")
    if report["differences"]:
        place, (ours, theirs) = report["differences"][0].values()
        print(f"the first of {len(report['differences'])} different choices is token {place}: there {one} has its own")
        print(f"ahead of {other}'s by {ours:.4f}, {other} its own ahead by {theirs:.4f}")
    else:
        print(f"all {report['tokens']} tokens are the same")
    first, second = report["perplexities"]
    print(f"{report['data']}: perplexity {first:.4f} ({one}), {second:.4f} ({other}), ratio {report['ratio']:.5f}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
