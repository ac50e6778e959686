"""Results on disk: masks in the scan's own geometry, findings as JSON, a page for people."""
