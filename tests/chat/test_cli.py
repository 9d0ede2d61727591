"""billm-chat as a command: one-shot use, exit codes, and a whole conversation in a pseudo-terminal."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from chat.terminal_process import TerminalProcess, command, environment
from random_model import make_random_billm, tiny_config

from billm_chat import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chat")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    """Random weights: it babbles until it is stopped, which is what these tests want."""
    path = folder / "tiny.billm"
    make_random_billm(path, tiny_config(max_position_embeddings=4000), seed=3)
    return path


def run(*arguments: str | Path, text: str | bytes = "", **environ: str) -> subprocess.CompletedProcess[str]:
    data = text.encode() if isinstance(text, str) else text
    done = subprocess.run(command(*arguments), input=data, capture_output=True, env=environment(**environ), timeout=60)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


# --- one-shot


def test_prompt_and_pipe_give_plain_text(model: Path) -> None:
    options = ("-n", "60", "--seed", "1", "--temp", "3")
    done = run(model, "-p", "hello", *options)
    assert done.returncode == 0 and done.stdout.endswith("\n")
    assert not set(done.stdout) & {chr(c) for c in (*range(9), *range(11, 32), *range(127, 160))}
    assert (
        run(model, *options, text="hello").stdout
        == done.stdout
        == run("-m", model, *options, "-p", "-", text="hello").stdout
    )
    # -q keeps the note about the answer's length away
    assert "60 tokens" in done.stderr and run(model, "-q", "-p", "hello", *options).stderr == ""


def test_lookup_gives_the_same_answer(model: Path) -> None:
    options = (model, "-p", "ab ab ab ab", "-n", "60", "--seed", "1", "--temp", "0.1", "--repeat-penalty", "1")
    plain, ahead = (json.loads(run(*options, *more, "--json").stdout) for more in ((), ("--lookup", "4")))
    assert ahead["text"] == plain["text"] and ahead["generated_tokens"] == plain["generated_tokens"]
    assert plain["proposed_tokens"] == 0 < ahead["accepted_tokens"] <= ahead["proposed_tokens"]


def test_json_and_the_order_of_file_pipe_and_prompt(model: Path, folder: Path) -> None:
    (folder / "question.txt").write_text("from the file\n", encoding="utf-8-sig")
    arguments = (model, "-f", folder / "question.txt", "-p", "and asked", "--json", "-n", "5", "--system", "be kind")
    done = run(*arguments, text="piped\n")
    answer = json.loads(done.stdout)
    assert (answer["schema"], answer["version"], answer["finish_reason"]) == ("billm-chat", 1, "length")
    assert answer["generated_tokens"] == 5 and done.stderr == ""
    text = "<system>be kind<|eos257|><user>from the file\n\npiped\n\nand asked<|eos257|><assistant>"
    import billm_rt

    assert answer["prompt_tokens"] == len(billm_rt.load(model).tokenizer.encode(text, add_bos=False, special=True))


def test_raw_prompt_has_no_template(model: Path) -> None:
    import billm_rt

    answer = json.loads(run(model, "--raw", "-p", "Once upon", "--json", "-n", "2").stdout)
    assert answer["prompt_tokens"] == len(billm_rt.load(model).tokenizer.encode("Once upon"))
    refused = run(model, "--raw", "--system", "x", "-p", "y")
    assert refused.returncode == 2 and "--raw" in refused.stderr


def test_closed_pipe_is_quiet(model: Path) -> None:
    arguments = command(model, "-p", "hello", "-n", "3000", "--temp", "3", "--no-stop-loops")
    with subprocess.Popen(
        arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(5)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["NONE", "-p", "x"], 2, "no such file"),
        (["NONE"], 2, "no such file"),
        (["CUT", "-p", "x"], 3, "bytes"),
        ([], 2, "which model"),
        (["MODEL", "-p", " "], 2, "empty"),
        (["MODEL", "--json"], 2, "empty"),
        (["MODEL", "--temp", "hot"], 2, "wanted a number"),
        (["MODEL", "-p", "x", "--lookup", "65"], 2, "at most 64"),
        (["MODEL", "-p", "x", "--ctx", "9999999"], 2, "--ctx"),
        (["MODEL", "-p", "x" * 3000, "--ctx", "64"], 4, "context holds 64"),
        (["MODEL", "-p", "x", "-f", "NONE"], 2, "No such file"),
        (["MODEL", "-p", "x", "--device", "abacus"], 2, "--device"),
    ],
)
def test_errors_are_one_line_and_a_code(
    model: Path,
    folder: Path,
    arguments: list[str],
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "cut.billm").write_bytes(model.read_bytes()[:5000])
    names = {"MODEL": str(model), "NONE": str(folder / "none.billm"), "CUT": str(folder / "cut.billm")}
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    try:
        returned = cli.main([names.get(argument, argument) for argument in arguments])
    except SystemExit as exit:  # how argparse leaves
        returned = exit.code
    out, err = capsys.readouterr()
    assert (returned, out) == (code, "")
    last = err.splitlines()[-1]
    assert message in last and last.startswith("billm-chat: ")
    assert err.count("\n") == 1 or "usage:" in err


def test_damaged_and_missing_files_end_the_process_with_their_codes(model: Path, folder: Path) -> None:
    (folder / "cut.billm").write_bytes(model.read_bytes()[:5000])
    for name, code in [("cut.billm", 3), ("none.billm", 2)]:
        done = run(folder / name, "-p", "x")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1)


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    script = (
        "import sys, time; from billm_chat.cli import build_parser; text = build_parser().format_help()\n"
        "heavy = {'numpy', 'rich', 'prompt_toolkit', 'billm_rt', 'tokenizers', 'jinja2'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "assert '--max-new-tokens' in text and 'examples:' in text\n"
        "print(time.process_time())"  # of the processor: other programs run here too
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.3


# --- a conversation

BABBLE = ("--temp", "3", "--seed", "1", "--no-stop-loops", "-n", "3000")


def test_conversation(model: Path, folder: Path) -> None:
    with TerminalProcess(model, *BABBLE, home=folder) as chat:
        before = chat.terminal_state()
        place = chat.wait_for(">>> ")
        banner = chat.shown
        assert "tiny.billm" in banner and "bits per binarized weight" in banner and "context 4,000" in banner
        chat.type("hello\r")
        place = chat.wait_for("hello", after=place)
        chat.wait_for_more(300, after=place)
        chat.type("\x03")  # in the middle of the answer
        place = chat.wait_for("(stopped", after=place)
        place = chat.wait_for(">>> ", after=place)
        chat.type("/set max-tokens 8\r")
        place = chat.wait_for("max-tokens is now 8", after=place)
        chat.type("/regen\r")
        place = chat.wait_for("(ended at 8 tokens", after=place)
        chat.type("/stats\r")
        place = chat.wait_for("KV cache", after=place)
        assert "reused" in chat.shown
        chat.type("/hlep\r")
        place = chat.wait_for("did you mean /help?", after=place)
        chat.type("/load /nowhere/x\r")
        place = chat.wait_for("No such file", after=place)
        chat.type("/quit\r")
        assert chat.wait_for_exit() == 0
        assert chat.terminal_state() == before, "echo and line editing are as they were"
    history = folder / "state" / "billm" / "chat_history"
    assert "+hello\n" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


def test_leaving_and_throwing_lines_away(model: Path, folder: Path) -> None:
    with TerminalProcess(model, "--no-history", "-q", home=folder / "other") as chat:
        place = chat.wait_for(">>> ")
        assert "tiny.billm" not in chat.shown
        chat.type("half a li\x03")
        place = chat.wait_for(">>> ", after=place)
        chat.type("\x03")
        place = chat.wait_for("(Ctrl-C again", after=place)
        chat.type("/tokens abc\r")
        place = chat.wait_for("tokens:", after=place)
        place = chat.wait_for(">>> ", after=place)
        chat.type("\x03")
        place = chat.wait_for("(Ctrl-C again", after=place)
        chat.wait_for(">>> ", after=place)
        chat.type("\x03")
        assert chat.wait_for_exit() == 0
    assert not (folder / "other" / "state").exists()


def test_several_lines_and_end_of_input(model: Path, folder: Path) -> None:
    with TerminalProcess(model, "--temp", "0", "-n", "3", "--no-markdown", home=folder) as chat:
        place = chat.wait_for(">>> ")
        for keys in ('"""one\rtwo"""\r', "three\\\rfour\r", "\x1b[200~five\nsix\x1b[201~\r", "seven\x1b\reight\r"):
            chat.type(keys)
            place = chat.wait_for("(ended at 3", after=place)
            place = chat.wait_for(">>> ", after=place)
        chat.type("/save! talk.json\r".replace("talk", str(folder / "talk")))
        place = chat.wait_for("Saved 8 messages", after=place)
        chat.type("\x04")
        assert chat.wait_for_exit() == 0
    said = [message["content"] for message in json.loads((folder / "talk.json").read_text())["messages"]]
    assert said[::2] == ["one\ntwo", "three\nfour", "five\nsix", "seven\neight"]


def test_no_color_and_dumb_terminals(model: Path, folder: Path) -> None:
    for environ in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        with TerminalProcess(model, "-n", "3", home=folder, **environ) as chat:
            place = chat.wait_for(">>> ")
            chat.type("hello\r")
            place = chat.wait_for("(ended at 3", after=place)
            chat.wait_for(">>> ", after=place)
            colours = re.findall(r"\x1b\[[0-9;]*3[0-7][0-9;]*m", chat.raw)
            assert not colours
            chat.type("/quit\r")
            assert chat.wait_for_exit() == 0


def test_second_turn_of_a_real_model_reads_only_what_is_new(model: Path) -> None:
    import billm_rt
    from billm_chat.session import Session
    from billm_chat.settings import Settings

    loaded = billm_rt.load(model)
    session = Session(loaded, Settings(temp=2.0, seed=4, max_tokens=150, stop_loops=False))
    list(session.ask("hello " * 20))
    first = session.last
    list(session.ask("two"))
    second = session.last
    assert first is not None and second is not None
    # The last token of an answer is sampled, never read: it is new, as are its end, the question and the heading.
    new = 1 + len(loaded.tokenizer.encode("<|eos257|><user>two<|eos257|><assistant>", add_bos=False, special=True))
    assert second.prompt_tokens - second.reused_tokens <= new
    assert second.reused_tokens >= first.prompt_tokens + first.generated_tokens - 1
