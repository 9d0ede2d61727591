"""Whole models of well-known shapes with random weights: tokens per second and memory, beside transformers in float16.

    PYTHONPATH=.:format:tests python bench/gpu_model.py [--shape NAME ...] [--batch 1 8] [--device cuda] [--json]

Speed does not depend on what the weights are, so the shapes need no download; all layers of a file hold the same ones.
A run reads a prompt of `--context` tokens and then writes `--gen` tokens, each drawn (the likeliest) and read again as
in a chat; the median of `--repeat` runs counts, after one that does not. transformers runs the same shape with weights
of its own, eager and, on a GPU, compiled with a static cache; a shape whose float16 weights exceed the free memory, or
a machine without torch and transformers, has no such figures, and the table says why.
"""

import argparse
import inspect
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from random_model import random_tensors, tiny_config, tokenizer_info, tokenizer_json

import billm_rt
from billm_format.command import add_common_options, emit_json, run_command
from billm_format.config import ModelConfig, Quantization
from billm_format.errors import DoesNotFitError, UsageError
from billm_format.layout import TOKENIZER
from billm_format.writer import write_file
from billm_rt.sampling import Sampler, Sampling


def _llama(vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, *, tied: bool) -> ModelConfig:
    return tiny_config(
        vocab_size=vocab, hidden_size=hidden, embedding_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=hidden // heads, tie_word_embeddings=tied,
        max_position_embeddings=4096,
    )  # fmt: skip


