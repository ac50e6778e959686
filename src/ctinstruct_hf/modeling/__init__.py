"""The network. These files travel to the Hub with a model: torch and transformers only."""
