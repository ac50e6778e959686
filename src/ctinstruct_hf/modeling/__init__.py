"""The network. These files travel to the Hub with a model: torch and transformers only."""

# Loaded before any module of ours, since registration with them imports ours (see _auto.py).
import transformers.models.auto.configuration_auto
import transformers.models.auto.modeling_auto  # noqa: F401
