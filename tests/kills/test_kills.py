"""A few kills of the campaign: see `python -m tests.kills`."""

from pathlib import Path

import pytest

from tests.kills.__main__ import Campaign


@pytest.mark.timeout(300)
def test_a_few_kills(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, seed=3, longest=2.0)
    campaign.run(8)
    assert campaign.ledger.acknowledged > 20
    assert campaign.phases["asked"] > 0