SHAPES = {
    "tiny": tiny_config(max_position_embeddings=4096),
    "smollm2-135m": _llama(49152, 576, 1536, 30, 9, 3, tied=True),
    "llama-2-7b": _llama(32000, 4096, 11008, 32, 32, 32, tied=False),
    "llama-2-70b": _llama(32000, 8192, 28672, 80, 64, 8, tied=False),
}
# The model as it runs: a call that empties it, reads a prompt, and returns seconds of prompt and of decoding.
Run = Callable[[], tuple[float, float]]


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], prog="gpu_model")
    shapes = ["smollm2-135m", "llama-2-7b"]
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=shapes, help="(default: %(default)s)")
    parser.add_argument(
        "--batch", nargs="+", type=int, default=[1, 8], metavar="N", help="texts at once (default: 1 8)"
    )
    parser.add_argument("--context", type=int, default=512, metavar="N", help="tokens read first (default: 512)")
    parser.add_argument("--gen", type=int, default=128, metavar="N", help="tokens written (default: 128)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="runs that count (default: 3)")
    parser.add_argument("--device", default="cuda", metavar="D", help="cuda, cuda:N or cpu (default: cuda)")
    parser.add_argument("--no-transformers", dest="transformers", action="store_false", help="leave the comparison out")
    add_common_options(parser)
    return parser


def measure(args: argparse.Namespace) -> None:
    """Measure every shape and print the table, or one JSON object."""
    lines = []
    for name in args.shape:
        for line in _shape(name, args):
            lines.append(line)
            if not args.quiet:
                print(f"{name}: {line['what']}: {_speed(line)}", file=sys.stderr)
    if args.json:
        emit_json(
            "billm-gpu-model", 1, {"device": args.device, "context": args.context, "gen": args.gen, "lines": lines}
        )
    else:
        print(table(lines))


def _shape(name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what each way of running a shape comes to."""
    config = SHAPES[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{name}.billm")
        write_random(path, config)
        begun = time.perf_counter()
        with billm_rt.load(path, args.device, ctx=args.context + args.gen) as model:
            model.forward(np.ones(1, np.int64), model.new_cache())
            first = time.perf_counter() - begun
            for texts in args.batch:
                caches = [model.new_cache() for _ in range(texts)]
                figures = _median(partial(run_ours, model, caches, args.context, args.gen), texts, args)
                yield {
                    "shape": name, "what": f"billm-rt, {model.isa}", "texts": texts, **figures,
                    "memory_bytes": model.device_memory().get("pool"), "file_bytes": model.file.nbytes,
                    "kv_cache_bytes": sum(cache.nbytes for cache in caches), "first_token_seconds": first,
                }  # fmt: skip
    if args.transformers:
        yield from _of_transformers(name, config, args)


def write_random(path: Path, config: ModelConfig) -> None:
    """Write a file of this shape, every layer with the first one's random tensors."""
    quantization = Quantization(block_size=128)
    arrays = random_tensors(replace(config, num_hidden_layers=1), quantization, seed=0)
    for name in [name for name in arrays if name.startswith("layers.0.")]:
        for layer in range(1, config.num_hidden_layers):
            arrays[name.replace("layers.0.", f"layers.{layer}.", 1)] = arrays[name]
    write_file(
        path,
        config=config,
        quantization=quantization,
        tokenizer_info=tokenizer_info(config),
        conversion={"recipe": "random"},
        tensors={TOKENIZER: tokenizer_json(config), **{key: partial(_same, value) for key, value in arrays.items()}},
    )


def _same(array: Any) -> Any:
    return array


def _median(run: Run, texts: int, args: argparse.Namespace) -> dict[str, float]:
    """Return tokens per second of all texts together, reading and writing."""
    seconds = [run() for _ in range(args.repeat + 1)][1:]
    read, written = (statistics.median(part) for part in zip(*seconds, strict=True))
    return {"prompt_tokens_per_s": args.context * texts / read, "decode_tokens_per_s": args.gen * texts / written}


def run_ours(model: billm_rt.Model, caches: Sequence[Any], context: int, gen: int) -> tuple[float, float]:
    """Read a prompt into every cache and write `gen` tokens behind each; return the seconds of either."""
    sampler, vocab = Sampler(Sampling(temperature=0)), model.config.vocab_size
    prompts = np.random.default_rng(0).integers(0, vocab, (len(caches), context))
    for cache in caches:
        cache.truncate(0)
    batch = model.gather(caches) if len(caches) > 1 else None
    begun = time.perf_counter()
    tokens = []
    for prompt, cache in zip(prompts, caches, strict=True):
        tokens.append(sampler.sample(model.rows(prompt, cache)[0], ()))
    read = time.perf_counter()
    for _ in range(gen):
        rows = model.rows(tokens, caches[0]) if batch is None else model.rows_each(tokens, batch)
        tokens = [sampler.sample(row, ()) for row in rows]
    return read - begun, time.perf_counter() - read


# ---- transformers


def _of_transformers(name: str, config: ModelConfig, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the same for transformers, or a line that says why not."""
    modes = ["eager"] if args.device == "cpu" else ["eager", "compiled"]
    for mode in modes:
        what, dtype = f"transformers, {mode}", "float32" if args.device == "cpu" else "float16"
        for texts in args.batch:
            line = {"shape": name, "what": f"{what} {dtype}", "texts": texts}
            try:
                with _Twin(config, args, mode, texts) as twin:
                    figures = _median(twin.run, texts, args)
                    yield line | figures | {"memory_bytes": twin.peak_bytes()}
            except DoesNotFitError as error:
                yield line | {"why": str(error)}
            except Exception as error:  # whatever another library's compiler can throw; the other figures stand
                yield line | {"why": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"}


class _Twin:
    """The same shape in transformers, with random weights; a context manager, so that its memory goes."""

    def __init__(self, config: ModelConfig, args: argparse.Namespace, mode: str, texts: int) -> None:
        try:
            import torch
            import transformers
        except ImportError as error:
            raise DoesNotFitError(f"{error.name} is not installed") from None
        self._torch, self._args, self._texts = torch, args, texts
        self._on_gpu = args.device != "cpu"
        dtype = torch.float16 if self._on_gpu else torch.float32
        shape = transformers.LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads, head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings, tie_word_embeddings=config.tie_word_embeddings,
        )  # fmt: skip
        if self._on_gpu:
            weights = sum(rows * cols for rows, cols, _ in config.linears().values()) * config.num_hidden_layers
            need = 2 * (weights + 2 * config.vocab_size * config.hidden_size)
            free = torch.cuda.mem_get_info(args.device)[0]
            if need > 0.9 * free:
                raise DoesNotFitError(f"{need / 1e9:.0f} GB of float16 weights, {free / 1e9:.0f} GB are free")
            torch.cuda.reset_peak_memory_stats(args.device)
        with torch.device(args.device):
            self._model = transformers.AutoModelForCausalLM.from_config(shape, dtype=dtype).eval()
        # One for all runs: what is compiled is compiled for these very buffers, and would be again for others.
        self._static = None
        if mode == "compiled":
            self._static = transformers.StaticCache(config=shape, max_cache_len=args.context + args.gen)
        self._new_cache = transformers.DynamicCache
        known = inspect.signature(self._model.forward).parameters
        self._cache_word = "cache" if "cache" in known else "past_key_values"  # it has changed
        self._wants_places = "cache_position" in known
        self._step = self._model
        if mode == "compiled":
            self._step = torch.compile(self._model, mode="reduce-overhead", fullgraph=True)

    def __enter__(self) -> "_Twin":
        return self

    def __exit__(self, *error: object) -> None:
        del self._model, self._step
        if self._on_gpu:
            self._torch.cuda.empty_cache()

    def run(self) -> tuple[float, float]:
        """As `run_ours`."""
        torch, args = self._torch, self._args
        with torch.inference_mode(), torch.device(args.device):
            ids = torch.randint(0, self._model.config.vocab_size, (self._texts, args.context))
            cache = self._new_cache() if self._static is None else self._static
            if self._static is not None:
                self._static.reset()
            options = {self._cache_word: cache, "use_cache": True}
            self._wait()
            begun = time.perf_counter()
            tokens = self._model(ids, logits_to_keep=1, **options).logits[:, -1:].argmax(-1)
            self._wait()
            read = time.perf_counter()
            for place in range(args.context, args.context + args.gen):
                where = {"position_ids": torch.full((self._texts, 1), place)}
                if self._wants_places:
                    where["cache_position"] = torch.full((1,), place)
                tokens = self._step(tokens, **where, **options).logits[:, -1:].argmax(-1).clone()
            self._wait()
            return read - begun, time.perf_counter() - read

    def peak_bytes(self) -> int | None:
        """Return the most memory that torch held on the GPU."""
        return int(self._torch.cuda.max_memory_allocated(self._args.device)) if self._on_gpu else None

    def _wait(self) -> None:
        if self._on_gpu:
            self._torch.cuda.synchronize(self._args.device)


# ---- the table


HEADINGS = ("shape", "runs in", "texts", "prompt, tokens/s", "decoding, tokens/s", "billm-rt is", "memory, MB")


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table; "billm-rt is": how many times as fast it decodes as many texts of the shape."""
    ours = {(line["shape"], line["texts"]): line for line in lines if line["what"].startswith("billm-rt")}
    rows = [HEADINGS, ["---"] * len(HEADINGS)]
    for line in lines:
        first = [line["shape"], line["what"], str(line["texts"])]
        if "why" in line:
            rows.append([*first, line["why"], "", "", ""])
            continue
        ratio = ours[line["shape"], line["texts"]]["decode_tokens_per_s"] / line["decode_tokens_per_s"]
        speeds = [f"{line[f'{part}_tokens_per_s']:,.0f}" for part in ("prompt", "decode")]
        memory = "" if line["memory_bytes"] is None else f"{line['memory_bytes'] / 1e6:,.0f}"
        rows.append([*first, *speeds, "" if line["what"].startswith("billm-rt") else f"{ratio:.2f} ×", memory])
    notes = [
        f"{line['shape']}, {line['texts']} at once: file {line['file_bytes'] / 1e6:,.0f} MB, KV cache "
        f"{line['kv_cache_bytes'] / 1e6:,.0f} MB; load to first token {line['first_token_seconds']:.2f} s"
        for line in ours.values()
    ]
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", *notes])


def _speed(line: dict[str, Any]) -> str:
    return line.get("why") or f"{line['texts']} at once, {line['decode_tokens_per_s']:,.1f} tokens/s"


def run(args: argparse.Namespace) -> None:
    """Check the arguments and measure."""
    for option in ("context", "gen", "repeat"):
        if getattr(args, option) < 1:
            raise UsageError(f"--{option}: wanted 1 or more, found {getattr(args, option)}")
    if min(args.batch) < 1 or args.context + args.gen > 4096:
        raise UsageError("--batch: wanted 1 or more texts; --context and --gen: together at most 4,096 tokens")
    measure(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
