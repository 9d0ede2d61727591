"""Text that the model writes itself: conversations in its template's form, or plain text, drawn as its logits say."""

from pathlib import Path

import pytest
import torch
from convert.hf_models import save_model

from billm_convert import sampling
from billm_convert.block import Rotary
from billm_convert.sampling import ChatForm, chat_form, sample_windows
from billm_convert.source import ModelSource, open_model
from billm_format.errors import DoesNotFitError
from billm_rt.tokenizer import Tokenizer

CPU = torch.device("cpu")
CHATML = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}{{ '<s>sys be good</s>' }}{%- endif -%}
{{ '<s>' + message['role'] + ':' + message['content'] + '</s>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<s>assistant:' }}{%- endif -%}"""
BRACKETS = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}
{%- else -%}{{ ' ' + message['content'] + ' ' + eos_token }}{%- endif -%}
{%- endfor -%}"""
# Says nothing, refuses a second question, says everything twice.
UNUSABLE = (
    "nothing",
    "{{ raise_exception('one turn only') if messages|length > 1 else messages[0]['content'] }}",
    "{% for message in messages %}{{ message['content'] * 2 }}{% endfor %}",
)


def model(folder: Path, seed: int, template: str | None) -> tuple[ModelSource, Tokenizer]:
    save_model(folder, "llama-tied-gqa", seed)
    (folder / "chat_template.jinja").unlink()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    source = open_model(folder)
    return source, source.tokenizer().load(source.config)


def form_of(source: ModelSource, tokenizer: Tokenizer) -> ChatForm:
    form = chat_form(tokenizer)
    assert form is not None
    return form


def sample(source: ModelSource, form: ChatForm | None, windows: int, seqlen: int, seed: int) -> list[list[int]]:
    found: list[list[int]] = sample_windows(source, form, windows, seqlen, seed, CPU, lambda done, total: None).tolist()
    return found


@pytest.mark.parametrize(
    ("template", "pieces"),
    [
        (CHATML, ("<s>sys be good</s><s>user:", "</s><s>assistant:", "</s><s>user:")),
        (BRACKETS, ("<s>[INST] ", " [/INST]", " </s><s>[INST] ")),
    ],
)
def test_the_form_of_a_template(template: str, pieces: tuple[str, ...], tmp_path: Path, seed: int) -> None:
    source, tokenizer = model(tmp_path / "m", seed, template)
    form = form_of(source, tokenizer)
    wanted = [tuple(tokenizer.encode(piece, add_bos=False, special=True)) for piece in pieces]
    assert [form.opening, form.answer, form.question] == wanted
    assert form.ends == {2}


@pytest.mark.parametrize("template", [None, *UNUSABLE])
def test_no_form(template: str | None, tmp_path: Path, seed: int) -> None:
    assert chat_form(model(tmp_path / "m", seed, template)[1]) is None


def turns(window: list[int], form: ChatForm) -> list[list[int]]:
    """Return what was written between the form's separators, each of which must be where it belongs."""
    assert tuple(window[: len(form.opening)]) == form.opening
    found: list[list[int]] = [[]]
    at = len(form.opening)
    while at < len(window):
        separator = form.answer if len(found) % 2 else form.question
        if tuple(window[at : at + len(separator)]) == separator[: len(window) - at]:
            found.append([])
            at += len(separator)
        else:
            found[-1].append(window[at])
            at += 1
    return found


