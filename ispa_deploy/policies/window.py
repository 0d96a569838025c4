"""Policy `window`: a rolling window of --window frames in every layer."""

from ispa_deploy.policies.base import Policy

WINDOW = Policy(name="window", summary="a rolling window of --window frames in every layer", own_window=True)
