"""Token routing: which tokens are kept."""

import numpy as np
import pytest

from jit_accel.data.batches.token_routing import TokenRouting


def test_kept_tokens_follow_from_seed_and_position_and_are_in_order():
    routing = TokenRouting(0.5, 16, seed=3)
    kept = [routing.kept(position) for position in range(400)]
    assert np.array_equal(kept[7], TokenRouting(0.5, 16, seed=3).kept(7))
    assert all(np.array_equal(each, np.unique(each)) and len(each) == 8 for each in kept)
    assert len({tuple(each) for each in kept}) > 380
    assert not np.array_equal(kept[7], TokenRouting(0.5, 16, seed=4).kept(7))
    shares = np.bincount(np.concatenate(kept), minlength=16) / len(kept)
    assert shares == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(("share", "kept"), [(0.25, 12), (0.99, 1), (0.01, 16)])
def test_a_share_of_all_is_left_out_and_one_token_stays(share, kept):
    assert len(TokenRouting(share, 16, 0).kept(0)) == kept
