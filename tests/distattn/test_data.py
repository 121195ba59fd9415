from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import distattn
from distattn.data import Packer, TokenFile, open_tokens, scatter, split, write_tokens
from distattn.loss import IGNORED
from tests.distattn.small_run import small_tokens


def in_memory(sizes: list[int]) -> TokenFile:
    """Every token is its place in the file, so that what is read says where it was."""
    boundaries = np.concatenate(([0], np.cumsum(sizes)))
    meta = {"tokens_crc32": 0, "documents": len(sizes), "tokenizer": "byte"}
    return TokenFile(Path("memory"), meta, np.arange(boundaries[-1], dtype=np.uint32), boundaries)


sizes_of_documents = st.lists(st.integers(1, 30), min_size=1, max_size=20)


@settings(deadline=None)
@given(sizes=sizes_of_documents, length=st.integers(2, 40), seed=st.integers(0, 1 << 64), epoch=st.integers(0, 50))
def test_an_epoch_holds_every_token_and_few_twice(sizes: list[int], length: int, seed: int, epoch: int) -> None:
    packer = Packer(in_memory(sizes), np.arange(len(sizes)), length, seed)
    count, total = packer.epoch_sequences, sum(sizes)
    rows = [packer.sequence(epoch * count + number).rows(np.arange(length)).tokens for number in range(count)]
    assert sorted(torch.cat(rows).unique().tolist()) == list(range(total))
    assert count * length - total < length, "only the last sequence is filled up"


@settings(deadline=None)
@given(sizes=sizes_of_documents, length=st.integers(2, 40), number=st.integers(0, 30))
def test_labels_are_the_next_token_of_the_same_document(sizes: list[int], length: int, number: int) -> None:
    packer = Packer(in_memory(sizes), np.arange(len(sizes)), length, 5)
    sequence = packer.sequence(number)
    assert sequence.lengths.sum() == length and (sequence.lengths > 0).all()
    tokens, labels, positions = sequence.rows(np.arange(length))
    begin = 0
    for size in sequence.lengths.tolist():
        part = slice(begin, begin + size)
        assert positions[part].tolist() == list(range(size))
        assert tokens[part].tolist() == list(range(int(tokens[begin]), int(tokens[begin]) + size))
        assert labels[part].tolist() == [*tokens[part].tolist()[1:], IGNORED]
        begin += size
    assert sequence.labels == int((labels != IGNORED).sum())


@settings(deadline=None)
@given(sizes=sizes_of_documents, asked=st.lists(st.integers(0, 45), max_size=30))
def test_rows_may_be_asked_in_any_order(sizes: list[int], asked: list[int]) -> None:
    sequence = Packer(in_memory(sizes), np.arange(len(sizes)), 40, 0).sequence(3)
    whole, some = sequence.rows(np.arange(46)), sequence.rows(np.array(asked, np.int64))
    for all_rows, rows in zip(whole, some, strict=True):
        assert torch.equal(all_rows[asked], rows)
    assert (whole.labels[40:] == IGNORED).all() and not whole.tokens[40:].any() and not whole.positions[40:].any()


@pytest.mark.parametrize("schedule", ["ring", "zigzag", "striped"])
def test_rows_read_by_place_are_those_of_shard_batch(tmp_path: Path, schedule: str) -> None:
    packer = Packer(small_tokens(tmp_path / "tokens"), np.arange(40), 100, 0)
    cp = distattn.ContextParallel(schedule=schedule)
    for number in range(4):
        sequence = packer.sequence(number)
        plan = cp.plan(distattn.documents(sequence.lengths.tolist()))
        ours = sequence.rows(plan.layout.positions(0))
        theirs = cp.shard_batch(sequence.rows(np.arange(100)).tokens, plan)
        assert torch.equal(ours.tokens, theirs.tokens)
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.positions, theirs.positions)


def test_neighbours_come_from_different_documents() -> None:
    """A long document would otherwise fill many steps in a row."""
    packer = Packer(in_memory([1000, 1000]), np.arange(2), 10, 0)
    first = [int(packer.sequence(number).rows(np.arange(1)).tokens[0]) // 1000 for number in range(200)]
    assert sum(a != b for a, b in zip(first, first[1:], strict=False)) > 70


def test_epochs_differ_and_seeds_differ() -> None:
    file, documents = in_memory([3] * 50), np.arange(50)

    def order(seed: int, epoch: int) -> list[int]:
        return Packer(file, documents, 150, seed).sequence(epoch).rows(np.arange(150)).tokens.tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) and order(0, 0) != order(1, 0)


def test_long_documents_are_cut_into_parts_that_are_packed_apart() -> None:
    """Every token once an epoch, no document longer than asked, and parts of one document in different places."""
    sizes = [1000, 3, 64, 65, 1]
    packer = Packer(in_memory(sizes), np.arange(5), 1133, 0, longest=64)
    sequence = packer.sequence(0)
    assert sorted(sequence.lengths.tolist()) == sorted([64] * 15 + [40, 3, 64, 64, 1, 1])
    assert sorted(sequence.rows(np.arange(1133)).tokens.tolist()) == sorted(packer.file.tokens.tolist())
    starts = sequence.offsets[sequence.offsets < 1000]
    assert (np.diff(starts) < 0).any()
    assert packer.identity() != Packer(in_memory(sizes), np.arange(5), 1133, 0).identity()


