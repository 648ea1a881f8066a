"""The demo model: a tiny Qwen3-MoE that has read the Python standard library."""
