"""From a scan to a batch. These files travel to the Hub with a processor."""
