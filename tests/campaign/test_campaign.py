"""Ten random faults; `python tests/campaign --faults 1000` has more, of all kinds of training."""

import pytest
from campaign.disturbed import Campaign
from campaign.kinds import DDP_1, DDP_2, Kind, make_data

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("campaign")
    make_data(folder / "data")
    return folder


@pytest.mark.parametrize(
    ("kind", "is_elastic", "faults"),
    [(Kind(DDP_1, "muon", "parquet"), False, 6), (Kind(DDP_2, "adamw", "folder"), True, 4)],
    ids=lambda value: value.name if isinstance(value, Kind) else str(value),
)
def test_a_training_that_is_struck_again_and_again_ends_as_an_undisturbed_one(work, kind, is_elastic, faults):
    struck = 0
    for number in range(20):  # one that has come to its end before all have struck is followed by another
        if struck < faults:
            struck += Campaign(kind, f"test/{kind.name}/{number}", work, is_elastic, faults - struck).run().total()
    assert struck >= faults
