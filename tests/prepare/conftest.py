import json

import pytest


@pytest.fixture(scope="module", autouse=True)
def no_chart():
    """The chart of classes takes a third of a small preparation: its numbers are noted in its place."""
    from jit_accel.prepare import run

    def note_classes(folder, counts):
        (folder / "classes.png").write_text(json.dumps(counts))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "draw_classes", note_classes)
        yield
