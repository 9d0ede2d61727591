"""The soak run: it passes where memory stays, and fails where it grows."""

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from random_model import make_random_billm, tiny_config

from bench import soak
from billm_chat.session import Session


def steps(count: int) -> Iterator[str]:
    yield from ["filling", "filling", "ready", *["short"] * count]


@pytest.mark.parametrize(
    ("resident", "code", "said"),
    [
        ([1, 50, 90, 90, 95, 91, 95], 0, "at most 5.0 MB"),
        ([1, 50, 90, 90, 95, 101, 95], 1, "11.0 MB more than the baseline after 6 steps"),
        ([99, 120, 90, 90, 80, 90, 70], 0, "at most 0.0 MB"),
    ],
)
def test_growth_is_counted_from_the_full_context_on(
    resident: list[int], code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readings = iter(resident)
    monkeypatch.setattr(soak, "resident_bytes", lambda: next(readings) * 1_000_000)
    assert soak.watch(steps(4), seconds=60, bound=10e6, quiet=False) == code
    assert said in capsys.readouterr().out


def test_a_line_a_minute(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter(range(0, 10_000, 25))
    monkeypatch.setattr(soak.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(soak, "resident_bytes", lambda: 50_000_000)
    assert soak.watch(steps(1000), seconds=200, bound=1e6, quiet=False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["baseline", "1.2", "2.1", "3.3", "passed:"]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    make_random_billm(tmp_path / "tiny.billm", tiny_config(max_position_embeddings=300), seed=3)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog, and it does not mind.\n" * 100)
    return [str(tmp_path / "tiny.billm"), "--data", str(tmp_path / "text.txt"), "--ctx", "300"]


def test_a_real_chat_passes(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.main([*arguments, "--minutes", "0.1"]) == 0
    assert "passed" in capsys.readouterr().out


def test_a_leak_fails(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leak: list[bytes] = []
    ask = Session.ask

    def leaking(self: Session, text: str) -> Generator[str, None, None]:
        leak.append(b"x" * 3_000_000)
        return ask(self, text)

    monkeypatch.setattr(Session, "ask", leaking)
    assert soak.main([*arguments, "--minutes", "2"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_text_too_short_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path(arguments[2]).write_text("short")
    assert soak.main(arguments) == 2
    assert "too few" in capsys.readouterr().err
