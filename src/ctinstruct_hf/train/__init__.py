"""Training of both stages over Transformers' Trainer."""
