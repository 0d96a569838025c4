"""Policy `sink-local`: chosen layers keep the sink and drop their history, uncorrected (the paper's No Absorb)."""

from ispa_deploy.policies.base import Policy

SINK_LOCAL = Policy(
    name="sink-local",
    summary="chosen layers keep the sink and drop their history, uncorrected (the paper's No Absorb)",
    localises=True,
)
