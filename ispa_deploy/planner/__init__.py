"""Memory and latency of a model on a device, from the configuration alone: before any download, without torch."""
