from __future__ import annotations

from pathlib import Path

import pytest

from distattn.data import open_tokens
from distattn.launch.prepare import main


def test_text_becomes_a_token_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("hello")
    out = str(tmp_path / "tokens")
    assert main([out, str(tmp_path / "a.txt")]) == 0
    assert open_tokens(out).tokens.tobytes() == b"hello"
    assert "5 tokens (uint8) in 1 documents" in capsys.readouterr().out


def test_what_is_there_is_replaced_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("hello")
    arguments = [str(tmp_path / "tokens"), str(tmp_path / "a.txt")]
    assert main(arguments) == 0
    assert main(arguments) == 2
    assert "--replace" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text("other")
    assert main([*arguments, "--replace"]) == 0
    assert open_tokens(tmp_path / "tokens").tokens.tobytes() == b"other"


def test_a_missing_source_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "tokens"), "nowhere"]) == 2
    assert "No file or folder nowhere" in capsys.readouterr().err
    assert not (tmp_path / "tokens").exists()
