"""Tables show every cell as it is."""

import builtins

from jpfq.network.table import table


def test_cells_are_shown_as_they_are():
    cells = ["block_[ab]/.*", "[bold]x[/bold]", ":smile:", "a\\b"]
    text = table(("pattern", "bits"), [(cell, "1.5") for cell in cells])
    assert [line.split()[0] for line in text.splitlines()[2:]] == cells


def test_numbers_stand_to_the_right():
    lines = table(("name", "share"), [("a", "5.25%"), ("b", "15.00%")]).splitlines()
    assert lines[2].endswith(" 5.25%")
    assert len(lines[2]) == len(lines[3])


def test_a_table_is_text_in_a_notebook_too(monkeypatch):
    """Where rich would show it by itself and write nothing, or write codes for colours."""
    rows = [("a", "1"), ("b", "2")]
    wanted = table(("name", "count"), rows)
    shell = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert table(("name", "count"), rows) == wanted
