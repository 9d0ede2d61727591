"""Write the golden files: tiny models that every later version must read to the same values.

    PYTHONPATH=format python format/vectors/make_vectors.py [FOLDER]

writes those that the current version of the format added.

The expected values come from the slow decoder in tests/format, which shares no code with the writer. The files of a
released version are never written again: a new version of the format gets a folder of its own.
"""

import dataclasses
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from billm_format.config import ModelConfig, Quantization, TokenizerInfo
from billm_format.layout import CHAT_TEMPLATE, FORMAT_VERSION, TOKENIZER, TensorSpec, all_tensors
from billm_format.packing import pack_bits, pack_nibbles
from billm_format.writer import write_file

ROOT = Path(__file__).resolve().parents[2]
TOKENS = [1, 5, 9, 9, 20, 3]

# Short last blocks everywhere (36, 40 and 12 columns, blocks of 32 and 64), grouped heads, a window, a tied 8-bit head.
LLAMA = ModelConfig(
    family="llama", vocab_size=24, hidden_size=36, embedding_size=36, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=6, max_position_embeddings=16, norm="rmsnorm",
    norm_eps=1e-5, norm_position="pre", final_norm=True, position="rope", position_offset=0, rope_scale=1.25,
    activation="silu", gated_mlp=True, qkv_bias=False, o_bias=False, mlp_bias=False, qk_norm=True, sliding_window=4,
    tie_word_embeddings=True, bos_token_id=1, eos_token_ids=(2, 4),
)  # fmt: skip
LLAMA_PARTS = Quantization(block_size=32, overrides={"layers.1.up_proj": 64}, col_scales=("layers.0.down_proj",))

# All that LLaMA models do not have: post-norm, biases, learned positions, projections, a 16-bit head of its own.
OPT = ModelConfig(
    family="opt", vocab_size=24, hidden_size=36, embedding_size=20, intermediate_size=40, num_hidden_layers=1,
    num_attention_heads=3, num_key_value_heads=3, head_dim=12, max_position_embeddings=16, norm="layernorm",
    norm_eps=1e-5, norm_position="post", final_norm=False, position="learned", position_offset=2, rope_scale=1.0,
    activation="relu", gated_mlp=False, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=False, sliding_window=None,
    tie_word_embeddings=False, bos_token_id=None, eos_token_ids=(2,),
)  # fmt: skip
OPT_PARTS = Quantization(block_size=128, embedding_bits=16)

# A 4-bit embedding and a 4-bit head, whose last group is short (36 columns, groups of 32).
LLAMA_4BIT = dataclasses.replace(LLAMA, tie_word_embeddings=False, num_hidden_layers=1)
LLAMA_4BIT_PARTS = Quantization(block_size=32, embedding_bits=4)

# What each version of the format added.
VERSIONS = {
    "v1.0": {"llama": (LLAMA, LLAMA_PARTS, 11), "opt": (OPT, OPT_PARTS, 12)},
    "v1.1": {"llama-4bit": (LLAMA_4BIT, LLAMA_4BIT_PARTS, 13)},
}

TOKENIZER_JSON = (
    '{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,'
    '"pre_tokenizer":{"type":"Whitespace"},"post_processor":null,"decoder":null,"model":{"type":"WordLevel",'
    '"vocab":{"<unk>":0,"<s>":1,"</s>":2,' + ",".join(f'"w{i}":{i}' for i in range(3, 24)) + '},"unk_token":"<unk>"}}'
)


def tensor(rng: random.Random, spec: TensorSpec, cols: int) -> NDArray[Any]:
    """Return a random tensor; `cols` are the columns of the Linear that it belongs to.

    Only `random()` and `randrange` of Python's generator are used, whose sequence is the same in all its versions.
    """
    part = spec.name.rpartition(".")[2]
    count = spec.nbytes // {"U8": 1, "I8": 1, "F16": 2, "F32": 4}[spec.dtype]
    if part in ("sign", "second", "salient"):
        share = 0.2 if part == "salient" else 0.5
        rows = spec.shape[0] if len(spec.shape) == 2 else 1
        bits = np.array([[rng.random() < share for _ in range(cols)] for _ in range(rows)])
        return pack_bits(bits).reshape(spec.shape)
    if spec.kind in ("embedding", "head") and spec.dtype == "U8":
        codes = [[rng.randrange(16) for _ in range(LLAMA_4BIT.embedding_size)] for _ in range(spec.shape[0])]
        return pack_nibbles(np.array(codes, np.uint8))
    if spec.dtype == "U8":  # scales: any byte has a meaning, so all are used
        return np.array([rng.randrange(256) for _ in range(count)], np.uint8).reshape(spec.shape)
    if spec.dtype == "I8":
        return np.array([rng.randrange(-128, 128) for _ in range(count)], np.int8).reshape(spec.shape)
    low, high = {"row_scale": (0.0005, 0.002), "col_scale": (0.5, 2), "scale": (0.01, 0.03)}.get(part, (-1, 1))
    values = np.array([low + (high - low) * rng.random() for _ in range(count)])
    return values.astype({"F16": np.float16, "F32": np.float32}[spec.dtype]).reshape(spec.shape)


def write(folder: Path, name: str, config: ModelConfig, quantization: Quantization, seed: int) -> Path:
    """Write the golden file of this name into `folder`."""
    rng = random.Random(seed)
    linears = config.linears()
    tensors: dict[str, Any] = {TOKENIZER: TOKENIZER_JSON.encode()}
    if name == "llama":
        tensors[CHAT_TEMPLATE] = b"{% for message in messages %}{{ message['content'] }}{% endfor %}"
    for spec in all_tensors(config, quantization):
        if spec.kind != "tokenizer":
            parts = spec.name.split(".")
            cols = linears[parts[2]][1] if len(parts) == 4 and parts[2] in linears else 0
            tensors[spec.name] = partial(np.copy, tensor(rng, spec, cols))
    path = folder / f"{name}.billm"
    write_file(
        path,
        config=config,
        quantization=quantization,
        tokenizer_info=TokenizerInfo(bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos=name == "llama"),
        conversion={"recipe": "random", "seed": seed, "note": "golden file, \u00fcn\u00efcode"},
        tensors=tensors,
    )
    return path


def write_expected(path: Path) -> None:
    """Write what a reader must get from the file at `path`: weights, embeddings, and the logits of TOKENS."""
    sys.path.insert(0, str(ROOT / "tests" / "format"))
    from slow_decoder import SlowFile

    slow = SlowFile(path)
    names = [f"layers.{i}.{part}" for i in range(slow.config["num_hidden_layers"]) for part in slow.linear_shapes()]
    expected = {name: slow.weights(name) for name in names} | {"embed": slow.table("embed")}
    if not slow.config["tie_word_embeddings"]:
        expected["head"] = slow.table("head")
    expected["logits"] = slow.logits(TOKENS)
    arrays = {name: np.array(value, np.float32) for name, value in expected.items()}
    save_file(arrays | {"tokens": np.array(TOKENS, np.int32)}, path.with_suffix(".expected.safetensors"))


def main() -> None:
    """Write all golden files and their expected values."""
    version = "v" + ".".join(map(str, FORMAT_VERSION))
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / version
    folder.mkdir(parents=True, exist_ok=True)
    for name, model in VERSIONS[version].items():
        write_expected(write(folder, name, *model))


if __name__ == "__main__":
    main()
