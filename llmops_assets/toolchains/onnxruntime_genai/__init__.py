"""Engines for the CPU by ONNX Runtime GenAI."""
