"""Command lines: parsing, every command's effect, saved conversations and what makes a bad one."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from chat.fake_model import FakeModel
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from billm_chat import commands, report
from billm_chat.commands import Call, Reply, Then, is_unfinished, parse
from billm_chat.line_input import CommandCompleter
from billm_chat.session import Message, Session
from billm_chat.settings import OPTIONS, Settings, changed, shown
from billm_format.errors import UsageError
from billm_rt import Model


@pytest.fixture
def session() -> Session:
    return Session(cast(Model, FakeModel(lambda index: f"answer {index}")), Settings())


def do(session: Session, line: str) -> Reply:
    call = parse(line)
    assert isinstance(call, Call), line
    return call.command.run(session, call.argument)


@pytest.mark.parametrize(
    ("line", "sent"),
    [
        ("hello", "hello"),
        ("//help is a word", "/help is a word"),
        ("/usr/bin is what?", "/usr/bin is what?"),
        ('"""one\ntwo"""', "one\ntwo"),
        ('"""\none\n\ntwo\n"""', "one\n\ntwo"),
        ("one\\\ntwo", "one\ntwo"),
        ("3 / 4", "3 / 4"),
        ("a\n/quit", "a\n/quit"),
    ],
)
def test_messages(line: str, sent: str) -> None:
    assert parse(line) == sent


@pytest.mark.parametrize(
    ("line", "name", "argument"),
    [
        ("/quit", "quit", ""),
        (" /EXIT ", "quit", ""),
        ("/bye", "quit", ""),
        ("/clear", "reset", ""),
        ("/?", "help", ""),
        ("/set temp 0.5", "set", "temp 0.5"),
        ("/system be kind\nand short", "system", "be kind\nand short"),
        ("/save! a b.json", "save!", "a b.json"),
    ],
)
def test_calls(line: str, name: str, argument: str) -> None:
    call = parse(line)
    assert isinstance(call, Call)
    assert (call.command.name, call.argument) == (name, argument)


@pytest.mark.parametrize(
    ("typo", "meant"), [("/regne", "/regen"), ("/quitt", "/quit"), ("/stat", "/stats"), ("/sav", "/save")]
)
def test_unknown_command_names_the_nearest(typo: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean {meant}"):
        parse(typo)
    with pytest.raises(UsageError, match="/help lists"):
        parse("/zzzzzz")
    with pytest.raises(UsageError, match="takes nothing"):
        parse("/undo twice")


@pytest.mark.parametrize(
    ("text", "unfinished"),
    [('"""a', True), ('"""a\nb"""', False), ("a\\", True), ("a", False), ('"""', True), ('say """x', False)],
)
def test_what_enter_means(text: str, unfinished: bool) -> None:
    assert is_unfinished(text) is unfinished


def test_help_names_every_command(session: Session) -> None:
    text = do(session, "/help").text
    assert all(command.usage in text for command in commands.COMMANDS)
    assert max(map(len, text.splitlines())) <= 90
    assert "also /clear" in do(session, "/help reset").text


def test_every_setting_can_be_shown_and_set(session: Session) -> None:
    values = {"temp": "0", "top_p": "0.5", "min_p": "0.1", "repeat_penalty": "1.5", "stop": "###", "seed": "7"}
    for name, option in OPTIONS.items():
        assert option.help in do(session, f"/set {shown(name)}").text
        value = values.get(name, "off" if isinstance(getattr(Settings(), name), bool) else "3")
        assert "is now" in do(session, f"/set {shown(name)} {value}").text
    assert session.settings == Settings(0.0, 3, 0.5, 0.1, 1.5, 3, 3, 7, 3, ("###",), False, False, False)
    do(session, "/set seed random")
    do(session, "/set temperature 1")
    assert session.settings.seed is None and session.settings.temp == 1


@pytest.mark.parametrize(
    "line",
    [
        "temp x",
        "temp -1",
        "temp nan",
        "temp inf",
        "top-p 0",
        "top-p 1.1",
        "top-k 1.5",
        "max-tokens 0",
        "seed -2",
        "repeat-penalty 0",
        "markdown maybe",
        "colour red",
        'stop ""',
    ],
)
def test_bad_settings_are_refused_and_change_nothing(session: Session, line: str) -> None:
    before = session.settings
    with pytest.raises(UsageError, match=line.split()[0]):
        do(session, f"/set {line}")
    assert session.settings == before


def test_stop_strings_are_read_like_python() -> None:
    assert changed(Settings(), "stop", r"\n\nUser:").stop == ("\n\nUser:",)
    assert changed(Settings(), "stop", r"a\\nb").stop == (r"a\nb",)
    assert changed(Settings(), "stop", "none").stop == ()


def test_system_reset_undo_edit_and_regen(session: Session) -> None:
    assert "no system prompt" in do(session, "/system").text
    do(session, "/system be kind")
    list(session.ask("one"))
    assert do(session, "/edit") == Reply(prefill="one")
    list(session.ask("two"))
    assert "two" in do(session, "/undo").text
    list(session.ask("three"))
    assert do(session, "/regen").then is Then.ANSWER_AGAIN
    assert "forgotten" in do(session, "/reset").text
    assert session.messages == [] and session.system == "be kind"
    do(session, "/system off")
    assert session.system is None
    assert do(session, "/quit").then is Then.LEAVE


def test_show_and_stats(session: Session) -> None:
    for topic in ("info", "params", "template", "memory", "history"):
        assert do(session, f"/show {topic}").text
    list(session.ask("one"))
    text = do(session, "/stats").text
    for part in ("tokens/s", "KV cache 4 MB", "90 MB resident", "of 1,000 tokens", "avx2"):
        assert part in text
    assert "2.33 bits" in do(session, "/show info").text and "1.08" in do(session, "/show info").text
    assert do(session, "/show template").text.endswith("[u]one<end>[a]answer 0<end>[a]")
    do(session, "/stats on")
    assert session.settings.stats
    with pytest.raises(UsageError):
        do(session, "/stats maybe")
    with pytest.raises(UsageError, match="info"):
        do(session, "/show")
    assert "3 tokens: 97 98 99" in do(session, "/tokens abc").text


