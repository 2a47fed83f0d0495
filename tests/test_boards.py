"""TensorBoard's files without a step twice, and Weights & Biases by a double."""

import json
import struct
import sys
import types

import pytest

from jaxdeep import boards


def rows(*steps):
    return [{"step": n, "train/loss": 1 / n, "note": "x", "gone": None} for n in steps]


def written(workdir):
    """Every (step, tag, value) in the files, read by the format's own rules."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = data[at + 12 : at + 12 + size]
            at += 16 + size
            step = None
            for number, value in fields(event):
                step = value if number == 2 else step
                for _, one in fields(value) if number == 5 else ():
                    tag, simple = (part for _, part in fields(one))
                    found.append((step, tag.decode(), simple))
    return found


def fields(data):
    """The (number, value) of the fields of a protocol buffer: a second reader of the format."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            value |= (data[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 128:
                return value

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            value = varint()
        else:
            size = {1: 8, 5: 4}.get(kind) or varint()
            value = data[at : at + size]
            at += size
            if kind != 2:
                (value,) = struct.unpack("<d" if kind == 1 else "<f", value)
        yield key >> 3, value


def test_checksum_is_castagnolis():
    assert boards.crc32c(b"123456789") == 0xE3069283
    assert boards.crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, appendix B.4


def test_numbers_of_a_row_are_written_and_nothing_else(tmp_path):
    board = boards.TensorBoard(tmp_path, [])
    board.write(1, {"step": 1, "a/b": 0.5, "n": 3, "x": float("nan"), "y": None, "z": "text"})
    board.write(300, {"step": 300, "a/b": -2.0, "huge": 1e300})
    board.close()
    assert written(tmp_path) == [(1, "a/b", 0.5), (1, "n", 3.0), (300, "a/b", -2.0)]


def test_a_resumed_run_has_no_step_twice_and_none_missing(tmp_path):
    board = boards.TensorBoard(tmp_path, [])
    for row in rows(*range(1, 201)):
        board.write(row["step"], row)
    board.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    with path.open("ab") as file:  # a kill in the middle of an event
        file.write(path.read_bytes()[:30])
    board = boards.TensorBoard(tmp_path, rows(*range(1, 151)))
    for row in rows(*range(151, 161)):
        board.write(row["step"], row | {"train/loss": 7.0})
    board.close()
    boards.TensorBoard(tmp_path, rows(*range(1, 171))).close()  # 161 to 170 were not written
    found = written(tmp_path)
    assert [step for step, _, _ in found] == list(range(1, 171))
    assert [value for _, _, value in found[149:151]] == [pytest.approx(1 / 150), 7.0]
    boards.TensorBoard(tmp_path, []).close()  # begun again from nothing
    assert written(tmp_path) == []


def test_wandb_is_sent_each_step_once(tmp_path, monkeypatch):
    sent, opened = [], []

    class Run:
        def log(self, row, step):
            sent.append((step, row))

        def finish(self):
            sent.append("end")

    def init(**settings):
        opened.append(settings)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    (tmp_path / "config.json").write_text(json.dumps({"config": {"seed": 3}}))
    for done in (0, 2):
        board = boards.Wandb(tmp_path, "agents", done)
        board.write(2, {"step": 2, "loss": 0.5})
        board.write(3, {"step": 3, "loss": 0.25})
        board.close()
    assert sent == [(2, {"loss": 0.5}), (3, {"loss": 0.25}), "end", (3, {"loss": 0.25}), "end"]
    first, second = opened
    assert first == second and first["project"] == "agents" and first["config"] == {"seed": 3}
    assert first["resume"] == "allow" and first["name"] == tmp_path.name
