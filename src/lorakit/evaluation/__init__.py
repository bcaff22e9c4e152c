"""Evaluation: held-out loss, generated text and predicted labels, and their scores."""