def test_scattered_numbers_are_the_same_for_ever() -> None:
    """They order the documents: another numpy or machine must not change what a resumed run reads."""
    assert scatter(np.arange(3), 0).tolist() == [16294208416658607535, 10451216379200822465, 10905525725756348110]
    assert scatter(np.arange(2), 7).tolist() == [15337404600680133411, 12303184768967004122]


def test_the_split_is_fixed_by_the_seed_and_loses_nothing() -> None:
    training, held_out = split(200, 0.1, 3)
    assert len(held_out) == 20
    assert sorted([*training, *held_out]) == list(range(200))
    assert np.array_equal(split(200, 0.1, 3)[1], held_out) and not np.array_equal(split(200, 0.1, 4)[1], held_out)


@pytest.mark.parametrize(("documents", "part", "held_out"), [(10, 0.0, 0), (10, 0.001, 1), (1, 0.5, 0), (3, 0.99, 2)])
def test_some_documents_are_left_on_both_sides(documents: int, part: float, held_out: int) -> None:
    training, kept = split(documents, part, 0)
    assert (len(training), len(kept)) == (documents - held_out, held_out)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    documents = [np.array([1, 2, 70000]), np.array([], np.int64), np.array([5])]
    meta = write_tokens(tmp_path / "tokens", documents, 100_000, "some.json")
    file = open_tokens(tmp_path / "tokens")
    assert file.meta == meta and meta["dtype"] == "uint32" and meta["documents"] == 2
    assert file.tokens.tolist() == [1, 2, 70000, 5] and file.boundaries.tolist() == [0, 3, 4]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_tokens_take_no_more_bytes_than_the_vocabulary_needs(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    write_tokens(tmp_path / "tokens", [np.array([vocab_size - 1])], vocab_size, "some.json")
    file = open_tokens(tmp_path / "tokens")
    assert file.meta["dtype"] == dtype and file.tokens.tolist() == [vocab_size - 1]


@pytest.mark.parametrize(("documents", "message"), [([[256]], "vocabulary has 256"), ([[]], "no token"), ([], "no token")])
def test_nothing_is_written_from_bad_documents(tmp_path: Path, documents: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_tokens(tmp_path / "tokens", [np.array(document, np.int64) for document in documents], 256, "byte")
    assert not list(tmp_path.iterdir())


def test_only_a_token_file_is_replaced(tmp_path: Path) -> None:
    tokens, texts = tmp_path / "tokens", tmp_path / "texts"
    texts.mkdir()
    (texts / "novel.txt").write_text("the only copy")
    for path in (texts, texts / "novel.txt"):
        with pytest.raises(ValueError, match="is not a token file: it would be lost"):
            write_tokens(path, [np.array([1])], 256, "byte")
    assert (texts / "novel.txt").read_text() == "the only copy"
    for token in (1, 2):
        write_tokens(tokens, [np.array([token])], 256, "byte")
    assert open_tokens(tokens).tokens.tolist() == [2]


@pytest.mark.parametrize("replace", [False, True])
def test_two_that_prepare_the_same_folder_at_once_do_not_collide(
    replace: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one is done while the first still writes; who does not replace goes on with what is there."""

    def documents() -> Iterator[np.ndarray]:
        yield np.array([1, 2, 3])
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)
            write_tokens(tmp_path / "tokens", [np.array([7, 8])], 256, "byte", replace)

    meta = write_tokens(tmp_path / "tokens", documents(), 256, "byte", replace)
    found = open_tokens(tmp_path / "tokens")
    assert found.tokens.tolist() == ([1, 2, 3] if replace else [7, 8]) and meta == found.meta
    assert [inside.name for inside in tmp_path.iterdir()] == ["tokens"]


def test_what_a_killed_preparation_left_does_not_stop_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as killed:
        killed.setattr("shutil.rmtree", lambda *_, **__: None)  # it had no time to remove its folder
        with pytest.raises(ValueError, match="vocabulary"):
            write_tokens(tmp_path / "tokens", [np.array([300])], 256, "byte")
    assert len(list(tmp_path.iterdir())) == 1
    write_tokens(tmp_path / "tokens", [np.array([7])], 256, "byte")
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:-size])


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: cut(folder / "tokens.bin", 1), r"tokens.bin is damaged: \d+ bytes were written, \d+ are there"),
        (lambda folder: flip(folder / "tokens.bin", 11), "tokens.bin is damaged: its checksum"),
        (lambda folder: cut(folder / "documents.bin", 8), "documents.bin is damaged"),
        (lambda folder: flip(folder / "documents.bin", 9), "documents.bin is damaged: its checksum"),
        (lambda folder: (folder / "documents.bin").unlink(), "documents.bin missing"),
        (lambda folder: (folder / "meta.json").write_text("{"), "meta.json is damaged: it is not readable"),
        (lambda folder: (folder / "meta.json").write_text("{}"), "meta.json is damaged: format, dtype"),
        (lambda folder: edit(folder / "meta.json", format=9), "format 9, this version reads format 1"),
    ],
)
def test_a_damaged_token_file_is_refused_with_what_to_do(tmp_path: Path, damage, message: str) -> None:
    small_tokens(tmp_path / "tokens")
    damage(tmp_path / "tokens")
    with pytest.raises(ValueError, match=message) as error:
        open_tokens(tmp_path / "tokens")
    assert "repare" in str(error.value)


def test_no_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="no document"):
        Packer(in_memory([3]), np.array([], np.int64), 8, 0)
