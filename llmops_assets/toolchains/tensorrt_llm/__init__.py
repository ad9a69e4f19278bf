"""Engines for NVIDIA GPUs by TensorRT-LLM, driven as commands; it is never imported here."""
