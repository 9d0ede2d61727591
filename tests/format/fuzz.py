"""Damage a tiny `.billm` file in a hundred thousand ways: every mutant is refused with a clear error, or it is whole.

    python tests/format/fuzz.py --mutants 100000 --seed 1 [--run-model]

A mutant that opens must be usable to the end: every tensor read, verified, described; with --run-model also loaded and
run by the runtime. Only the project's own errors may come out; each mutant's time and the process's memory are watched.
Mutant i of seed s is always the same: `--first i --mutants 1 --seed s` repeats it, and --keep FOLDER keeps its file
(the last one is there after a crash, too).
"""

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "format")]

from forge import RECORDS, Forge, assemble, fix_hash  # noqa: E402

from billm_format import BillmError, BillmFile, CorruptFileError  # noqa: E402
from billm_format.info import describe  # noqa: E402

SECONDS_PER_MUTANT = 2.0
BYTES_OF_GROWTH = 300 << 20

NUMBERS: list[Any] = [
    0,
    1,
    -1,
    2,
    3,
    31,
    63,
    64,
    65,
    255,
    256,
    4096,
    4097,
    2**24,
    2**31,
    2**32,
    2**53,
    2**62,
    2**63,
    2**64,
]
NUMBERS += [-(2**63), 10**400, 0.5, 1e-45, 1e-300, 1e308, -0.0, 1.0, 1e3]
ODD: list[Any] = [
    "",
    "x",
    "\x00",
    "\x1b[2J",
    "\ud800",
    "é" * 300,
    "U8",
    "F16",
    "F32",
    "I8",
    None,
    True,
    False,
    [],
    {},
    [[]],
]
TEXTS = ["NaN", "1e999", "-Infinity", "9" * 5000, "[" * 3000, '{"a":' * 3000, '"\\ud800"', "null", "", "{", "\ufeff{}"]

Mutation = Callable[[random.Random, bytes], bytes]


# ---- damage by chance: bytes of the whole file


def flip(rng: random.Random, content: bytes) -> bytes:
    """Change some bytes anywhere."""
    damaged = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8, 100])):
        damaged[rng.randrange(len(damaged))] ^= rng.randrange(1, 256)
    return bytes(damaged)


def cut(rng: random.Random, content: bytes) -> bytes:
    """Shorten, lengthen, or drop, repeat and move a stretch."""
    a, b = sorted((rng.randrange(len(content)), rng.randrange(len(content))))
    return rng.choice(
        [content[:a], content + content[a:b], content[:a] + content[b:], content[:b] + content[a:], content[a:]]
    )


def length(rng: random.Random, content: bytes) -> bytes:
    """Lie about the header's length."""
    n = int.from_bytes(content[:8], "little")
    lie = rng.choice(
        [n + rng.randrange(-70, 70), rng.getrandbits(64), 1 << rng.randrange(64), rng.randrange(len(content))]
    )
    return (lie % 2**64).to_bytes(8, "little") + content[8:]


# ---- damage on purpose, under checksums that match


def header_bytes(rng: random.Random, content: bytes) -> bytes:
    """Change bytes of the header's text, then make its checksum match."""
    end = 8 + int.from_bytes(content[:8], "little")
    raw = bytearray(content[8:end].rstrip(b" "))
    for _ in range(rng.choice([1, 1, 2, 5])):
        place = rng.randrange(len(raw))
        kind = rng.randrange(4)
        if kind == 0:
            raw[place] = rng.choice(b'0123456789[]{},:"\\ -.eE' + bytes([rng.randrange(256)]))
        elif kind == 1:
            raw[place:place] = rng.choice([b"0", b",", b"]", b"}", b'"', b"\\", b"[" * 2000, b"9" * 30, b" "])
        elif kind == 2:
            del raw[place : place + rng.choice([1, 1, 5, 50])]
        else:
            start = rng.randrange(len(raw))
            raw[place:place] = raw[start : start + rng.choice([3, 30, 300])]
    if rng.random() < 0.5:  # keep the data where it was, so that more than the file's size is looked at
        raw = bytearray(bytes(raw).ljust(end - 8))
        return len(raw).to_bytes(8, "little") + fix_hash(bytes(raw)) + content[end:]
    return assemble(bytes(raw), content[end:])


