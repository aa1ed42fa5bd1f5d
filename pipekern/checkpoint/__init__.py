"""State on disk: safetensors files and a JSON manifest with digests, in a folder that is good at any moment."""
