"""The paper's metrics, as its text defines them, and how the release computed them where that differs."""
