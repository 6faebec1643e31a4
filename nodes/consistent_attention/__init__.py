"""Consistent Self-Attention: the panels of a batch share self-attention tokens."""
