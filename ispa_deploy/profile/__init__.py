"""Where the time of a chunk goes: recorders, breakdowns that close, and configurations compared side by side."""