def test_read_attaches_text_and_refuses_the_rest(session: Session, tmp_path: Path) -> None:
    (tmp_path / "a b.txt").write_text("content")
    assert "7 tokens" in do(session, f"/read {tmp_path}/a b.txt").text
    assert session.attached == [("a b.txt", "content")]
    (tmp_path / "large").write_text("x" * 1000)
    (tmp_path / "huge").write_text("x" * 100_000)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, match in [("large", "1,000 tokens"), ("huge", "far larger"), ("binary", "not UTF-8")]:
        with pytest.raises(UsageError, match=match):
            do(session, f"/read {tmp_path}/{name}")
    with pytest.raises(UsageError, match="file name"):
        do(session, "/read")
    if Path("/dev/zero").exists():  # endless, and of size 0
        with pytest.raises(UsageError, match="far larger"):
            do(session, "/read /dev/zero")


def test_save_and_load_bring_the_conversation_back(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    session.system = "be kind"
    list(session.ask('one "quoted" – ü\nline'))
    pieces = session.ask("two")
    next(pieces)
    pieces.close()
    do(session, f"/save {path}")
    assert sorted(tmp_path.iterdir()) == [path], "no temporary file is left"
    with pytest.raises(UsageError, match="/save!"):
        do(session, f"/save {path}")
    do(session, f"/save! {path}")
    other = Session(session.model)
    assert "4 messages" in do(other, f"/load {path}").text
    assert (other.messages, other.system) == (session.messages, "be kind")
    list(other.ask("three"))
    assert '[u]one "quoted" – ü\nline<end>' in cast(FakeModel, other.model).prompts[-1]


def test_failed_save_leaves_the_old_file(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "talk.json"
    path.write_text("old")
    monkeypatch.setattr(json, "dump", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        do(session, f"/save! {path}")
    assert path.read_text() == "old" and sorted(tmp_path.iterdir()) == [path]
    with pytest.raises(UsageError, match="folder"):
        do(session, f"/save {tmp_path}")
    with pytest.raises(UsageError, match="no such folder"):
        do(session, f"/save {tmp_path}/none/talk.json")


def _broken() -> Iterator[Any]:
    def document(**changes: Any) -> str:
        good = {"schema": "billm-chat-transcript", "version": 1, "model": "m", "system": None, "messages": []}
        return json.dumps({**good, **changes})

    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    yield pytest.param("{", "not JSON", id="cut short")
    yield pytest.param("[" * 100_000, "not JSON", id="deep")
    yield pytest.param("[]", "schema", id="a list")
    yield pytest.param(document(schema="x"), "schema", id="another schema")
    yield pytest.param(document(version=2), "version 1, found 2", id="a later version")
    yield pytest.param(document(system=3), "system: wanted text", id="system")
    yield pytest.param(document(messages={}), "wanted a list", id="messages")
    yield pytest.param(document(messages=[1]), "message 1: wanted an object", id="message")
    yield pytest.param(document(messages=[assistant]), "message 1: wanted the role 'user'", id="answer first")
    yield pytest.param(document(messages=[user, user]), "message 2: wanted the role 'assistant'", id="two questions")
    yield pytest.param(document(messages=[{"role": "user"}]), "content: wanted text", id="no content")
    yield pytest.param(
        document(messages=[{"role": "user", "content": "\ud800"}]), "surrogate", id="half a surrogate pair"
    )


@pytest.mark.parametrize(("text", "match"), list(_broken()))
def test_broken_transcripts_are_refused_and_change_nothing(
    session: Session, tmp_path: Path, text: str, match: str
) -> None:
    list(session.ask("one"))
    before = list(session.messages)
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=match):
        do(session, f"/load {path}")
    assert session.messages == before


def test_loading_a_conversation_that_ends_with_a_question(session: Session) -> None:
    session.replace_messages([Message("user", "one")])
    list(session.regenerate())
    assert [message.content for message in session.messages] == ["one", "answer 0"]


def _completions(text: str) -> list[str]:
    found = CommandCompleter().get_completions(Document(text, len(text)), CompleteEvent(completion_requested=True))
    return [text[: len(text) + completion.start_position] + completion.text for completion in found]


def test_completion(tmp_path: Path) -> None:
    assert _completions("/re") == ["/read", "/regen", "/reset", "/retry"]
    assert _completions("/set top") == ["/set top-k", "/set top-p"]
    assert _completions("/show m") == ["/show memory"]
    assert _completions("hello /re") == [] == _completions("/set temp 0")
    (tmp_path / "some notes.txt").touch()
    assert _completions(f"/read {tmp_path}{os.sep}so") == [f"/read {tmp_path}{os.sep}some notes.txt"]


def test_banner_and_warnings(session: Session) -> None:
    text = report.banner(session)
    for part in ("fake.billm", "52.3 MB", "2.33 bits", "1.08 by the paper", "avx2", "context 1,000"):
        assert part in text
    model = cast(FakeModel, session.model)
    assert [warning.split()[0] for warning in report.warnings(session)] == ["By"], "a tiny model by the paper's recipe"
    model.config.vocab_size, model.config.embedding_size = 1 << 20, 1 << 10
    assert report.warnings(session) == [], "a billion parameters may talk sense"
    model.isa = "numpy"
    model.tokenizer.has_chat_template = False
    slow, plain = report.warnings(session)
    assert "slow" in slow and "no chat template" in plain
