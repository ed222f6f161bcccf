"""A column of texts is a list of them in less memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.data.text_column import TextColumn

ANY = st.text(st.characters(exclude_categories=())) | st.binary(max_size=4).map(
    lambda raw: raw.decode(errors="surrogateescape")
)


@given(st.lists(ANY, max_size=8), st.slices(8))
def test_a_column_reads_as_the_list(texts: list[str], part: slice) -> None:
    column = TextColumn(texts)
    assert column == texts and list(column) == texts and column == TextColumn(texts)
    assert [column[place] for place in range(-len(texts), len(texts))] == texts + texts
    assert column[part] == texts[part]
    assert column != TextColumn([*texts, ""]) and column != [*texts, "x"]


def test_beyond_its_ends_there_is_nothing() -> None:
    column = TextColumn(["a", "ü"])
    for place in (2, -3):
        with pytest.raises(IndexError):
            column[place]
    assert column.index("ü") == 1 and "b" not in column and not TextColumn()


def test_a_text_takes_its_bytes_and_four_more() -> None:
    assert TextColumn(["abc", "ü"]).nbytes == 3 + 2 + 3 * 4
