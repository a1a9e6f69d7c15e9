"""The last line of a run."""

import os

from trainers.output_folder import where_to_look


def test_the_newest_pictures_and_what_tells_about_the_run_are_named(tmp_path):
    assert where_to_look(tmp_path) == ""
    for age, name in enumerate(("pictures_after_slots.html", "pictures_before_slots.html")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, ns=(10 - age, 10 - age))
    (tmp_path / "curves.png").touch()
    assert where_to_look(tmp_path) == f"\nlook at {tmp_path}/pictures_after_slots.html, {tmp_path}/curves.png\n"
    (tmp_path / "report.html").touch()
    assert where_to_look(tmp_path).split(", ")[1] == f"{tmp_path}/report.html"
