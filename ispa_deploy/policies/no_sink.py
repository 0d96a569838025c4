"""Policy `no-sink`: chosen layers keep nothing but the current chunk, corrected (the paper's No Sink)."""

from ispa_deploy.policies.base import Policy

NO_SINK = Policy(
    name="no-sink",
    summary="chosen layers keep nothing but the current chunk, corrected (the paper's No Sink)",
    localises=True,
    absorbs=True,
    sink=0,
)
