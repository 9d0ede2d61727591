"""What the chat says about the model, its memory and its speed, as plain text."""

from typing import TYPE_CHECKING

from billm_chat.session import INTERRUPTED, LOOP, Session, Turn
from billm_chat.settings import OPTIONS, shown, shown_value

if TYPE_CHECKING:
    from billm_format.config import ModelConfig
    from billm_rt import Model

# Below this size, a model that the paper's own recipe binarized writes words without sense.
_SENSE_PARAMETERS = 1_000_000_000

_SLOW_PATHS = {
    "numpy": "the native CPU library is missing: answers are right but slow (NumPy); reinstall with a C compiler",
    "exact": "the exact float32 path is in use: slow",
}


def parameters(config: "ModelConfig") -> int:
    """Return the number of weights: Linears of all layers, token embedding, output head."""
    linears = sum(rows * cols for rows, cols, _ in config.linears().values())
    tables = config.vocab_size * config.embedding_size * (1 if config.tie_word_embeddings else 2)
    return linears * config.num_hidden_layers + tables


def banner(session: Session) -> str:
    """Return the lines that a chat starts with: what runs, how large it is, on what."""
    model = session.model
    lines = [
        f"{model.file.path.name} · {_family(model)} · {size(model.file.nbytes)}",
        _bits(model),
        f"{_device(model)} · context {model.ctx:,} tokens · loaded in {model.load_seconds:.2f} s",
    ]
    return "\n".join(lines)


def warnings(session: Session) -> list[str]:
    """Return what a user should know before the first message, one sentence each."""
    model, notes = session.model, []
    if model.isa in _SLOW_PATHS:
        notes.append(_SLOW_PATHS[model.isa])
    if session.raw:
        notes.append("--raw: no chat template; the model goes on where the text so far ends.")
    elif not model.tokenizer.has_chat_template:
        notes.append("This model has no chat template: a plain one (USER: … ASSISTANT: …) is used; /show template.")
    if model.file.conversion.get("recipe") == "paper" and parameters(model.config) < _SENSE_PARAMETERS:
        notes.append("By the paper's recipe a model this small does not talk sense.")
    return notes


def info(session: Session) -> str:
    """Return what `/show info` prints."""
    model, config = session.model, session.model.config
    record = model.file.conversion
    lines = [
        f"file      {model.file.path} ({size(model.file.nbytes)})",
        f"model     {_family(model)}: {config.num_hidden_layers} layers of width {config.hidden_size}, "
        f"{config.num_attention_heads} heads ({config.num_key_value_heads} key/value), "
        f"vocabulary of {config.vocab_size:,}",
        f"bits      {_bits(model)}",
        f"recipe    {record.get('recipe', 'not recorded')}, block size {model.file.quantization.block_size}",
        f"running   {_device(model)}",
        f"context   {model.ctx:,} of at most {config.max_position_embeddings:,} tokens",
    ]
    return "\n".join(lines)


def template(session: Session) -> str:
    """Return the conversation as the model reads it, an example where there is none yet."""
    if session.raw:
        return "--raw: no template"
    turns = [{"role": message.role, "content": message.content} for message in session.messages[session.first :]]
    turns = turns or [{"role": "user", "content": "(your message)"}]
    if session.system:
        turns.insert(0, {"role": "system", "content": session.system})
    tokenizer = session.model.tokenizer
    origin = "the model's own template" if tokenizer.has_chat_template else "the plain template (the model has none)"
    return f"({origin})\n{tokenizer.render_chat(turns, add_generation_prompt=True)}"


def memory(session: Session) -> str:
    """Return what `/show memory` prints: every part that `Model.memory` knows, in order."""
    parts = session.model.memory()
    return "\n".join(f"{name:<20} {size(parts[name]):>10}" for name in parts if parts[name])


def speed(turn: Turn, context: str) -> str:
    """Return the one line that follows an answer when `/stats on`."""
    return f"prompt {_prompt_speed(turn)} · answer {_answer_speed(turn)} · context {context}"


