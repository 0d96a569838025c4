"""LiveAvatar: the causal speech-to-video model (Wan2.2-S2V + LoRA), its memory and its stream."""
