"""The embedded model: a procedural world, a fixed codec, its prompts, and what only this world can measure."""
