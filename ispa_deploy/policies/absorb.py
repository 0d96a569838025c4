"""Policy `absorb`: ISPA: chosen layers keep the sink, their history is absorbed into the output projection."""

from ispa_deploy.policies.base import Policy

ABSORB = Policy(
    name="absorb",
    summary="ISPA: chosen layers keep the sink, their history is absorbed into the output projection",
    localises=True,
    absorbs=True,
)
