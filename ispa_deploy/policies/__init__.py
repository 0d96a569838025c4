"""The table of cache policies, one small file each."""

from ispa_deploy.policies.absorb import ABSORB
from ispa_deploy.policies.base import Policy
from ispa_deploy.policies.full import FULL
from ispa_deploy.policies.no_sink import NO_SINK
from ispa_deploy.policies.sink_local import SINK_LOCAL
from ispa_deploy.policies.window import WINDOW

POLICIES: dict[str, Policy] = {policy.name: policy for policy in (FULL, WINDOW, SINK_LOCAL, NO_SINK, ABSORB)}

__all__ = ["POLICIES", "Policy"]