def stats(session: Session) -> str:
    """Return what `/stats` prints."""
    lines = []
    if session.last is not None:
        lines = [f"prompt    {_prompt_speed(session.last)}", f"answer    {_answer_speed(session.last)}"]
    parts = session.model.memory()
    lines.append(f"context   {context(session)} · KV cache {size(parts['kv_cache'])}")
    lines.append(
        f"memory    {size(parts['rss'])} resident, {size(parts['peak_rss'])} at most; "
        f"{size(session.model.file.nbytes)} of it the file"
    )
    lines.append(f"running   {_device(session.model)}")
    return "\n".join(lines)


def context(session: Session) -> str:
    """Return how full the context is."""
    used, ctx = session.context_tokens(), session.model.ctx
    left_out = f", {session.first} old messages left out" if session.first else ""
    return f"{used:,} of {ctx:,} tokens ({100 * used / ctx:.0f} %{left_out})"


def settings(session: Session) -> str:
    """Return every setting with its value and meaning."""
    return "\n".join(
        f"{shown(name):<15} {shown_value(getattr(session.settings, name)):<8} {option.help}"
        for name, option in OPTIONS.items()
    )


def ending(session: Session) -> str | None:
    """Return what to say of the last answer's end in a chat, None if it ended as it should."""
    turn, limit = session.last, session.settings.max_tokens
    if turn is None:
        return None
    if turn.finish_reason in ("eos", "stop"):
        return None if turn.text.strip() else "(the model had nothing to say; /regen asks again)"
    return {
        INTERRUPTED: "(stopped; what was said so far stays in the conversation)",
        LOOP: "(ended, because it repeated itself over and over; /regen tries again, "
        "/set repeat-penalty 1.3 helps, /set stop-loops off lets it go on)",
        "length": f"(ended at {limit:,} tokens; /set max-tokens {2 * limit} allows more)",
        "context": f"(ended, because the context of {session.model.ctx:,} tokens is full; "
        "the next message leaves out the oldest ones, /reset starts anew)",
    }[turn.finish_reason]


def one_shot_ending(session: Session) -> str | None:
    """Return what to say of a one-shot answer's end, None if it ended as it should."""
    if session.last is None:
        return None
    return {
        LOOP: "the answer repeated itself over and over and was ended; try --repeat-penalty 1.3, or --no-stop-loops",
        "length": f"the answer was ended at {session.settings.max_tokens:,} tokens; --max-tokens allows more",
        "context": f"the answer was ended, because the context of {session.model.ctx:,} tokens is full",
    }.get(session.last.finish_reason)


def size(count: int) -> str:
    """Return a number of bytes for people, in decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}" if count < 1000 * factor else f"{count / factor:,.0f} {unit}"
    return f"{count} bytes"


def _family(model: "Model") -> str:
    count = parameters(model.config)
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{model.config.family}, {count / factor:.3g} {unit} parameters"
    return f"{model.config.family}, {count} parameters"


def _bits(model: "Model") -> str:
    paper, true = model.file.bits()
    return f"{true:.2f} bits per binarized weight in the file ({paper:.2f} by the paper's count)"


def _device(model: "Model") -> str:
    return f"{model.device}, {model.isa}"


def _prompt_speed(turn: Turn) -> str:
    read = turn.prompt_tokens - turn.reused_tokens
    reused = f", {turn.reused_tokens:,} of them reused" if turn.reused_tokens else ""
    return f"{turn.prompt_tokens:,} tokens{reused}, {read:,} read at {_rate(read, turn.prompt_seconds)}"


def _answer_speed(turn: Turn) -> str:
    # The first token comes out of reading the prompt: the time runs from it to the last.
    guessed = f", {turn.accepted_tokens:,} of {turn.proposed_tokens:,} guesses right" if turn.proposed_tokens else ""
    return f"{turn.generated_tokens:,} tokens at {_rate(turn.generated_tokens - 1, turn.generation_seconds)}{guessed}"


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:.1f} tokens/s" if tokens > 0 and seconds > 0 else "no measurable speed"
