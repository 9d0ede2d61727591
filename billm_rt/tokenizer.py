"""Text to tokens and back, and chat templates as Hugging Face renders them; the libraries load at first use."""

import datetime
import json
import re
import secrets
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from billm_format.config import ModelConfig, TokenizerInfo
from billm_format.errors import CorruptFileError, UsageError
from billm_rt.memory import release_free_memory

Message = Mapping[str, Any]  # {"role": "system" | "user" | "assistant", "content": text}

# For models without a template of their own (Vicuna, LLaMA and OPT base models): Vicuna's layout, without its fixed
# introduction, which a system message can be.
PLAIN_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ message['content'] + ' ' }}
{%- elif message['role'] == 'user' -%}{{ 'USER: ' + message['content'] + ' ' }}
{%- else -%}{{ 'ASSISTANT: ' + message['content'] + eos_token }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"""

# A character is at most 4 bytes; tokens that still end in half of one after this many never will be whole.
_MAX_PENDING = 8


class Tokenizer:
    """The tokenizer that a file carries."""

    def __init__(
        self, tokenizer_json: str, info: TokenizerInfo, config: ModelConfig, chat_template: str | None
    ) -> None:
        """Parse tokenizer.json; CorruptFileError if it is not one."""
        from tokenizers import Tokenizer as FastTokenizer

        try:
            self._fast = FastTokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises the bare class
            raise CorruptFileError(f"tensor tokenizer.json is not a tokenizer ({error}): convert again") from None
        release_free_memory()  # parsing leaves as much behind as it makes: 28 MB of 48 with a vocabulary of 49,152
        self._fast.no_truncation()
        self._fast.no_padding()
        self._lock = threading.Lock()
        self._template_text = chat_template
        self.info = info
        self.add_bos = info.add_bos
        self.bos_token = info.bos_token
        self.bos_token_id = self._id_of(info.bos_token, config.bos_token_id)
        self.eos_token_ids = config.eos_token_ids

    @property
    def has_chat_template(self) -> bool:
        """Whether the file has a template of its own; if not, PLAIN_TEMPLATE is used."""
        return self._template_text is not None

    @property
    def chat_stops(self) -> tuple[str, ...]:
        """Stop strings that a chat should add: the next turn's heading, which only PLAIN_TEMPLATE writes as text."""
        return () if self.has_chat_template else ("USER:",)

    def encode(self, text: str, *, add_bos: bool | None = None, special: bool = False) -> list[int]:
        """Return the token ids of `text`.

        `add_bos`: put the beginning-of-text token in front (None: as the model does). `special`: read special tokens'
        names in the text ("<|im_start|>") as these tokens; otherwise they are plain characters, so that what people
        type cannot steer the model. Tokens that the tokenizer itself does not mark as special are always read.
        """
        with self._lock:  # a switch of the tokenizer, not an argument
            self._fast.encode_special_tokens = not special
            ids: list[int] = self._fast.encode(text, add_special_tokens=False).ids
        wanted = self.add_bos if add_bos is None else add_bos
        return [self.bos_token_id, *ids] if wanted and self.bos_token_id is not None else ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`; special tokens have none, and invalid UTF-8 becomes U+FFFD."""
        text: str = self._fast.decode(list(token_ids), skip_special_tokens=True)
        return text

    def stream(self) -> "StreamDecoder":
        """Return a decoder that takes one token at a time."""
        return StreamDecoder(self)

    def render_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Return the conversation as the text that the model reads; UsageError if the template refuses it."""
        from jinja2 import TemplateError

        tokens = {name: text or "" for name, text in vars(self.info).items() if name.endswith("_token")}
        tokens["bos_token"] = tokens["bos_token"] if self.has_chat_template or self.add_bos else ""
        try:
            text: str = self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **tokens,
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise UsageError(f"the model's chat template refuses this conversation: {error}") from None
        return text

    def apply_chat_template(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Return the conversation's token ids: special tokens of the template count, those in a message do not.

        Where a message holds the name of a special token, a random mark takes its place while the template is rendered
        and the name is then encoded as plain text; every other conversation is encoded in one piece.
        """
        mark = secrets.token_hex(8)
        typed: list[str] = []

        def hide(found: re.Match[str]) -> str:
            typed.append(found[0])
            return f"{mark}{len(typed) - 1}."

        hidden = [
            {key: self._special_names.sub(hide, value) if isinstance(value, str) else value for key, value in m.items()}
            for m in messages
        ]
        text = self.render_chat(hidden, add_generation_prompt=add_generation_prompt)
        ids: list[int] = []
        for index, piece in enumerate(re.split(rf"{mark}(\d+)\.", text)):
            is_typed = index % 2 == 1
            piece = typed[int(piece)] if is_typed else piece
            ids += self.encode(piece, add_bos=False, special=not is_typed) if piece else []
        return ids

    @cached_property
    def _special_names(self) -> re.Pattern[str]:
        names = [token.content for token in self._fast.get_added_tokens_decoder().values() if token.special]
        # Longest first, so that a name is not cut short by one that it begins with; no name at all never matches.
        return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or r"(?!)")

    @cached_property
    def _template(self) -> Any:
        from jinja2 import TemplateError

        text = PLAIN_TEMPLATE if self._template_text is None else self._template_text
        try:
            return _environment().from_string(text)
        except TemplateError as error:
            raise CorruptFileError(f"chat_template.jinja does not compile: {error}; convert again") from None

    def _id_of(self, token: str | None, fallback: int | None) -> int | None:
        found: int | None = None if token is None else self._fast.token_to_id(token)
        return fallback if found is None else found


class StreamDecoder:
    """Turns tokens into text as they come, holding back what may be half a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._ids: list[int] = []  # the tokens shown last, then the pending ones
        self._shown = 0  # how many of them are shown

    def step(self, token_id: int) -> str:
        """Return the text that `token_id` completes, perhaps none."""
        self._ids.append(token_id)
        before, text = self._texts()
        if len(text) <= len(before) or (text.endswith("\ufffd") and len(self._ids) - self._shown < _MAX_PENDING):
            return ""
        # The tokens just shown stay as context: a tokenizer may write a token differently at the start of a text.
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return text[len(before) :]

    def flush(self) -> str:
        """Return what is held back, U+FFFD for a character that stayed incomplete, and start afresh."""
        before, text = self._texts()
        self._ids, self._shown = [], 0
        return text[len(before) :]

    def _texts(self) -> tuple[str, str]:
        return self._decode(self._ids[: self._shown]), self._decode(self._ids)


def _environment() -> Any:
    """Return the Jinja environment that chat templates are written for, unable to reach anything outside itself."""
    from jinja2 import TemplateError, ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(layout: str) -> str:
        return datetime.datetime.now().strftime(layout)

    def to_json(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML, which a model was never trained on.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment
