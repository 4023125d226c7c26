"""How many rooms a start, an update and a save walk through. A newcomer follows these calls, so they have bounds.

In the flat tree of 68 files a start entered 50 files in 102 pairs, an update 25 in 37, a save 16 in 21.
"""

from pathlib import Path

import pytest
from stages import Stage
from walks import Walker

# Files and pairs of files at most; who lowers one writes the new number here. (Groups, adapters, laws of the timesteps and the
# table of what combines are rooms of their own: start 63 to 67, update 27 to 29; usable files of epochs, an adapter's base and
# what protects tags: start 67 to 70.)
BOUNDS = {"start": (70, 141), "update": (29, 42), "save": (12, 14)}


@pytest.mark.slow
def test_a_start_an_update_and_a_save_stay_short_walks(base_model: Path, dataset: Path, tmp_path: Path) -> None:
    stage, walker = Stage(tmp_path, dataset, base_model, "ft1"), Walker()
    assert walker.follow(lambda: stage.run("batch.micro=8", "batch.effective=16", "max_updates=4", "tracking.trace=false")) == 0, (
        stage.message
    )
    for name, (files, pairs) in BOUNDS.items():
        walk = getattr(walker, name)
        print(f"{name}: {walk}\n  {' '.join(sorted(walk.files))}")
        assert len(walk.files) <= files, f"{name}: {sorted(walk.files)}"
        assert len(walk.moves) <= pairs, f"{name}: {sorted(walk.moves)}"
    assert {"engine/loop.py", "engine/step.py"} <= walker.update.files and "storage/checkpoint.py" in walker.save.files
