"""docs/avmp_paper.md says what the code says."""

import pytest

from hbmgym.eval.avmp_paper.findings import FIGURE, PAGE, Findings, renew

SLOW = ("static", "differences", "rules", "ranking")


def renewed(names) -> str:
    return renew(PAGE.read_text(encoding="utf-8"), {name: Findings().blocks()[name] for name in names})


def test_the_papers_tables_are_up_to_date():
    quick = [name for name in Findings().blocks() if name not in SLOW]
    assert renewed(quick) == PAGE.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_the_other_tables_are_up_to_date(name):
    assert renewed([name]) == PAGE.read_text(encoding="utf-8")


def test_the_page_shows_the_figure():
    assert f"]({FIGURE})" in PAGE.read_text(encoding="utf-8")
    assert (PAGE.parent / FIGURE).is_file()


def test_a_block_is_made_anew_and_others_stay():
    text = "a\n<!-- generated: one -->\nold\n<!-- end -->\nb\n<!-- generated: two -->\nkept\n<!-- end -->\n"
    assert renew(text, {"one": lambda: "new"}) == text.replace("old\n", "\nnew\n\n")


def test_a_block_that_the_page_lacks_is_named():
    with pytest.raises(ValueError, match="the page has no block one"):
        renew("nothing", {"one": lambda: "new"})
