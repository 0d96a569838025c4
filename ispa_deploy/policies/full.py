"""Policy `full`: the whole of the model's window in every layer: the baseline."""

from ispa_deploy.policies.base import Policy

FULL = Policy(name="full", summary="the whole of the model's window in every layer: the baseline")
