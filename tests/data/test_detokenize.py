from __future__ import annotations

import pytest

from layercut.data.detokenize import detokenize


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (" = Homarus gammarus = ", "= Homarus gammarus ="),
        (" = = Life cycle = = ", "== Life cycle =="),
        (" = = = 2000 – 2005 = = = ", "=== 2000 – 2005 ==="),
        ("1 @,@ 250 , 0 @.@ 7 and red @-@ tipped", "1,250, 0.7 and red-tipped"),
        ("60 cm ( 24 in ) and [ sic ] .", "60 cm (24 in) and [sic]."),
        ('only " lobster red " on " cooking " .', 'only "lobster red" on "cooking".'),
        ("Europe 's , don 't , they 're", "Europe's, don't, they're"),
        ("the ships ' AA defences ; Torres ' return", "the ships' AA defences; Torres' return"),
        ("it was ' B ' Squadron from ' C ' Squadron", "it was 'B' Squadron from 'C' Squadron"),
        ("the 1930s and ' 40s , he", "the 1930s and '40s, he"),
        ("what ? no ! yes : so ... then", "what? no! yes: so ... then"),
        ("at 45 ° N", "at 45°N"),
        (" \n a . \n \n b", "\na.\n\nb"),
        ("3 @-@ 4 @-@ 5", "3-4-5"),
        ("nothing to undo", "nothing to undo"),
    ],
)
def test_markers_are_undone(raw: str, text: str) -> None:
    assert detokenize(raw) == text


def test_an_unpaired_quote_does_not_reach_the_next_line() -> None:
    assert detokenize('inches : 5 " \n said " yes " \n') == 'inches: 5 "\nsaid "yes"\n'
