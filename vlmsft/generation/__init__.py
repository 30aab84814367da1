"""Answers from a trained model: loading it, generating, and the answers to validation questions during training."""
