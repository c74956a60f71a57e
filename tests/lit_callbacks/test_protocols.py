from helpers import TokensWithIds
from lit_callbacks import LossSpikeRecovery, protocols


def test_protocols_are_structural():
    assert isinstance(TokensWithIds(), protocols.HasSampleIds)
    assert not isinstance(TokensWithIds(), protocols.HasPosition | protocols.CanSkip | protocols.CanExclude)
    assert isinstance(LossSpikeRecovery(), protocols.CanExpectShift)
