"""The list of allowed skips does its work."""

from tests.conftest import unlisted


def test_a_skip_that_is_not_on_the_list_is_reported() -> None:
    skips = [("tests/a.py::test_x", "real data is absent: /nowhere"), ("tests/a.py::test_y", "too slow")]
    assert unlisted(skips, ["* | real data is absent:*"]) == [("tests/a.py::test_y", "too slow")]
