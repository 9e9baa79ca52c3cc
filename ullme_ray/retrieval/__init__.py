"""Retrieval itself, without a model: judged sets, exact top-k and the measures. Used by training, mining and evaluation."""
