"""What is written is whole or not there, and nothing is left beside it."""

from __future__ import annotations

import pytest

from ra3_trl.files import renamed_into_place, write_whole


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "new" / "page.html"
    write_whole(path, b"first")
    with pytest.raises(RuntimeError, match="half"), renamed_into_place(path) as aside:
        aside.write_bytes(b"sec")
        assert path.read_bytes() == b"first"
        raise RuntimeError("half of it")
    assert path.read_bytes() == b"first" and list(path.parent.iterdir()) == [path]
    write_whole(str(path), b"second")
    assert path.read_bytes() == b"second" and list(path.parent.iterdir()) == [path]


def test_a_folder_is_whole_and_takes_no_others_place(tmp_path):
    path = tmp_path / "data"

    def write(content: str) -> None:
        with renamed_into_place(path) as aside:
            aside.mkdir()
            (aside / "rows").write_text(content)
            assert path.exists() == (content == "theirs")

    write("ours")
    with pytest.raises(OSError, match="not empty"):
        write("theirs")
    assert (path / "rows").read_text() == "ours" and list(tmp_path.iterdir()) == [path]
