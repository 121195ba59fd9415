from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distattn.corpus import find_files, load_tokenizer, prepare, stdlib_files
from distattn.data import open_tokens


def test_the_standard_library_is_found_without_installed_packages() -> None:
    files = stdlib_files()
    names = {path.name for path in files}
    assert {"argparse.py", "threading.py"} <= names and len(files) > 300
    assert files == sorted(files)
    assert not any("site-packages" in path.parts for path in files)


def test_files_of_a_folder_are_documents_in_the_order_of_their_names(tmp_path: Path) -> None:
    text = tmp_path / "text"
    (text / "inner").mkdir(parents=True)
    (text / "b.txt").write_bytes(b"bb\xff")  # no UTF-8: bytes go through as they are
    (text / "inner" / "c.md").write_text("ccc")
    (text / "a.txt").write_text("a")
    (text / "image.png").write_bytes(b"no text")
    (text / "empty.txt").write_text("")
    told: list[tuple[int, int]] = []
    prepare([str(text)], tmp_path / "tokens", progress=lambda done, total: told.append((done, total)))
    file = open_tokens(tmp_path / "tokens")
    assert file.tokens.tobytes() == b"abb\xffccc"
    assert file.boundaries.tolist() == [0, 1, 4, 7]
    assert told[-1] == (4, 4)


def test_a_tokenizer_file_is_used(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "ring": 1, "attention": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    (tmp_path / "text.txt").write_text("ring attention ring what")
    meta = prepare([str(tmp_path / "text.txt")], tmp_path / "tokens", str(tmp_path / "words.json"))
    assert open_tokens(tmp_path / "tokens").tokens.tolist() == [1, 2, 1, 0]
    assert meta["vocab_size"] == 3


def test_bytes_are_tokens() -> None:
    size, encode = load_tokenizer("byte")
    assert size == 256 and np.array_equal(encode(b"az"), [97, 122])


@pytest.mark.parametrize("source", ["nowhere.txt", "stdlib2"])
def test_a_missing_source_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match=f"No file or folder {source}"):
        find_files([source])


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no text file"):
        find_files([str(tmp_path)])


def test_a_bad_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Use 'byte'"):
        load_tokenizer("bytes")
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizers JSON file"):
        load_tokenizer(str(tmp_path / "t.json"))
