"""The structure that CONTRIBUTING.md shows is the one that stands."""

import re
from pathlib import Path

import architecture


def test_imports_go_down_and_in_no_circle():
    found = architecture.imports()
    assert architecture.imports_up(found) == []
    assert architecture.circles(found) == []
    # The Hub copies the flat modules alone, by a regular expression that sees imports in functions too.
    flat = [each for each in found if architecture.storey(each.by) == 0]
    assert len(flat) > 30 and all(architecture.storey(each.of) == 0 for each in flat)


def test_imports_up_and_circles_are_found():
    def of(by, target):
        return architecture.Import(by, target, None)

    up = of("data.files", "training.base_trainer")
    assert architecture.imports_up([up, of("training.base_trainer", "data.files")]) == [up]
    circle = [of("a", "b"), of("b", "c"), of("c", "a"), of("c", "d")]
    assert architecture.circles(circle) == [["a", "b", "c"]] and architecture.circles(circle[1:]) == []


def test_an_image_argument_is_declared_once():
    names = architecture.image_arguments()
    assert {"guidance_scale", "image_top_k", "pixel_temperature"} <= set(names)
    for name in names:
        assert len(set(architecture.declarations(name)) - set(architecture.NOT_OURS)) == 1, name


def test_the_map_names_every_room():
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in text.split("## Where things are")[1].split("## Code")[0].splitlines()]
    storey, named = "", set()
    for row in rows:
        if len(row) != 4 or "---" in row[0] or row[0].strip() == "storey":
            continue
        storey = re.sub(r"[`,].*|flat modules.*", "", row[0].strip().lstrip("`")) if row[0].strip() else storey
        folder, _, rooms = row[1].rpartition(":")
        prefix = [storey, *re.findall(r"`(\w+)`", folder)]
        named |= {".".join(filter(None, [*prefix, room])) for room in re.findall(r"`(\w+)`", rooms)}
        if row[1].strip() == "":
            named.add(storey)
    rooms = {module for module in architecture.modules() if not module.endswith("__init__")}
    assert named == rooms
