"""A double of NVIDIA's model code; it does nothing."""