def header_values(rng: random.Random, content: bytes) -> bytes:
    """Replace, drop, add or swap values anywhere in the header and its records."""
    forge = Forge(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        mutate_value(rng, rng.choice([forge.entries, forge.metadata, *(forge.metadata[key] for key in RECORDS)]))
        if not all(isinstance(forge.metadata.get(key), dict) for key in RECORDS):
            break
    return build(rng, forge)


def mutate_value(rng: random.Random, node: Any) -> None:
    """Walk down from `node` to a random place and change what is there."""
    while isinstance(node, dict | list) and node:
        keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = rng.choice(keys)
        if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8:
            node = node[key]
            continue
        kind = rng.randrange(6)
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[rng.choice(["x", "pad.7", str(key) + "x", "layers.0.q_proj.sign"])] = node[rng.choice(keys)]
        elif kind == 2:
            other = rng.choice(keys)
            node[key], node[other] = node[other], node[key]
        elif kind == 3 and isinstance(node[key], int):
            node[key] += rng.choice([-64, -1, 1, 64])
        else:
            node[key] = rng.choice(rng.choice([NUMBERS, NUMBERS, ODD]))
        return


def record_text(rng: random.Random, content: bytes) -> bytes:
    """Put strange JSON text into a record."""
    forge = Forge(content)
    key = rng.choice(RECORDS)
    text = json.dumps(forge.metadata[key])
    place = rng.randrange(len(text))
    forge.metadata[key] = rng.choice([rng.choice(TEXTS), text[:place] + rng.choice(TEXTS) + text[place:], text[:place]])
    return build(rng, forge)


def tensors(rng: random.Random, content: bytes) -> bytes:
    """Change the tensors' bytes and sizes, every place and checksum made to match: only the layout can tell."""
    forge = Forge(content)
    names = list(forge.data)
    for _ in range(rng.choice([1, 1, 3, 20])):
        name = rng.choice(names)
        data = forge.data[name]
        kind = rng.randrange(5)
        if kind == 0:
            forge.data[name] = rng.randbytes(len(data))
        elif kind == 1:
            forge.data[name] = rng.choice([b"\xff", b"\0", b"\x7f", b"\x80", b"\x7c\x00", b"\x00\x7c"]) * len(data)
            forge.data[name] = forge.data[name][: len(data)]
        elif kind == 2 and data:
            place = rng.randrange(len(data))
            forge.data[name] = data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
        elif kind == 3 and rng.random() < 0.2:
            forge.data[name] = data + bytes(rng.choice([1, 4, 64])) if rng.random() < 0.5 else data[:-1]
        else:
            other = rng.choice(names)
            if len(forge.data[other]) == len(data) or rng.random() < 0.1:
                forge.data[name], forge.data[other] = forge.data[other], data
    forge.place()
    return forge.build()


def settings(rng: random.Random, content: bytes) -> bytes:
    """Change fields of the config that no tensor depends on: most of these mutants open, and must run."""
    forge = Forge(content)
    config = forge.metadata["config"]
    free = {
        "max_position_embeddings": [1, 2, 5, 2**24],
        "norm_eps": [1e-45, 1e-12, 1.0, 0.5],
        "rope_scale": [1e-45, 1e-3, 1000.0],
        "activation": ["silu", "gelu", "gelu_tanh", "relu"],
        "norm_position": ["pre", "post"],
        "sliding_window": [None, 1, 2, 2**24],
        "eos_token_ids": [[], [0], list(range(config["vocab_size"])), [1] * 1000],
        "bos_token_id": [None, 0, config["vocab_size"] - 1],
        "position_offset": [0, 1, 2, 2**24],
        "family": ["", "\x1b[2J", "é" * 5000],
    }
    for name in rng.sample(list(free), rng.choice([1, 2, 5])):
        config[name] = rng.choice(free[name])
    forge.metadata["tokenizer"][rng.choice(["bos_token", "eos_token", "unk_token"])] = rng.choice(
        [None, "", "w3", "é\n"]
    )
    return forge.build()


def build(rng: random.Random, forge: Forge) -> bytes:
    """Put the parts together, sometimes without what makes the header a file of ours."""
    try:
        return forge.build()
    except (UnicodeEncodeError, ValueError, TypeError):
        return rng.randbytes(100)


MUTATIONS: dict[str, tuple[Mutation, int]] = {
    "flip": (flip, 2),
    "cut": (cut, 1),
    "length": (length, 1),
    "header bytes": (header_bytes, 4),
    "header values": (header_values, 6),
    "record text": (record_text, 2),
    "tensors": (tensors, 3),
    "settings": (settings, 3),
}


def mutant(seed: int, index: int, seeds: list[bytes]) -> tuple[str, bytes]:
    """Return the kind and the content of mutant `index`: the same for ever."""
    rng = random.Random(f"{seed}/{index}")
    kind = rng.choices(list(MUTATIONS), [weight for _, weight in MUTATIONS.values()])[0]
    return kind, MUTATIONS[kind][0](rng, rng.choice(seeds))


# ---- what must hold


def exercise(path: Path) -> str:
    """Use the file at `path` to the end; return what became of it. Raises what must not happen."""
    try:
        file = BillmFile.open(path)
    except CorruptFileError as error:
        message = str(error)
        if "\n" in message or not message.startswith(str(path)) or not message.isprintable():
            raise AssertionError(f"not one clear sentence: {message!r}") from error
        return "refused"
    with file:
        if sum(file.sizes_by_kind().values()) != path.stat().st_size:
            raise AssertionError("sizes do not add up to the file")
        try:
            json.dumps(describe(file, layers=True), ensure_ascii=False, allow_nan=False).encode()
            file.verify()
        except CorruptFileError:
            return "data refused"
        for name, info in file.tensors.items():
            if file.array(name).nbytes != info.nbytes:
                raise AssertionError(f"{name} has another size than it says")
    return "whole"


def run_model(path: Path) -> str:
    """Load the file with the runtime and compute logits, whatever its data are."""
    import numpy as np

    import billm_rt

    try:
        with billm_rt.load(path) as model:
            size = min(5, model.ctx)
            logits = model.logits([token % model.config.vocab_size for token in (1, 2, 3, 1, 0)][:size])
            if logits.shape != (size, model.config.vocab_size) or logits.dtype != np.float32:
                raise AssertionError(f"logits {logits.dtype} {logits.shape}")
    except BillmError:
        return "runtime refused"
    return "ran"


def fuzz(
    mutants: int, seed: int, *, first: int = 0, folder: Path, run: bool = False, quiet: bool = True
) -> Counter[tuple[str, str]]:
    """Try `mutants` mutants; return how many of each kind came to which end. Raises at the first that misbehaves."""
    seeds = [path.read_bytes() for path in sorted((ROOT / "format" / "vectors").glob("v*/*.billm"))]
    ends: Counter[tuple[str, str]] = Counter()
    path = folder / "mutant.billm"
    if run:
        run_model(next((ROOT / "format" / "vectors").glob("v*/*.billm")))  # imports are not a mutant's time
    slowest = 0.0
    peak = 0
    for index in range(first, first + mutants):
        kind, content = mutant(seed, index, seeds)
        path.write_bytes(content)
        started = time.process_time()
        try:
            end = exercise(path)
            ends[kind, end] += 1
            if run and end != "refused":
                ends[kind, run_model(path)] += 1
            took = time.process_time() - started
            slowest = max(slowest, took)
            if took > SECONDS_PER_MUTANT:
                raise AssertionError(f"took {took:.1f} s")
            now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)
            if index == first + 20:
                peak = now
            elif peak and now > peak + BYTES_OF_GROWTH:
                raise AssertionError(f"memory grew from {peak >> 20} to {now >> 20} MiB")
        except Exception as error:
            raise AssertionError(f"mutant {index} of seed {seed} ({kind}): {type(error).__name__}: {error}") from error
        if not quiet and (index + 1) % 10_000 == 0:
            print(f"{index + 1} mutants, slowest {slowest:.3f} s, at most {now >> 20} MiB", flush=True)
    return ends


def main() -> int:
    """Run from the command line."""
    import faulthandler

    faulthandler.enable()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=None, help="default: a fresh one, printed")
    parser.add_argument("--first", type=int, default=0, help="index of the first mutant")
    parser.add_argument("--run-model", action="store_true", help="run the mutants that open through billm_rt")
    parser.add_argument("--keep", type=Path, help="folder for the mutant's file, kept at the end")
    args = parser.parse_args()
    seed = random.randrange(2**32) if args.seed is None else args.seed
    print(f"seed {seed}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        ends = fuzz(args.mutants, seed, first=args.first, folder=folder, run=args.run_model, quiet=False)
    for (kind, end), count in sorted(ends.items()):
        print(f"{kind:14} {end:16} {count:8}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