def test_conversations(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model ends few turns by itself: most are cut at the limits, which are small here."""
    monkeypatch.setattr(sampling, "_LONGEST_QUESTION", 9)
    monkeypatch.setattr(sampling, "_LONGEST_ANSWER", 14)
    monkeypatch.setattr(sampling, "_BATCH", 3)
    source, tokenizer = model(tmp_path / "m", seed, CHATML)
    form = form_of(source, tokenizer)
    windows = sample(source, form, 5, 120, seed)
    assert [len(window) for window in windows] == [120] * 5
    found = [turns(window, form) for window in windows]
    assert all(len(written) >= 4 for written in found)
    for written in found:
        assert all(len(turn) <= (14 if index % 2 else 9) for index, turn in enumerate(written))
        assert not any(form.ends & set(turn) for turn in written)
    assert any(len(turn) == 14 for written in found for turn in written)
    assert len({tuple(window) for window in windows}) == 5
    assert sample(source, form, 5, 120, seed) == windows
    assert sample(source, form, 5, 120, seed + 1) != windows


def test_how_many_windows_are_written_at_once_changes_nothing(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, tokenizer = model(tmp_path / "m", seed, CHATML)
    for form in (form_of(source, tokenizer), None):
        monkeypatch.setattr(sampling, "_BATCH", 96)
        together = sample(source, form, 5, 40, seed)
        monkeypatch.setattr(sampling, "_BATCH", 2)
        apart = sample(source, form, 5, 40, seed)
        # Sums in another order can move a number across a border between tokens, rarely.
        assert sum(one == other for one, other in zip(together, apart, strict=True)) >= 4


def test_a_model_that_does_not_fit_is_refused(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = model(tmp_path / "m", seed, None)
    monkeypatch.setattr(sampling, "free_memory", lambda device: 100_000)
    with pytest.raises(DoesNotFitError, match=r"GB of weights \+ .*--calib pydoc needs none at hand"):
        sample(source, None, 1, 20, seed)


def test_a_turn_ends_where_the_model_ends_it(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source, tokenizer = model(tmp_path / "m", seed, CHATML)
    form = form_of(source, tokenizer)
    monkeypatch.setattr(sampling, "_draw", lambda logits, numbers: torch.full((len(logits), 1), 2))
    window = sample(source, form, 1, 60, seed)[0]
    assert set(map(len, turns(window, form))) == {0}


def test_questions_are_drawn_hotter_than_answers(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source, tokenizer = model(tmp_path / "m", seed, CHATML)
    form = form_of(source, tokenizer)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(sampling._Model, "next_logits", lambda self, tokens, *_: torch.ones(len(tokens), 320))

    def draw(logits: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        seen.append(logits)
        return torch.full((len(logits), 1), 5)

    monkeypatch.setattr(sampling, "_draw", draw)
    sample(source, form, 1, 250, seed)
    values = {round(float(logits[0, 0]), 3) for logits in seen}
    assert values == {1.0, round(1 / 0.7, 3)}


def test_plain_text_begins_with_a_random_token(tmp_path: Path, seed: int) -> None:
    source, _ = model(tmp_path / "m", seed, None)
    windows = sample(source, None, 6, 20, seed)
    assert {window[0] for window in windows} == {1}
    assert len({window[1] for window in windows}) > 3
    assert sample(source, None, 6, 20, seed) == windows


def test_tokens_are_drawn_as_the_logits_say(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(12, generator=generator) * 2
    logits[3] = -torch.inf
    draws = 40_000
    numbers = torch.rand(draws, 1, generator=generator)
    found = sampling._draw(logits.repeat(draws, 1), numbers).flatten().bincount(minlength=12) / draws
    wanted = logits.double().softmax(0)
    assert found[3] == 0
    # Five standard deviations of a frequency.
    assert ((found - wanted).abs() <= 5 * (wanted * (1 - wanted) / draws).sqrt() + 1e-9).all()


def test_windows_are_what_the_whole_model_finds_likely(tmp_path: Path, seed: int) -> None:
    """Fed token by token with a cache, the model must see what it sees when it reads a window at once."""
    source, tokenizer = model(tmp_path / "m", seed, CHATML)
    form = form_of(source, tokenizer)
    fed: list[torch.Tensor] = []
    real = sampling._Model.next_logits

    def watch(self: sampling._Model, *arguments: object) -> torch.Tensor:
        fed.append(real(self, *arguments))  # type: ignore[arg-type]
        return fed[-1].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling._Model, "next_logits", watch)
        windows = sample(source, form, 3, 40, seed)
    whole = sampling._Model(source, 40, CPU)
    assert isinstance(whole.blocks[0]._rotary, Rotary)
    for position in (1, 20, 39):
        wanted = real(whole, torch.tensor(windows)[:, :position], 0, [sampling.KeyValues(40) for _ in whole.blocks])
        torch.testing.assert_close(fed[position - 1], wanted, rtol=1e-4, atol=1e-4)
