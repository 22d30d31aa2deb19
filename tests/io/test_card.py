"""The frame of every card: Markdown from blocks, without what is empty."""

from __future__ import annotations

from traj_ood.io.card import listed, markdown_card, numbers


def test_blocks_tables_and_sections() -> None:
    text = markdown_card("A model", ["Small.", "", {"width": 4}], {"Data": ["None.", {}], "Losses": [""], "Odd": []})
    assert text == "# A model\n\nSmall.\n\n| | |\n|---|---|\n| width | 4 |\n\n## Data\n\nNone.\n"


def test_lists_of_values() -> None:
    assert listed({"torch": "2.14", "python": "3.11"}) == "python 3.11, torch 2.14"
    assert listed({"k": 3, "exif": True}, " = ") == "exif = True, k = 3"
    assert numbers((0.5, 12), ".1f") == "0.5, 12.0"
