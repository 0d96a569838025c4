"""How good a stream is: paired and reference-free metrics, and the comparison of policies."""
