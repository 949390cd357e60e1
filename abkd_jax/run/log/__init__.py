"""Rows of metrics, TensorBoard events, progress."""
